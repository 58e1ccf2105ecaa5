"""Finds what the words of `salsa judge` name: answer files, models, adapters, results of a run. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salsa_peft.config.job import unit_of
from salsa_peft.config.load import saved_recipe
from salsa_peft.config.rewards import SEQUENCE_CLASSIFIER
from salsa_peft.evaluation.fastchat import file_stem
from salsa_peft.models.adapters.bases import local_base
from salsa_peft.soup.lora.read import WEIGHTS
from salsa_peft.soup.member_folders import ADAPTERS, CONFIGS, kind_of
from salsa_peft.soup.options import base_of
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json
from salsa_peft.utils.hub import HUB_ID, MODEL_FILES, local_folder
from salsa_peft.utils.manifests import finished_results, read_manifest

ANSWER_FILES = (".jsonl", ".json", ".parquet", ".csv", ".gz")
"""Suffixes of names that are taken for answer files even if there is no such file."""
WORD = "a model or an adapter (folder or Hub id), RUN/NAME of a recipe's run, or a file of answers"


WITHOUT_WEIGHTS = tuple(pattern for pattern in MODEL_FILES if pattern != "*.safetensors")


@dataclass(frozen=True)
class Contestant:
    """A model, an adapter or a file of answers that is compared with others."""

    name: str
    given: str
    """Path or Hub id, as it was given."""
    file: Path | None = None
    """File of ready answers. None: the model answers."""
    model: str = ""
    """Folder or Hub id of the model that answers: an adapter's base, or the model itself."""
    revision: str | None = None
    """Revision of a model on the Hub."""
    folder: Path | None = None
    """Local folder with the model's configuration and tokenizer; a Hub model's weights are downloaded later."""
    adapter: Path | None = None
    """Local folder of the adapter on the model. None: the model answers without one."""

    def describe(self, path: Callable[[str], str] = str) -> str:
        """Kind and place of the contestant. path: shortens a path."""
        if self.file is not None:
            return f"ready answers, {path(str(self.file))}"
        given = path(self.given)
        return f"model {given}" if self.adapter is None else f"adapter {given} on {path(self.model)}"


def find_contestants(words: Sequence[str], questions: Path, base: str | None = None) -> list[Contestant]:
    """The contestants that are named by `words`, each a path or Hub id, or NAME=path.

    questions: the file of the questions; a word may be the name of a file in model_answer/ beside it. base: the base of
    all adapters; None: the one that each adapter names. Raises SalsaError for fewer than two, for equal names, and for a
    word that names nothing.
    """
    require(len(words) >= 2, f"MODEL: a judge compares two or more, not {len(words)}; give {WORD}, for each of them")
    found = [_contestant(word, questions, base) for word in words]
    name, times = Counter(file_stem(one.name) for one in found).most_common(1)[0]
    require(
        times == 1,
        f"MODEL: {times} of them are called {name}; give each a name of its own: "
        + " ".join(f"NAME={one.given}" for one in found if file_stem(one.name) == name),
    )
    return found


def _contestant(word: str, questions: Path, base: str | None) -> Contestant:
    name, equals, given = word.partition("=")
    if not equals or Path(word).exists():
        name, given = "", word
    require(bool(given), f"MODEL: {word!r} is empty; give {WORD}")
    path = Path(given).expanduser()
    beside = questions.parent / "model_answer" / f"{given}.jsonl"
    file = next((one for one in (path, beside) if one.is_file()), None)
    if file is not None:
        return Contestant(name or file.name.split(".jsonl")[0], given, file)
    require(not given.lower().endswith(ANSWER_FILES), f"MODEL: there is no file {given}; check the path of the answers")
    folder = path if _is_model(path) else _result(path) or (path if path.is_dir() else None)
    if folder is None:
        require(
            "/" in given and HUB_ID.match(given) is not None,
            f"MODEL: {given} is no file or folder"
            + ("" if "/" in given else f", and there is no {beside}")
            + f"; give {WORD}",
        )
        folder = local_folder(given, patterns=WITHOUT_WEIGHTS)
    return _model(name, given, folder, base)


def _is_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in CONFIGS.values())


def _result(path: Path) -> Path | None:
    """The folder of RUN/NAME, where NAME is a result of a finished run: seed-0, soup, a policy; None without a RUN."""
    if not (path.parent / "recipe.yaml").is_file():
        return None
    kind, unit = unit_of(saved_recipe(path.parent / "recipe.yaml"), path.name)
    require(kind != "reward", f"MODEL: {path} is a reward model, which writes no answers; name a policy, seed or soup")
    return finished_results(path.parent)[unit]


def _model(name: str, given: str, folder: Path, base: str | None) -> Contestant:
    """A model or adapter in a folder. Raises SalsaError for a run's folder and for what writes no answers."""
    require(
        not (folder / "recipe.yaml").is_file() or _is_model(folder),
        f"MODEL: {given} is the folder of a whole run; name one of its models, such as {given.rstrip('/')}/soup",
    )
    inside = [path.parent for path in folder.glob("*/manifest.json")]  # runs/NAME/ppo/salsa, with one finished result
    folder = inside[0] if len(inside) == 1 else folder
    kind, unit = kind_of([folder]), (read_manifest(folder) or {}).get("unit", "")
    name = name or unit.rsplit("/", 1)[-1] or given.rstrip("/.").rsplit("/", 1)[-1]
    config = read_json(folder / CONFIGS[kind])
    require(isinstance(config, dict), f"{folder / CONFIGS[kind]}: does not hold a JSON object; save the model again")
    if kind != ADAPTERS:
        require(
            not str((config.get("architectures") or [""])[0]).endswith(SEQUENCE_CLASSIFIER),
            f"MODEL: {given} is a classifier, which writes no answers; name a causal language model",
        )
        return Contestant(name, given, model=str(folder) if Path(given).exists() else given, folder=folder)
    _check_adapter(config, given)
    adapter = folder if (folder / WEIGHTS).is_file() else local_folder(given)
    return Contestant(name, given, None, *base_of_adapter(adapter, given, base), adapter)


def _check_adapter(config: dict[str, Any], given: str) -> None:
    """Raise SalsaError for an adapter that is not LoRA, or one of a classifier."""
    kind, task = config.get("peft_type"), config.get("task_type")
    require(kind == "LORA", f"MODEL: {given} is an adapter of type {kind}; use a LoRA adapter")
    require(
        task != "SEQ_CLS",
        f"MODEL: {given} is the adapter of a classifier (task_type SEQ_CLS), which writes no answers; name an adapter of"
        " a causal language model",
    )


def base_of_adapter(adapter: Path, given: str, base: str | None) -> tuple[str, str | None, Path]:
    """Folder or Hub id of an adapter's base, its revision, and its local folder, for now without a Hub model's weights.

    given: the adapter's path or Hub id, for messages. base: the base to use. None: the one that the adapter names.
    """
    config = {"revision": None, "base_model_name_or_path": None, **read_json(adapter / CONFIGS[ADAPTERS])}
    near = local_base(config, adapter) if base is None else None
    of, revision = (near, None) if near is not None else base_of(config, adapter, base)
    name = str(of)
    path = Path(name).expanduser()
    if not path.is_dir():
        require(
            HUB_ID.match(name) is not None and not path.exists(),
            f"MODEL: {given} is an adapter on {name}, which does not exist; give its base with --base",
        )
        try:
            return name, revision, local_folder(name, patterns=WITHOUT_WEIGHTS, revision=revision)
        except SalsaError as error:
            raise SalsaError(
                f"MODEL: {given} is an adapter on {name}: {error}, or give its base with --base"
            ) from error
    require((path / "config.json").is_file(), f"--base: {name} has no config.json; give the base of {given}")
    return name, None, path
