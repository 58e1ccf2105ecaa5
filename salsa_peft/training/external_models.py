"""Checks of external seeds, references and reward models, which run before the first stage.

The models may be local folders or Hub ids, written by PEFT, unsloth, axolotl, LLaMA-Factory or TRL. The checks read
adapter_config.json or config.json and the headers of the weights. This module does not import torch.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config.fields import SEED as SEED_NAME
from salsa_peft.config.paths import is_local
from salsa_peft.config.references import parse_reference
from salsa_peft.config.rewards import check_classifier_folder
from salsa_peft.config.schema import Recipe
from salsa_peft.models.adapters.bases import SIZES, require_same_family
from salsa_peft.models.adapters.names import MERGE, PREFIX, SCORE, VALUE_HEAD, VALUE_WEIGHT, plain_names, trained_module
from salsa_peft.models.architectures.checks import EXPERTS, OUTPUT, needs_logprobs, require_targets
from salsa_peft.models.architectures.sizes import config_of_base
from salsa_peft.soup.checkpoints.read import FLOATS, Checkpoint, read_checkpoint, read_mapping, text_part
from salsa_peft.soup.lora.read import CONFIG, KEEPS_BASE, PICKLED, WEIGHTS
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import base_fingerprint, sha256
from salsa_peft.utils.hub import cached_folder, local_folder
from salsa_peft.utils.messages import short
from salsa_peft.utils.safetensors_io import SafetensorsFile

SEED, REFERENCE, REWARD = "seed", "reference", "reward"
FACTOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<half>A|B)\.weight")
SAME = ("model_type", *SIZES, "vocab_size")
"""Keys of config.json that must be equal in a checkpoint and in the recipe's base, if both have them."""


class ExternalModel(NamedTuple):
    """A model that a recipe names by its folder or Hub id."""

    where: str
    """The recipe's key, such as `sft.from[0]`."""
    path: str
    role: str


def external_models(recipe: Recipe) -> Iterator[ExternalModel]:
    """All external adapters and models that the recipe names."""
    for index, path in enumerate(recipe.sft.from_ or []):
        if path is not None:
            yield ExternalModel(f"sft.from[{index}]", path, SEED)
    named = [(f"policies.{name}.reference", policy.reference) for name, policy in recipe.policies.items()]
    named += [(f"policies.{name}.start", policy.start) for name, policy in recipe.policies.items()]
    named += [(f"evaluate.models[{index}]", model) for index, model in enumerate(recipe.evaluate.models)]
    named += [(f"evaluate.controls.{name}", control) for name, control in recipe.evaluate.controls.items()]
    for where, value in named:
        for reference in parse_reference(where, value):
            yield from (ExternalModel(where, path, REFERENCE) for path in reference.paths)
    for name in recipe.landscape.names if recipe.landscape is not None else ():
        if "/" in name:
            yield ExternalModel("landscape", name, REFERENCE)
    soups = {"soup": recipe.soup, **{f"soups.{name}": section for name, section in recipe.soups.items()}}
    for where, section in soups.items():
        yield from (
            ExternalModel(f"{where}.{'members' if name in section.names else 'start'}", name, REFERENCE)
            for name in section.reads
            if "/" in name
        )
    for part in recipe.reward.parts:
        if part.kind == "classifier":
            yield ExternalModel("reward.model", part.value, REWARD)


def hub_models(recipe: Recipe) -> list[str]:
    """The Hub ids of all models that the recipe names, but for its base."""
    judge = recipe.evaluate.judge
    named = [one.path for one in external_models(recipe)]
    named += [str(judge.model)] if judge is not None and judge.kind == "local" else []
    return [name for name in dict.fromkeys(named) if not is_local(name)]


def check(recipe: Recipe, stages: Collection[str], hub: bool = False) -> None:
    """Raise SalsaError for the first external model that the run cannot use.

    By default the models in local folders are checked; with `hub`, only the models with Hub ids that `stages` read.
    """
    found = [
        one for one in external_models(recipe) if is_local(one.path) != hub and (not hub or _read_by(one.role, stages))
    ]
    trains = recipe.adapter is not None and recipe.adapter.target_modules != "all-linear"
    base = base_of(recipe) if found or trains else None
    if base is not None and recipe.adapter is not None and _plain(base):
        require_targets(recipe.adapter.target_modules, [name.removesuffix(".weight") for name in base.tensors])
    folders: list[tuple[str, Path]] = []
    for where, path, role in found:
        folder = Path(path) if is_local(path) else _downloaded(recipe, where, path)
        if role == REWARD and not (folder / CONFIG).is_file():
            if not is_local(path):  # a local classifier was checked when the recipe was read
                check_classifier_folder(where, str(folder))
        elif recipe.adapter is not None:
            check_adapter(where, folder, role, base, head=needs_logprobs(recipe))
            check_family(recipe, folder, where)
            folders.append((where, folder))
        elif is_local(path):
            check_checkpoint(where, folder, base)
        else:
            require((folder / "config.json").is_file(), f"{where}: {path} has no config.json. Use a checkpoint")
    if recipe.adapter is not None:
        _check_parameters(folders)
        _check_soup(recipe)
    if not hub:
        _note_same(recipe)


def check_base_available(recipe: Recipe) -> None:
    """Raise SalsaError if HF_HUB_OFFLINE is set and the base is neither local nor in the Hub's cache."""
    from huggingface_hub import constants

    base = recipe.model.base
    if base is not None and not is_local(base) and constants.HF_HUB_OFFLINE:
        require(
            cached_folder(base, recipe.model.revision) is not None,
            f"model.base: {base} is not in the Hub's cache, and HF_HUB_OFFLINE is set. Download it while online"
            f" (`hf download {base}`), or use a local folder",
        )


def _check_parameters(adapters: list[tuple[str, Path]]) -> None:
    """Raise SalsaError if target_parameters differ: PEFT cannot attach such adapters to one base."""
    named = [(where, folder, read_mapping(folder / CONFIG).get("target_parameters")) for where, folder in adapters]
    found = [(f"{where}: {folder}", sorted(set(names))) for where, folder, names in named if names]
    for adapter, names in found:
        require(
            names == found[0][1],
            f"{adapter} has target_parameters {', '.join(names)}, and {found[0][0]} has {', '.join(found[0][1])}. PEFT"
            " needs them to be the same in all adapters of one base; use adapters with the same target_parameters",
        )


def _note_same(recipe: Recipe) -> None:
    """Print a message for seeds that have the same weights, because averaging them changes nothing."""
    seen: dict[str, int] = {}
    for index, path in enumerate(recipe.sft.from_ or []):
        if path is None:
            continue
        weights = Path(path) / WEIGHTS
        local = is_local(path) and Path(path).is_dir()
        same = sha256(weights) if local and weights.is_file() else base_fingerprint(path) if local else path
        if same in seen:
            say(f"sft.from: seeds {seen[same]} and {index} have the same weights ({path}); averaging changes nothing")
        seen.setdefault(same, index)


def check_family(recipe: Recipe, folder: Path, where: str) -> None:
    """Raise SalsaError if the architectures of the adapter and the recipe's base are known and differ."""
    base = recipe.model.base
    config = None if base is None else config_of_base(base, recipe.model.revision)
    if config is not None:
        require_same_family(folder, config, f"the recipe's base {base}", where)


def _read_by(role: str, stages: Collection[str]) -> bool:
    """Whether one of `stages` reads models of `role`: sft reads seeds; later stages read the other roles."""
    return (
        "sft" in stages if role == SEED else bool(set(stages) - {"toy", "synthetic", "data", "sft", "reward", "soup"})
    )


def _downloaded(recipe: Recipe, where: str, path: str) -> Path:
    """Download an adapter, or a checkpoint without its weights, to the Hub's cache. Returns the folder."""
    weights = [WEIGHTS] if recipe.adapter is not None else []
    try:
        return local_folder(path, patterns=["*.json", "*.jinja", *weights])
    except SalsaError as error:
        raise SalsaError(f"{where}: {error}") from error


def base_of(recipe: Recipe) -> Checkpoint | None:
    """The headers of the recipe's base; None if its files are not local or cached, or cannot be read."""
    base = recipe.model.base
    if base is None:
        return None
    folder = Path(base) if is_local(base) else cached_folder(base, recipe.model.revision)
    if folder is None:
        return None
    try:
        return read_checkpoint(folder)
    except SalsaError:
        return None  # the plan and the stages report errors of the base


def check_adapter(where: str, folder: Path, role: str, base: Checkpoint | None, head: bool = True) -> None:
    """Raise SalsaError unless the folder holds a LoRA adapter that fits the base and does not change it.

    head: whether log-probabilities are computed with the base's output embeddings, as in PPO. Seeds and references must
    then have no LoRA on the output embeddings.
    """
    config = read_mapping(folder / CONFIG)
    _check_config(f"{where}: {folder}", config, role)
    pickled = f"{PICKLED}, a pickle, which is never read; save the adapter again" if (folder / PICKLED).exists() else ""
    require(
        (folder / WEIGHTS).is_file(),
        f"{where}: {folder} has {pickled or f'no {WEIGHTS}; save the adapter'} with PEFT's save_pretrained"
        " (safetensors)",
    )
    file = SafetensorsFile(folder / WEIGHTS)
    names = plain_names(file.entries, {"auto_mapping": config.get("auto_mapping")}, file.path)
    heads = [name for name in names if SCORE.fullmatch(name)]
    if head and role != REWARD:
        _check_output(f"{where}: {folder}", names, bool(config.get("ensure_weight_tying")))
    for name, key in names.items():
        if ".lora_" not in name and name not in heads:
            require(base is None or same_as_base(file, name, key, base), trained_module(f"{where}: {folder}", name))
    if role == REWARD:
        _check_heads(f"{where}: {folder}", folder, [file.entries[names[name]].shape for name in heads])
    require(
        role != SEED or not heads or config.get("task_type") != "SEQ_CLS",
        f"{where}: {folder} is a reward adapter (it has {', '.join(heads)}), and a seed must be an adapter of a"
        " language model. Set `reward:` to this adapter, and give another seed",
    )
    if base is not None:
        _check_shapes(f"{where}: {folder}", {name: file.entries[key].shape for name, key in names.items()}, base)


def _check_output(what: str, names: Iterable[str], tied: bool) -> None:
    """Raise SalsaError if an adapter has LoRA on the output embeddings. tied: its ensure_weight_tying."""
    modules = (name.removeprefix(PREFIX).partition(".lora_")[0] for name in names if ".lora_" in name)
    odd = next((name for name in modules if name.rpartition(".")[2] in OUTPUT), None)
    why = " (put there by ensure_weight_tying)" if tied else ""
    require(
        odd is None,
        f"{what} has LoRA on {odd}, the output embeddings{why}, but PPO computes log-probabilities with the"
        f" base's output embeddings; {MERGE}",
    )


def _check_soup(recipe: Recipe) -> None:
    """Raise SalsaError if the soup would combine lora_bias with LoRA on embeddings, which PEFT cannot."""
    given = recipe.sft.from_ or []
    biased, odd = None, None
    for place in (int(seed[1]) for name in recipe.soup.names if (seed := SEED_NAME.match(name))):
        path = given[place] if place < len(given) else None
        if path is None or not is_local(path) or not (Path(path) / WEIGHTS).is_file():
            continue
        config = read_mapping(Path(path) / CONFIG)
        biased = biased or (path if config.get("lora_bias") else None)
        special = any(".lora_embedding_" in name for name in SafetensorsFile(Path(path) / WEIGHTS).entries)
        odd = odd or (path if special or config.get("target_parameters") else None)
    require(
        len(recipe.soup.members) == 1 or biased is None or odd is None,
        f"sft.from: {biased} has lora_bias, and {odd} has LoRA on embeddings or parameters. No PEFT adapter can hold"
        " both, so they cannot be averaged. Leave one of them out of soup.members, or merge each into its base (`salsa"
        " soup OUT ADAPTER --merge --base BASE`) and run with full weights (without --lora)",
    )


def _check_config(what: str, config: dict[str, Any], role: str) -> None:
    """Raise SalsaError for an adapter that is not LoRA, changes the base, or cannot be averaged."""
    tuner = config.get("peft_type")
    require(
        tuner == "LORA",
        f"{what} has peft_type {tuner}. Use a LoRA adapter, or run without --lora on a checkpoint of full weights",
    )
    initial = config.get("init_lora_weights")
    require(
        not isinstance(initial, str) or initial in KEEPS_BASE,
        f"{what} has init_lora_weights {initial!r}, which changed the base's weights in training. Convert it to a"
        " plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)",
    )
    for name in ("bias", "trainable_token_indices", "layer_replication"):
        value = config.get(name)
        require(
            not value or (name == "bias" and value == "none"),
            f"{what} has {name}: {short(value)}, which changes the base that all roles share; {MERGE}",
        )
    dora = config.get("use_dora") if role == SEED else None
    require(not dora, f"{what} has use_dora: {dora}, and the average of DoRA adapters is not an adapter; {MERGE}")


def _check_heads(what: str, folder: Path, heads: list[tuple[int, ...]]) -> None:
    """Raise SalsaError unless a reward adapter has one score head with one label. heads: shapes of heads."""
    if not heads and (folder / VALUE_HEAD).is_file():
        require(
            VALUE_WEIGHT in SafetensorsFile(folder / VALUE_HEAD).entries,
            f"{what} has {VALUE_HEAD} without {VALUE_WEIGHT}, so it is PPO's value head, which cannot score responses."
            " Use a reward adapter",
        )
        return
    require(
        len(heads) == 1,
        f"{what} must have one score head, but has {len(heads)}. Train a reward adapter with task_type SEQ_CLS, as"
        " TRL's RewardTrainer does",
    )
    labels = heads[0][0]
    require(
        labels == 1,
        f"{what} has a score head with {labels} labels, but a reward is one number. Train an adapter with one label, or"
        " write a function that turns the labels into one score (reward: module:name)",
    )


def same_as_base(file: SafetensorsFile, name: str, key: str, base: Checkpoint) -> bool:
    """Whether a tensor in an adapter's file equals the base's tensor, converted to the dtype of the file.

    name: the tensor's name in the model, with PEFT's prefix. key: the tensor's name in the file.
    """
    import numpy as np

    from salsa_peft.soup import arrays

    own = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    if own == "lm_head.weight" and own not in base.tensors:  # tied
        own = next((known for known in base.tensors if known.endswith("embed_tokens.weight")), own)
    place, entry = base.tensors.get(own), file.entries[key]
    known = place is not None and place.entry.dtype in FLOATS and entry.dtype in FLOATS
    if place is None or not known or place.entry.shape != entry.shape:
        return False
    rounded = arrays.narrow(arrays.read(place.file, own), entry.dtype)
    return bool(np.array_equal(arrays.widen(rounded, entry.dtype), arrays.read(file, key)))


def _check_shapes(what: str, saved: dict[str, tuple[int, ...]], base: Checkpoint) -> None:
    """Raise SalsaError for LoRA factors whose names or shapes fit no module of the base."""
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in saved.items():
        if match := FACTOR.fullmatch(name):
            halves.setdefault(match["module"], {})[match["half"]] = shape
    modules = [module for module in halves if module != "lm_head"] if _plain(base) else []
    known = {name.removesuffix(".weight") for name in base.tensors}
    # the files of some bases omit the base model's prefix (gpt2, bloom)
    odd = [module for module in modules if not {module, module.partition(".")[2]} & known]
    require(
        not odd,
        f"{what} adapts {odd[0] if odd else ''}, and {base.folder} has no such module. If the adapter was trained on"
        " another base, set model.base to that base, or use another adapter. If its tensors do not have PEFT's names"
        f" ({PREFIX}MODULE.lora_A.weight), load it on the model that it was trained on, and save it with PEFT",
    )
    for module, shapes in halves.items():
        place = base.tensors.get(f"{module}.weight")
        if place is None or place.entry.dtype not in FLOATS or {len(shape) for shape in shapes.values()} != {2}:
            continue
        delta, weight = (shapes.get("B", (0,))[0], shapes.get("A", (0, 0))[1]), place.entry.shape
        require(
            delta in (weight, weight[::-1]),
            f"{what} adapts {module} with a delta of {delta[0]} × {delta[1]}, but in {base.folder} its weight is"
            f" {' × '.join(map(str, weight))}, so the adapter was trained on another base. Set model.base to that"
            " base, or use another adapter",
        )


def _plain(base: Checkpoint) -> bool:
    """Whether the base is neither multimodal nor a mixture of experts: tensors then have modules' names."""
    return not any(base.config.get(key) for key in (*EXPERTS, "text_config"))


def check_checkpoint(where: str, folder: Path, base: Checkpoint | None) -> None:
    """Raise SalsaError unless the folder holds float weights of the base's architecture and sizes."""
    found = read_checkpoint(folder)
    require(
        found.quantised is None,
        f"{where}: {folder} has quantised weights ({found.quantised}), which cannot be trained or averaged."
        " Dequantise it (model.dequantize(), then save_pretrained), or use adapters on it (--lora)",
    )
    if base is None:
        return
    own, known = ({**config, **text_part(config)} for config in (found.config, base.config))
    for name in SAME:
        resized = "the checkpoint's embeddings were resized; use a base with the added tokens"
        require(
            own.get(name) is None or known.get(name) is None or own[name] == known[name],
            f"{where}: {folder} has {name} {own.get(name)}, but the recipe's base has {known.get(name)}:"
            f" {resized if name == 'vocab_size' else 'the architectures differ'}. Set model.base to the model that the"
            " checkpoint was trained from",
        )
