"""The figures of an update in TRL's names, metrics.jsonl and completions.jsonl, and sample completions on the terminal."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from salsa_peft.models.responses import Responses
from salsa_peft.models.rewards.function import decode
from salsa_peft.training import checkpoints
from salsa_peft.training.ppo import losses
from salsa_peft.training.ppo.guards import repetition

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from salsa_peft.training.ppo.config import SalsaPPOConfig
    from salsa_peft.training.ppo.rollout import Rollout


METRICS, COMPLETIONS, EVALUATIONS = "metrics.jsonl", "completions.jsonl", "eval_completions.jsonl"
FILES = (METRICS, COMPLETIONS, EVALUATIONS)


def metrics(
    rollout: Rollout, totals: Sequence[Sequence[float]], *, update: int, batch_size: int, kl_coef: float, skipped: int
) -> dict[str, float]:
    """The figures of an update, in TRL's names. KL and entropy are in nats, KL summed over a response.

    update: its number, from 1. batch_size: responses of an update. kl_coef: β of the update. skipped: minibatches left out so far.
    totals: of each optimizer step that was not left out, PPOLoss's fields summed over its micro-steps and processes.
    """
    responses, mask = rollout.responses, rollout.responses.response_mask
    kl, score = rollout.kl.sum(-1).mean().item(), rollout.scores.mean().item()
    per_step = torch.tensor(totals, dtype=torch.float64)
    mean = losses.PPOLoss(*per_step.mean(0).tolist())
    ratios = per_step[:, losses.PPOLoss._fields.index("ratio")]
    return {
        "update": update,
        "episode": update * batch_size,
        "objective/scores": score,
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": rollout.entropy.sum(-1).mean().item(),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": score - kl_coef * kl,
        "objective/response_length": responses.lengths.float().mean().item(),
        "objective/empty_share": responses.empty.float().mean().item(),
        "objective/repetition": repetition(responses.response_ids, mask),
        "policy/approxkl_avg": mean.approxkl,  # type: ignore[dict-item]
        "policy/clipfrac_avg": mean.clipfrac,  # type: ignore[dict-item]
        "policy/skipped_minibatches": skipped,
        "loss/policy_avg": mean.policy,  # type: ignore[dict-item]
        "loss/value_avg": mean.value,  # type: ignore[dict-item]
        "val/clipfrac_avg": mean.value_clipfrac,  # type: ignore[dict-item]
        "val/ratio": mean.ratio,  # type: ignore[dict-item]
        "val/ratio_var": ratios.var(unbiased=False).item(),
        "val/num_eos_tokens": int(responses.finished.sum()),
        "val/explained_variance": losses.explained_variance(rollout.values, rollout.returns, mask),
    }


def completions(responses: Responses, columns: Mapping[str, Tensor], count: int,
                tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The first `count` responses as rows {prompt, response} and the figures of `columns`, (B,) each."""
    part = responses.rows(torch.arange(min(count, len(responses.finished))))
    prompts = decode(tokenizer, part.prompt_ids, part.prompt_mask)
    answers = decode(tokenizer, part.response_ids, part.response_mask)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        figures = {name: column[row].item() for name, column in columns.items()}
        yield {"prompt": prompt, "response": answer, **figures}


class Logs:
    """The files of one output folder, appended to at the end of an update. What an earlier run left in them is never lost."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.begun = folder, False
        self.own: dict[str, int] = {}
        """File → where the lines begin that were written before training began (evaluations)."""

    def begin(self) -> str | None:
        """A new run's logs → a line about an earlier one's, which are kept as metrics.1.jsonl and so on; nothing where it has begun."""
        if self.begun:
            return None
        self.begun = True
        earlier = {file: self.own.get(file.name, file.stat().st_size) for file in self._there()}
        if not any(earlier.values()):
            return None
        number = self._free()
        for file, size in ((file, size) for file, size in earlier.items() if size):
            kept = numbered(file, number)
            file.rename(kept)
            own = kept.read_bytes()[size:]
            if own:
                file.write_bytes(own)
            os.truncate(kept, size)
        return (
            f"{self.folder}: an earlier run's logs are kept as {numbered(self.folder / METRICS, number).name} and so on"
        )

    def keep(self) -> str:
        """A copy of them as they are, before they are cut back → a line that says so."""
        number = self._free()
        for file in self._there():
            shutil.copyfile(file, numbered(file, number))
        return (
            f"{self.folder}: the logs as they were are kept as {numbered(self.folder / METRICS, number).name} and so on"
        )

    def take(self, folder: Path) -> str | None:
        """Go on with the logs of another folder → as `begin`."""
        self.own.clear()
        said = self.begin()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, self.folder / name)
        return said

    def _there(self) -> list[Path]:
        return [self.folder / name for name in FILES if (self.folder / name).exists()]

    def _free(self) -> int:
        """A number that none of the files is kept under."""
        taken = {path.name for path in self.folder.glob("*.jsonl")}
        return next(n for n in itertools.count(1) if not any(numbered(Path(name), n).name in taken for name in FILES))

    def write(self, row: dict[str, float], rollout: Rollout, args: SalsaPPOConfig,
              tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:  # fmt: skip
        """An update's metrics and some of its responses, which are returned."""
        self._append(METRICS, [row])
        if not args.logged_completions:
            return []
        columns = {"score": rollout.scores, "kl": rollout.kl.sum(-1)}
        rows = [
            {"update": row["update"], **entry}
            for entry in completions(rollout.responses, columns, args.logged_completions, tokenizer)
        ]
        self._append(COMPLETIONS, rows)
        return rows

    def write_evaluation(self, update: int, responses: Responses, scores: Tensor, count: int,
                         tokenizer: PreTrainedTokenizerBase) -> None:  # fmt: skip
        """Some responses of an evaluation."""
        rows = completions(responses, {"score": scores}, count, tokenizer) if count else []
        self._append(EVALUATIONS, [{"update": update, **row} for row in rows])

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("a", encoding="utf-8") as file:
            self.own.setdefault(name, file.tell())
            file.writelines(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

    def sync(self) -> dict[str, int]:
        """Flush the files to the disk → their sizes in bytes."""
        sizes = {}
        for path in self._there():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                sizes[path.name] = os.fstat(file.fileno()).st_size
        return sizes

    def cut(self, sizes: Mapping[str, int]) -> list[str]:
        """Back to these sizes; a file that is not named is emptied. → a line for each that is shorter."""
        self.begun = True
        lines = [checkpoints.cut(self.folder / name, sizes.get(name, 0)) for name in FILES]
        return [line for line in lines if line is not None]


def numbered(file: Path, number: int) -> Path:
    """metrics.jsonl → metrics.1.jsonl"""
    return file.with_name(f"{file.stem}.{number}{file.suffix}")


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


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
    with tqdm.external_write_mode(file=stream):  # above an open progress bar
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
