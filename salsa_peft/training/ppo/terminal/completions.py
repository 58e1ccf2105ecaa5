"""Samples of an update's responses on the terminal: two in a short table, or, on request, TRL's table of completions."""

from __future__ import annotations

import importlib
import random
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from salsa_peft.training.ppo.metrics import completion_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from salsa_peft.training.ppo.config import SalsaPPOConfig
    from salsa_peft.training.ppo.rollout import Rollout

PIPE_WIDTH = 160
"""Largest width in columns of a sample's line if samples are not printed to a terminal."""
TRACKERS = ("wandb", "trackio")
"""Trackers that receive the completions as a table, as from TRL's GRPOTrainer."""


def log_completions(
    rollout: Rollout, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase, update: int, step: int
) -> None:
    """Print TRL's table of prompts and completions on standard output, and send all of them to TRACKERS in report_to.

    args.num_completions_to_print of them, drawn at random, are printed. Control characters are printed as escapes.
    """
    from tqdm import tqdm
    from trl.trainer.utils import print_prompt_completions_sample

    columns = {"score": rollout.scores, "kl": rollout.kl.sum(-1)}
    rows = list(completion_rows(rollout.responses, columns, len(rollout.scores), tokenizer))
    count = min(args.num_completions_to_print or len(rows), len(rows))
    # not by TRL's function, which changes the state of Python's random numbers
    shown = [rows[index] for index in sorted(random.Random(args.seed + update).sample(range(len(rows)), count))]
    prompts, responses = (
        ["\n".join(map(printable, str(row[name]).split("\n"))) for row in shown] for name in ("prompt", "response")
    )
    with tqdm.external_write_mode(file=sys.stdout):
        print_prompt_completions_sample(
            prompts, responses, {"score": [row["score"] for row in shown]}, None, step,
            extra={"KL": [f"{row['kl']:.2f}" for row in shown]},
        )  # fmt: skip
        sys.stdout.flush()
    for name in TRACKERS:
        if name in (args.report_to or ()):
            _send(importlib.import_module(name), rows, step)


def _send(tracker: Any, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Log a table `completions` with a tracker that has been started."""
    import pandas as pd

    names = {"prompt": "prompt", "completion": "response", "score": "score", "kl": "kl"}
    table = {"step": [step] * len(rows), **{name: [row[key] for row in rows] for name, key in names.items()}}
    tracker.log({"completions": tracker.Table(dataframe=pd.DataFrame(table))})


def print_samples(rows: Sequence[Mapping[str, Any]], update: int, stream: TextIO | None = None) -> None:
    """Print rows of completions.jsonl, to standard error by default: as a table on a terminal, else one line each.

    Of long texts, only the end of a prompt and the start of a response are printed. TRL's
    print_prompt_completions_sample is not used, because it prints whole texts with their control characters.
    """
    from tqdm import tqdm

    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        text = _table(rows, update, stream) if rows else ""
    else:
        text = "".join(_line(row, update) for row in rows)
    # the stream is written directly, so that progress bars of rich and tqdm stay below the text
    with tqdm.external_write_mode(file=stream):
        stream.write(text)
        stream.flush()


def _line(row: Mapping[str, Any], update: int) -> str:
    start = f"update {update}  score {row['score']:.3f}  KL {row['kl']:.2f}  "
    room = (PIPE_WIDTH - len(start) - len("… → …")) // 3
    prompt, response = printable(str(row["prompt"])), printable(str(row["response"]))
    return f"{start}{_cut(prompt[::-1], room)[::-1]} → {_cut(response, 2 * room)}\n"


def _cut(text: str, cells: int) -> str:
    """The start of a text that takes at most this many columns of a terminal, with … if text is left out."""
    from rich.cells import chop_cells

    most = 4 * cells  # characters: marks above letters take no column
    start = (chop_cells(text[:most], cells) or [""])[0]
    return start if start == text else f"{start}…"


def _table(rows: Sequence[Mapping[str, Any]], update: int, stream: TextIO) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    title = Text(f"update {update}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, expand=True, show_lines=True)
    for name in ("score", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("prompt", ratio=1, overflow="fold")
    table.add_column("response", ratio=2, overflow="fold")
    most = 2 * console.width // 3
    for row in rows:
        prompt, response = printable(str(row["prompt"])), printable(str(row["response"]))
        if len(prompt) > most:
            prompt = f"…{prompt[-most:]}"
        if len(response) > 2 * most:
            response = f"{response[: 2 * most]}…"
        table.add_row(f"{row['score']:.3f}", f"{row['kl']:.2f}", Text(prompt), Text(response))
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def printable(text: str) -> str:
    """Make text safe for a terminal: line breaks become ⏎, special characters become Python's escapes.

    These are control, formatting, surrogate, private-use and unassigned characters, such as those of escape sequences
    and changes of direction. The two zero-width joiners, which Persian and emoji need, stay.
    """
    hidden, joiners = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"), "\u200c\u200d"
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in hidden and char not in joiners else char
        for char in text.replace("\r\n", "⏎").replace("\n", "⏎")
    )  # fmt: skip
