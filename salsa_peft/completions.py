"""A few completions for people: a table on a terminal, above whatever bar is open there; elsewhere one line each.

What a model writes is foreign text: its control characters are shown, not obeyed, and rich's markup in it is plain text.
Imports no torch. Left out: messages as a prompt (rows hold text), word wrap on lines that no terminal shows.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LINES = 4
"""Of a prompt or a response in the table, about."""
WIDTH = 160
"""Columns of a line where there is no terminal."""
GAP = 2
JOINERS = "\u200c\u200d"  # invisible, but Persian is written with one and emoji with the other
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
RIGHT_TO_LEFT = ("R", "AL", "AN")
ISOLATE, POP = "\u2068", "\u2069"


def show(rows: Sequence[Mapping[str, Any]], update: int, stream: TextIO | None = None) -> None:
    """Rows of completions.jsonl (`prompt`, `response`, `score`, `kl`) → the stream, standard error where none is given."""
    if not rows:
        return
    from rich.console import Console
    from tqdm import tqdm

    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        console = Console(file=stream, highlight=False)
        with console.capture() as captured:
            console.print(_table(rows, update, console))
        text = captured.get()
    else:
        text = "".join(f"{_line(row, update)}\n" for row in rows)
    # Written, not printed by the console: an open bar of rich's has taken standard error's place and puts the text above itself.
    with tqdm.external_write_mode(file=stream):  # and one of tqdm's steps aside
        stream.write(text)
        stream.flush()


def _table(rows: Sequence[Mapping[str, Any]], update: int, console: Console) -> Table:
    """Score and KL first, so that they stand in line however the text after them runs."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    scores, kls = [f"{row['score']:.3f}" for row in rows], [f"{row['kl']:.2f}" for row in rows]
    widths = [max(map(len, ["score", *scores])), max(map(len, ["KL", *kls]))]
    left = max(console.width - sum(widths) - 4 * (GAP + 1), 8)
    widths += [left // 3, left - left // 3]
    table = Table(
        title=Text(f"update {update}"), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, GAP, 0, 0)
    )  # fmt: skip
    for name, width in zip(("score", "KL", "prompt", "response"), widths, strict=True):
        table.add_column(name, width=width, no_wrap=True, justify="right" if name in ("score", "KL") else "left")
    for row, score, kl in zip(rows, scores, kls, strict=True):
        prompt = _block(str(row["prompt"]), widths[2], console, end=True)
        table.add_row(score, kl, Text(prompt), Text(_block(str(row["response"]), widths[3], console)), end_section=True)
    return table


def _block(text: str, width: int, console: Console, *, end: bool = False) -> str:
    """About LINES lines of a text: its first ones, or (`end`) its last."""
    from rich.text import Text

    lines = Text(cut(printable(text), LINES * width, end=end)).wrap(console, width, overflow="fold")
    return "\n".join(isolated(line.plain.rstrip()) for line in lines)


def _line(row: Mapping[str, Any], update: int) -> str:
    """update 3  score 0.812  KL 4.10  …the prompt's end → the response, cut to WIDTH."""
    from rich.cells import cell_len

    prompt = cut(printable(str(row["prompt"])), WIDTH // 4, end=True)
    start = f"update {update}  score {row['score']:.3f}  KL {row['kl']:.2f}  "
    room = WIDTH - cell_len(start) - cell_len(prompt) - 3
    return f"{start}{isolated(prompt)} → {isolated(cut(printable(str(row['response'])), room))}"


def printable(text: str) -> str:
    """Text on one line that does nothing to a terminal: line breaks as ⏎; control, formatting and unassigned characters (escape
    sequences, changes of direction, lone surrogates) as their escapes.
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in HIDDEN and char not in JOINERS else char
        for char in text.replace("\r\n", "⏎").replace("\n", "⏎")
    )  # fmt: skip


def isolated(text: str) -> str:
    """Text with letters that run from the right, shut in (U+2068, U+2069), so that a terminal reorders nothing around it."""
    turned = any(unicodedata.bidirectional(char) in RIGHT_TO_LEFT for char in text)
    return f"{ISOLATE}{text}{POP}" if turned else text


def cut(text: str, width: int, *, end: bool = False) -> str:
    """What fits into `width` columns, its start or its end, with … where something is missing."""
    from rich.cells import cell_len

    # marks that stand above a letter take no column, so the number of characters is bounded too
    kept = text[-4 * width :] if end else text[: 4 * width]
    missing = len(kept) < len(text)
    if not missing and cell_len(kept) <= width:
        return kept
    room, count = width - 1, 0
    for char in reversed(kept) if end else kept:
        room -= cell_len(char)
        if room < 0:
            break
        count += 1
    return f"…{kept[len(kept) - count :]}" if end else f"{kept[:count]}…"
