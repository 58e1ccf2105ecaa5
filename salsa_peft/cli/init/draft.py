"""The settings of the recipe that `salsa init` writes: a bundled recipe, changed for the user's model and files."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salsa_peft.cli.init.measure import DataFile, ModelFolder, TokenCounter, look_at_model, measure, quantile
from salsa_peft.config.fields import NAME
from salsa_peft.config.load import find_recipe
from salsa_peft.config.schema import PPO, SFT, Model, Reward, Source
from salsa_peft.config.yaml import read_yaml
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short

STARTS = {"quickstart": "quickstart", "smollm2": "smollm2", "llama2": "llama2_full"}
"""Value of --from → the bundled recipe."""
HELD_OUT = 256
"""Maximum number of prompts that are kept for the evaluation: at most a tenth of all."""
LONGEST = 2048
"""Maximum number of tokens that the draft allows, more only if the bundled recipe has more; memory grows with it."""
LANDSCAPE = 128
"""Maximum number of prompts at each point of the landscape."""


@dataclass
class Draft:
    """Settings for a recipe file, with what was found in the files."""

    data: dict[str, Any]
    """The settings, as in a recipe file."""
    notes: dict[str, str] = field(default_factory=dict)
    """Key → why it has its value, for a comment."""
    found: dict[str, DataFile] = field(default_factory=dict)
    """Kind of data → what the user's file holds."""
    remarks: list[str] = field(default_factory=list)
    """Lines for the user."""

    def set(self, key: str, value: Any, note: str = "") -> None:
        """Set a key such as ppo.batch_size, and a comment."""
        section: Any = self.data
        *parts, last = key.split(".")
        for part in parts:
            section = section.setdefault(part, {})
        section[last] = value
        if note:
            self.notes[key] = note


def make_draft(start: str, output: Path, model: str | None, files: Mapping[str, str]) -> Draft:
    """A recipe for a model and files. files: kind of data → path or Hub id. Raises SalsaError for unusable files."""
    data = read_yaml(str(find_recipe(STARTS[start])))
    draft = Draft({"name": _name(output.stem), **{key: value for key, value in data.items() if key != "name"}})
    if "toy" in data:
        given = [f"--{name}" for name in ("model", *files) if name in files or (name == "model" and model is not None)]
        require(
            not given,
            f"--from {start}: generates its own model and data, which {', '.join(given)} cannot replace; use --from smollm2",
        )
        return draft
    base = str(data["model"]["base"])
    looked = look_at_model(model or base)
    _set_model(draft, output, model, base, looked)
    counter = TokenCounter(looked.folder)
    _set_judge(draft)
    _set_data(draft, output, files, counter)
    if files or model:
        of = f" on {', '.join(Path(path).name for path in dict.fromkeys(files.values()))}" if files else ""
        draft.data["description"] = f"SALSA with {Path(draft.data['model']['base']).name}{of}."
    if draft.found:
        _set_lengths(draft, looked, counter.exact)
        _set_batches(draft)
    return draft


def _name(stem: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:64] or "my"
    require(
        NAME.match(name) is not None, f"--output: {short(stem)} is no name for a recipe; use letters, digits, - and _"
    )
    return name


def path_in_recipe(path: str, output: Path) -> str:
    """A local path as the recipe has it: relative to the recipe's folder, unless it is absolute. A Hub id stays."""
    if os.path.isabs(path) or path.startswith("hf://") or not os.path.exists(path):
        return path
    found = os.path.relpath(path, output.parent)
    return found if found.startswith("..") else f"./{found}"


def _set_model(draft: Draft, output: Path, model: str | None, base: str, looked: ModelFolder) -> None:
    """Base and chat template. The bundled recipe's own base keeps the bundled template."""
    if model is None or model == base:
        return
    draft.set("model.base", path_in_recipe(model, output))
    draft.data["model"].pop("revision", None)
    if looked.template is None:
        kept = draft.data["model"]["chat_template"]
        draft.notes["model.chat_template"] = (
            "not looked up, because the model is not on this machine; tokenizer: the model's own"
        )
        draft.remarks.append(
            f"model.chat_template: {kept}, because {model} is not on this machine; tokenizer is the model's own template"
        )
        return
    own = looked.template == "tokenizer"
    draft.set("model.chat_template", looked.template, "the model has one" if own else "the model has none")


def _set_judge(draft: Draft) -> None:
    """Leave out a judge, which costs money or needs a server."""
    judge = draft.data.get("evaluate", {}).pop("judge", None)
    if judge is not None:
        inside = ", ".join(f"{key}: {value}" for key, value in judge.items())
        draft.notes["evaluate"] = f"For a judge, which costs money, add: judge: {{{inside}}}"


def _set_data(draft: Draft, output: Path, files: Mapping[str, str], counter: TokenCounter) -> None:
    """Sources. Prompts are those of the pairs, or else of the demonstrations, if they are not given."""
    given = dict(files)
    if files and "prompts" not in files:
        given["prompts"] = files.get("preferences") or files["demonstrations"]
    for kind, path in given.items():
        source: dict[str, Any] = {"path": path_in_recipe(path, output)}
        if os.path.exists(path):
            draft.found[kind] = found = measure(kind, Source(path=os.path.abspath(path)), counter)
            bundled = draft.data["data"][kind].get("limit")
            source |= {"limit": bundled} if bundled is not None and bundled < found.rows else {}
            draft.notes[f"data.{kind}"] = f"{found.rows:,} rows, columns {found.columns}"
        draft.set(f"data.{kind}", source)
    if given:
        _set_questions(draft, given)
    for kind in set(draft.data["data"]) - set(given):
        draft.notes[f"data.{kind}"] = "not yours: from the bundled recipe"
        if files:
            draft.remarks.append(
                f"data.{kind}: {draft.data['data'][kind]['path']} of the bundled recipe; give --{kind} for your own"
            )


def _set_questions(draft: Draft, given: Mapping[str, str]) -> None:
    """Hold out prompts for the evaluation: the last ones of the file, which no stage with that file is trained on."""
    path, source = given["prompts"], draft.data["data"]["prompts"]
    found, folder = draft.found.get("prompts"), Path(path)
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))  # has no slices
    draft.data.get("landscape", {}).pop("prompts", None)
    if found is None or saved or found.rows < 2:
        draft.set(
            "evaluate.prompts",
            {"own": {**source, "limit": HELD_OUT}},
            "the prompts of the training: give other ones for a fair test",
        )
        return
    held_out = max(1, min(HELD_OUT, found.rows // 10))
    train, rest = f"train[:{found.rows - held_out}]", f"train[{found.rows - held_out}:]"
    for kind, other in given.items():
        if other == path:
            draft.data["data"][kind]["split"] = train
    draft.set(
        "evaluate.prompts", {"own": {"path": source["path"], "split": rest}}, f"{held_out} rows that no stage trains on"
    )
    draft.set("landscape.limit", min(LANDSCAPE, held_out))
    size = draft.data["generation"].get("batch_size", 64)
    draft.set("generation.batch_size", min(size, held_out))
    if len(found.texts) == found.rows and (
        repeated := len(set(found.texts[: found.rows - held_out]) & set(found.texts[found.rows - held_out :]))
    ):
        draft.remarks.append(
            f"evaluate.prompts.own: {repeated} of its {held_out} prompts also occur in the training rows"
        )


def _set_lengths(draft: Draft, looked: ModelFolder, exact: bool) -> None:
    """Lengths from the quantiles of the data, at most what the model reads."""
    found, bundled = draft.found, draft.data["generation"]["max_new_tokens"]
    counted = "" if exact else ", counted as characters / 4"
    answers = [length for one in found.values() for length in one.answers]
    most = min(looked.longest or LONGEST, max(LONGEST, draft.data["model"].get("max_length", Model().max_length)))
    wanted = _round_up(quantile(answers, 0.9), 16)
    new = max(8, min(wanted or bundled, bundled, most // 2))
    note = f"90% of the answers have at most {quantile(answers, 0.9):,} tokens{counted}"
    note += f"; {new} keeps PPO quick" if new < wanted else ""
    draft.set("generation.max_new_tokens", new, note if answers else "")
    chats = {kind: quantile(one.chats, 0.95) for kind, one in found.items() if kind != "prompts"}
    needs = [*chats.values(), new + quantile(found["prompts"].prompts, 0.95) if "prompts" in found else 0]
    longest = min(most, _round_up(max(needs), 64))
    longest = max(longest, min(most, new + 32))
    if {"demonstrations", "preferences"} - set(found):  # those that were not measured may be longer
        longest = max(longest, min(most, draft.data["model"].get("max_length", Model().max_length)))
    said = ", ".join(f"95% of the {kind} have at most {length:,}" for kind, length in chats.items())
    draft.set("model.max_length", longest, f"{said} tokens{counted}" if said else "")
    for kind, one in found.items():
        room = longest - new if kind == "prompts" else longest
        lengths = one.prompts if kind == "prompts" else one.chats
        share = sum(length > room for length in lengths) / max(1, len(lengths))
        if share > 0:
            what = "cut" if kind == "demonstrations" else "left out"
            draft.remarks.append(
                f"{kind}: about {share:.1%} of the rows are longer than {room:,} tokens and will be {what}"
            )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _set_batches(draft: Draft) -> None:
    """Batch sizes that leave at least 16 steps (8 updates of PPO) in an epoch, and more epochs for few rows."""
    found, defaults = draft.found, {"sft": SFT(), "reward": Reward(), "ppo": PPO()}
    for kind, section, steps, wanted, most in (
        ("demonstrations", "sft", 16, 100, 3), ("preferences", "reward", 16, 0, 1), ("prompts", "ppo", 8, 50, 4),
    ):  # fmt: skip
        if kind not in found:
            continue
        source, settings = draft.data["data"][kind], draft.data.setdefault(section, {})
        rows = min(_rows_of(source, found[kind].rows), source.get("limit", found[kind].rows))
        usable = rows - defaults["reward"].held_out_rows(rows) if kind == "preferences" else rows  # type: ignore[attr-defined]
        batch = min(settings.get("batch_size", defaults[section].batch_size), _power_of_two(usable // steps))
        unit = "updates" if section == "ppo" else "steps"
        draft.set(f"{section}.batch_size", batch, f"{max(1, usable // batch):,} {unit} in a pass over {usable:,} rows")
        share = batch
        if section == "ppo":
            parts = min(settings.get("num_mini_batches", 1), batch)
            share = batch // parts
            draft.set("ppo.num_mini_batches", parts)
            if settings.get("rollout_batch_size", 0) > batch:
                draft.set("ppo.rollout_batch_size", batch)
        if (settings.get("micro_batch_size") or 1) > share:
            draft.set(f"{section}.micro_batch_size", share)
        epochs = min(most, math.ceil(wanted * batch / max(1, usable)))
        if epochs > settings.get("num_train_epochs", defaults[section].num_train_epochs):
            draft.set(f"{section}.num_train_epochs", epochs, "more than one, because there are few rows")


def _rows_of(source: Mapping[str, Any], rows: int) -> int:
    """Number of rows of a source whose split may be train[:N]."""
    cut = re.match(r"train\[:(\d+)\]", source.get("split", ""))
    return int(cut[1]) if cut else rows


def _power_of_two(value: int) -> int:
    """The largest power of two that is at most `value`, at least 1."""
    return 1 << max(0, value.bit_length() - 1)
