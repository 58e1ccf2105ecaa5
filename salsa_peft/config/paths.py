"""A recipe's local paths: made absolute, told from Hub ids, and looked for.

Every refusal is a SalsaError `key: found …, expected …`. What the Hub holds is seen at the stage's start, not here. Imports no torch.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salsa_peft.config.fields import NAME, SEED
from salsa_peft.config.references import placed_measure
from salsa_peft.config.rewards import has_template, placed
from salsa_peft.config.schema import OWN_TEMPLATE, Recipe
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.hub import HUB_ID
from salsa_peft.utils.messages import short, short_path

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".gz", ".bz2", ".xz")
"""Of the files that data/files.py reads, packed or not."""
LOCAL_SUFFIXES = (*DATA_SUFFIXES, ".jinja", ".yaml")


def bundled(kind: str) -> Path:
    """The folder of the recipes or adapters that come along: package data in a wheel, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / f"_{kind}"
    return inside if inside.is_dir() else package.parent / kind


def is_local(value: str) -> bool:
    """Whether a value of a recipe whose paths are absolute is a path (then absolute) rather than a Hub id."""
    return os.path.isabs(value)


def is_source(keys: list[str]) -> bool:
    """Whether a data source stands at these keys, so that bare text is its path."""
    return (len(keys) == 2 and keys[0] == "data") or (len(keys) == 3 and keys[:2] == ["evaluate", "prompts"])


def absolute(data: dict[str, Any], folder: str) -> dict[str, Any]:
    """A copy of departures whose local paths are absolute, relative ones taken from `folder`."""
    data = copy.deepcopy(data)
    if not isinstance(data.get("reward", {}), dict | None):
        data["reward"] = {"model": data["reward"]}
    _change(data, "reward", "model", lambda value: _reward(value, folder))
    _change(data, "sft", "from_", lambda value: _each_path(value, folder))
    _change(data, "soup", "measure", lambda value: placed_measure(value, folder))
    _change(data, "model", "base", lambda value: _model_path(value, folder))
    _change(data, "model", "chat_template", lambda value: _template(value, folder))
    for named in (_mapping(data.get("data")), _mapping(_mapping(data.get("evaluate")).get("prompts"))):
        for name, source in named.items():
            named[name] = _path(source, folder)
            _change(named, name, "path", lambda value: _path(value, folder))
    policies = _mapping(data.get("policies"))
    for name in policies:
        _change(policies, name, "reference", lambda value: _references(value, folder))
    for key in ("models", "pairs"):
        _change(data, "evaluate", key, lambda value: _references(value, folder, bare=False))
    _change(data, "evaluate", "judge", lambda value: _judge(value, folder))
    return data


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _change(data: dict[str, Any], section: str, key: str, change: Callable[[Any], Any]) -> None:
    inner = data.get(section)
    if isinstance(inner, dict) and key in inner:
        inner[key] = change(inner[key])


def _path(value: Any, folder: str) -> Any:
    if not isinstance(value, str) or not value or "\0" in value:
        return value
    if value.startswith("hf://"):
        return value
    path = os.path.abspath(os.path.join(folder, os.path.expanduser(value)))
    looks_local = value[0] in "./~" or value.lower().endswith(LOCAL_SUFFIXES) or value.count("/") > 1
    return path if looks_local or os.path.exists(path) else value


def _model_path(value: Any, folder: str) -> Any:
    """As _path; a path too is what has a backslash, or begins with a folder that is there (runs/seed-9), whether the rest is there or not."""
    found = _path(value, folder)
    if not isinstance(found, str) or os.path.isabs(found) or "\0" in found:
        return found
    first, slash, _ = found.partition("/")
    local = "\\" in found or (slash and os.path.isdir(os.path.join(folder, first)))
    return os.path.abspath(os.path.join(folder, found)) if local else found


def _each_path(value: Any, folder: str) -> Any:
    """Also of a bare string, which is a list of one."""
    value = [value] if isinstance(value, str) else value
    return [_model_path(entry, folder) for entry in value] if isinstance(value, list) else value


def _template(value: Any, folder: str) -> Any:
    if isinstance(value, str) and NAME.match(value) and not value.endswith(".jinja"):
        path = bundled("recipes") / "chat_templates" / f"{value}.jinja"
        return str(path) if path.is_file() else value
    return _path(value, folder)


def _references(value: Any, folder: str, bare: bool = True) -> Any:
    """Paths made absolute; without `bare`, a word without a slash is a policy's name."""
    if isinstance(value, list):
        return [_references(entry, folder, bare) for entry in value]
    named = isinstance(value, str) and (value in ("base", "soup") or SEED.match(value) or not (bare or "/" in value))
    return value if named else _model_path(value, folder)


def _reward(value: Any, folder: str) -> Any:
    """Paths made absolute, also those of functions' modules."""
    if isinstance(value, list):
        return [_reward(entry, folder) for entry in value]
    if isinstance(value, dict):
        return {key: _reward(entry, folder) if key == "model" else entry for key, entry in value.items()}
    if not isinstance(value, str) or value == "adapter":
        return value
    return placed(value, folder) if ":" in value else _model_path(value, folder)


def _judge(value: Any, folder: str) -> Any:
    """Paths made absolute; an endpoint's name of a model is none."""
    if not isinstance(value, dict):
        return value
    model = {"local": _path, "function": placed_measure}.get(str(value.get("kind")), lambda name, _: name)
    change = {"model": model, "prompts": _path, "references": _path}
    return {key: change[key](entry, folder) if key in change else entry for key, entry in value.items()}


def check_files(recipe: Recipe) -> None:
    """The base and the chat template are there."""
    model = recipe.model
    if model.base is not None:
        _check_base(model.base)
        check_path("model.base", model.base, "a model's folder", "config.json")
    check_template(recipe)


def _check_base(base: str) -> None:
    """Raise SalsaError for a folder that holds an adapter, or weights in other formats than safetensors alone."""
    if not is_local(base) or not os.path.isdir(base):
        return
    names, start = sorted(os.listdir(base)), f"model.base: {short_path(base)}"
    weights = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if "adapter_config.json" in names and not weights:
        try:
            content = json.loads(Path(base, "adapter_config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            content = {}
        own = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        told = f"{own}, the model that it was trained on" if own else "the model that it was trained on"
        raise SalsaError(
            f"{start} is an adapter, not a model. Set model.base to {told}, or merge it first: `salsa soup MERGED {short(Path(base).name)[1:-1]}"
            f" --merge --base {own or 'BASE'}`"
        )
    for ending, remedy in (
        (".gguf", "a format of llama.cpp. Use the model that it was made from, with safetensors"),
        (".bin", "pickles, which are never read. Load it with Transformers and save it again (save_pretrained writes safetensors)"),
        (".pth", "pickles, which are never read. Convert it to Transformers' format, with safetensors"),
    ):  # fmt: skip
        odd = next((name for name in names if name.lower().endswith(ending) and name != "training_args.bin"), None)
        require(bool(weights) or odd is None, f"{start} has its weights in {odd} alone, {remedy}")


def check_template(recipe: Recipe) -> None:
    """Raise SalsaError for a template that is no file, or a base's own that it does not have; a Hub id is not looked at."""
    model = recipe.model
    if model.chat_template == OWN_TEMPLATE:
        if model.base is not None and os.path.isdir(model.base):
            require(
                has_template("model.chat_template", model.base),
                f"model.chat_template: {short_path(model.base)} has no chat template of its own. Use chatml, zephyr, or a path to a Jinja file.",
            )
    elif model.chat_template is not None:
        folder = bundled("recipes") / "chat_templates"
        known = ", ".join(sorted(path.stem for path in folder.glob("*.jinja"))) or "none"
        require(
            is_local(model.chat_template) and os.path.isfile(model.chat_template),
            f"model.chat_template: found {short_path(model.chat_template)}, which is no file, expected {OWN_TEMPLATE} (the base's own), a Jinja"
            f" file, or one of ours: {known}",
        )


def check_path(where: str, path: str, what: str, file: str) -> None:
    """A folder that holds `file`, or what can be a Hub id."""
    if not is_local(path):
        check_hub_id(where, path, f"{what} or a Hub id")
        return
    require(os.path.isdir(path), f"{where}: found {short_path(path)}, which is no folder, expected {what} or a Hub id")
    require(
        os.path.isfile(os.path.join(path, file)), f"{where}: found no {file} in {short_path(path)}, expected {what}"
    )


def check_hub_id(where: str, value: str, expected: str) -> None:
    """Raise SalsaError unless `value` can be a Hub id."""
    require(HUB_ID.match(value) is not None, f"{where}: found {short(value)}, expected {expected} (namespace/name)")
