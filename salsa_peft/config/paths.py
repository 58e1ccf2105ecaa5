"""Local paths in a recipe: finding them, making them absolute, and checking that the files exist.

Repositories on the Hub are not checked here. Imports no torch.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salsa_peft.config.fields import NAME
from salsa_peft.config.rewards import function_with_folder, has_template
from salsa_peft.config.schema import OWN_TEMPLATE, Recipe
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json
from salsa_peft.utils.hub import HUB_ID
from salsa_peft.utils.messages import short, short_path

LOCAL_SUFFIXES = (
    ".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".gz", ".bz2", ".xz", ".jinja", ".yaml",
)  # fmt: skip
"""Suffixes of names that are taken for local paths even if no such file exists."""


def bundled_folder(kind: str) -> Path:
    """Folder of the bundled `recipes` or `adapters`: in the package, or in a checkout beside the package."""
    package = Path(__file__).resolve().parents[1]
    inside = package / f"_{kind}"
    return inside if inside.is_dir() else package.parent / kind


def is_local(value: str) -> bool:
    """Whether a value is a local path, not a Hub id, given that the recipe's local paths are absolute."""
    return os.path.isabs(value)


def is_source(keys: list[str]) -> bool:
    """Whether `keys` lead to a data source, which may be given as a bare string, its path."""
    return (len(keys) == 2 and keys[0] == "data") or (len(keys) == 3 and keys[:2] == ["evaluate", "prompts"])


def absolute_paths(data: dict[str, Any], folder: str) -> dict[str, Any]:
    """A copy of a recipe's settings with absolute local paths. Relative paths start at `folder`."""
    for keys, change in PATHS.items():
        data = _change(data, keys.split("."), change, folder)
    return data


def _change(value: Any, keys: list[str], change: Callable[[Any, str], Any], folder: str) -> Any:
    """A copy of nested mappings with the values at `keys` changed; * stands for every key of a mapping."""
    if not keys:
        return change(value, folder)
    if not isinstance(value, dict):
        return value
    inside = {key: _change(value[key], keys[1:], change, folder) for key in value if keys[0] in (key, "*")}
    return {**value, **inside}


def _path(value: Any, folder: str) -> Any:
    if not isinstance(value, str) or not value or "\0" in value or value.startswith("hf://"):
        return value
    path = os.path.abspath(os.path.join(folder, os.path.expanduser(value)))
    looks_local = value[0] in "./~" or value.lower().endswith(LOCAL_SUFFIXES) or value.count("/") > 1
    return path if looks_local or os.path.exists(path) else value


def _source(value: Any, folder: str) -> Any:
    """Make the path of a data source absolute. The source is a mapping or the path alone."""
    return _change(value, ["path"], _path, folder) if isinstance(value, dict) else _path(value, folder)


def _model_path(value: Any, folder: str) -> Any:
    """Like _path, but a name with a backslash, or whose first folder exists (runs/seed-9), is a path too."""
    found = _path(value, folder)
    if not isinstance(found, str) or os.path.isabs(found) or "\0" in found:
        return found
    first, slash, _ = found.partition("/")
    local = "\\" in found or (slash and os.path.isdir(os.path.join(folder, first)))
    return os.path.abspath(os.path.join(folder, found)) if local else found


def _model_paths(value: Any, folder: str) -> Any:
    """Apply _model_path to each entry of a list. A bare string counts as a list of one entry."""
    value = [value] if isinstance(value, str) else value
    return [_model_path(entry, folder) for entry in value] if isinstance(value, list) else value


def _template(value: Any, folder: str) -> Any:
    """The absolute path of a chat template. The name of a bundled template is replaced by its path."""
    if isinstance(value, str) and NAME.match(value) and not value.endswith(".jinja"):
        path = bundled_folder("recipes") / "chat_templates" / f"{value}.jinja"
        return str(path) if path.is_file() else value
    return _path(value, folder)


NESTED = ("soup", "stretched", "members")
"""Keys of a reference that is a mapping, whose values may hold local paths."""


def _references(value: Any, folder: str) -> Any:
    """References with absolute paths. A word without a slash is the name of a model of the run, not a path."""
    if isinstance(value, list):
        return [_references(entry, folder) for entry in value]
    if isinstance(value, dict):  # {soup: {members: […]}}
        inside = {key: _references(entry, folder) for key, entry in value.items() if key in NESTED}
        return {**value, **inside}
    named = isinstance(value, str) and "/" not in value
    return value if named else _model_path(value, folder)


def _reward_section(value: Any, folder: str) -> Any:
    """The section `reward` with absolute paths. A value that is not a mapping is taken for reward.model."""
    return _reward(value if isinstance(value, dict | None) else {"model": value}, folder)


def _reward(value: Any, folder: str) -> Any:
    """A value of reward.model with absolute paths, including the folders of functions' modules."""
    if isinstance(value, list):
        return [_reward(entry, folder) for entry in value]
    if isinstance(value, dict):
        return _change(value, ["model"], _reward, folder)
    if not isinstance(value, str) or value == "adapter":
        return value
    return function_with_folder(value, folder) if ":" in value else _model_path(value, folder)


def _judge(value: Any, folder: str) -> Any:
    """The section evaluate.judge with absolute paths. With kind openai, the model is a name, not a path."""
    if not isinstance(value, dict):
        return value
    model = {"local": _path, "function": function_with_folder}.get(str(value.get("kind")), lambda name, _: name)
    change = {"model": model, "prompts": _path, "references": _path}
    return {key: change[key](entry, folder) if key in change else entry for key, entry in value.items()}


PATHS: dict[str, Callable[[Any, str], Any]] = {
    "reward": _reward_section,
    "sft.from_": _model_paths,
    "synthetic.function": function_with_folder,
    **{f"{soup}.measure": function_with_folder for soup in ("soup", "soups.*")},
    **{f"{soup}.{key}": _references for soup in ("soup", "soups.*") for key in ("members", "start")},
    "policies.*.start": _references,
    "warp.start": _references,
    "rewarded_soups.start": _references,
    "rewarded_soups.reference": _references,
    "landscape.line": _references,
    "landscape.plane": _references,
    "model.base": _model_path,
    "model.chat_template": _template,
    "data.*": _source,
    "policies.*.reference": _references,
    "sweep.*.reference": _references,
    "evaluate.prompts.*": _source,
    "evaluate.models": _references,
    "evaluate.controls.*": _references,
    "evaluate.pairs": _references,
    "evaluate.judge": _judge,
}
"""Key that may hold local paths (* stands for any name) → function that makes the paths absolute."""


def check_files(recipe: Recipe) -> None:
    """Raise SalsaError if the base or the chat template is missing or unusable."""
    if recipe.model.base is not None:
        _check_base(recipe.model.base)
        check_path("model.base", recipe.model.base, "a model", "config.json")
    check_template(recipe)


def _check_base(base: str) -> None:
    """Raise SalsaError for a local base that is an adapter, or whose weights are not safetensors."""
    if not is_local(base) or not os.path.isdir(base):
        return
    names, start = sorted(os.listdir(base)), f"model.base: {short_path(base)}"
    weights = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if "adapter_config.json" in names and not weights:
        content = None
        with contextlib.suppress(SalsaError):
            content = read_json(Path(base, "adapter_config.json"))
        own = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        raise SalsaError(
            f"{start} is an adapter, not a model. Set model.base to {f'{own}, ' if own else ''}the model that it was"
            " trained on, or"
            f" merge the adapter first: `salsa soup MERGED {short(Path(base).name)[1:-1]} --merge --base {own or 'BASE'}`"
        )
    for ending, remedy in (
        (".gguf", "a file of llama.cpp. Use the original model, with weights in safetensors"),
        (".bin", "a pickle, which is never loaded. Load the model with Transformers and save it again (save_pretrained writes safetensors)"),
        (".pth", "a pickle, which is never loaded. Convert the model to Transformers' format, with safetensors"),
    ):  # fmt: skip
        file = next((name for name in names if name.lower().endswith(ending) and name != "training_args.bin"), None)
        require(bool(weights) or file is None, f"{start} has its weights only in {file}, {remedy}")


def check_template(recipe: Recipe) -> None:
    """Raise SalsaError if the template's file, or for `tokenizer` the local base's template, is missing."""
    template, base = recipe.model.chat_template, recipe.model.base
    if template == OWN_TEMPLATE and base is not None and os.path.isdir(base):
        require(
            has_template("model.chat_template", base),
            f"model.chat_template: {short_path(base)} has no chat template. Use chatml, zephyr, or the path of a Jinja"
            " file.",
        )
    if template is None or template == OWN_TEMPLATE:
        return
    names = sorted(path.stem for path in (bundled_folder("recipes") / "chat_templates").glob("*.jinja"))
    require(
        is_local(template) and os.path.isfile(template),
        f"model.chat_template: {short_path(template)} is no file. Use {OWN_TEMPLATE} (the base's template), the path of a"
        f" Jinja file, or a bundled template: {', '.join(names) or 'none'}",
    )


def check_path(where: str, path: str, what: str, file: str) -> None:
    """Raise SalsaError if a folder lacks `file` or a Hub id is malformed. what: kind of model to ask for."""
    if not is_local(path):
        check_hub_id(where, path, f"the folder or Hub id (namespace/name) of {what}")
        return
    require(os.path.isdir(path), f"{where}: there is no folder {short_path(path)}; give the folder or Hub id of {what}")
    require(
        os.path.isfile(os.path.join(path, file)),
        f"{where}: {short_path(path)} has no {file}; give the folder or Hub id of {what}",
    )


def check_hub_id(where: str, value: str, expected: str) -> None:
    """Raise SalsaError unless `value` can be a Hub id. expected: what to give instead, for the message."""
    require(HUB_ID.match(value) is not None, f"{where}: {short(value)} is no file, folder or Hub id; give {expected}")
