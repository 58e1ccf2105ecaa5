"""Seeds, references and rewards that somebody else made, looked at before the first stage: what a run cannot use is refused then.

PEFT, unsloth, axolotl, LLaMA-Factory and TRL put other files beside the same weights. Read are adapter_config.json or config.json and the
headers of the weights, in folders on this machine and of Hub ids. Imports no torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config.paths import is_local
from salsa_peft.config.references import parse_reference
from salsa_peft.config.rewards import check_classifier_folder
from salsa_peft.config.schema import Recipe
from salsa_peft.models.adapters.bases import require_same_family
from salsa_peft.models.adapters.names import MERGE, PREFIX, SCORE, VALUE_HEAD, VALUE_WEIGHT, plain_names, trained_module
from salsa_peft.models.architectures.checks import EXPERTS, OUTPUT, needs_logprobs, require_targets
from salsa_peft.models.architectures.sizes import config_of_base
from salsa_peft.soup.checkpoints.read import FLOATS, Checkpoint, read_checkpoint, read_mapping, text_part
from salsa_peft.soup.lora.read import CONFIG, KEEPS_BASE, PICKLED, WEIGHTS
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import base_fingerprint, sha256
from salsa_peft.utils.hub import readable_hub_errors
from salsa_peft.utils.messages import short
from salsa_peft.utils.safetensors_io import SafetensorsFile

SEED, REFERENCE, REWARD = "seed", "reference", "reward"
FACTOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<half>A|B)\.weight")
SIZES = (
    "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads",
    "intermediate_size", "vocab_size", "num_local_experts", "num_experts",
)  # fmt: skip
"""Of a configuration: what two checkpoints of one architecture have alike."""


class ExternalModel(NamedTuple):
    """A folder or Hub id that a recipe names."""

    where: str
    """Its key."""
    path: str
    role: str


def external_models(recipe: Recipe) -> Iterator[ExternalModel]:
    """Everything that the recipe takes from elsewhere."""
    for index, path in enumerate(recipe.sft.from_ or []):
        if path is not None:
            yield ExternalModel(f"sft.from[{index}]", path, SEED)
    named = [(f"policies.{name}.reference", policy.reference) for name, policy in recipe.policies.items()]
    named += [
        (f"evaluate.models[{i}]", model)
        for i, model in enumerate(recipe.evaluate.models)
        if model not in recipe.policies
    ]
    for where, value in named:
        for reference in parse_reference(where, value):
            if reference.path is not None:
                yield ExternalModel(where, reference.path, REFERENCE)
    for part in recipe.reward.parts:
        if part.kind == "classifier":
            yield ExternalModel("reward.model", part.value, REWARD)


def check(recipe: Recipe, stages: Collection[str], hub: bool = False) -> None:
    """Raise SalsaError for the first folder that the run could not use, or with `hub` for the first Hub id that one of these stages reads."""
    found = [
        one for one in external_models(recipe) if is_local(one.path) != hub and (not hub or _read_by(one.role, stages))
    ]
    trains = recipe.adapter is not None and recipe.adapter.target_modules != "all-linear"
    base = base_of(recipe) if found or trains else None
    if base is not None and recipe.adapter is not None and _plain(base):
        require_targets(recipe.adapter.target_modules, [name.removesuffix(".weight") for name in base.tensors])
    folders: list[tuple[str, Path]] = []
    for where, path, role in found:
        folder = Path(path) if is_local(path) else _fetched(recipe, where, path)
        if role == REWARD and not (folder / CONFIG).is_file():
            if not is_local(path):  # a classifier's folder was looked at when the recipe was read
                check_classifier_folder(where, str(folder))
        elif recipe.adapter is not None:
            check_adapter(where, folder, role, base, head=needs_logprobs(recipe))
            check_family(recipe, folder, where)
            folders.append((where, folder))
        elif is_local(path):
            check_checkpoint(where, folder, base)
        else:
            require((folder / "config.json").is_file(), f"{where}: {path} has no config.json; name a checkpoint")
    if recipe.adapter is not None:
        _check_parameters(folders)
        _check_soup(recipe)
    if not hub:
        _note_same(recipe)


def check_base_available(recipe: Recipe) -> None:
    """Raise SalsaError for a base that is no folder and not in the Hub's cache, while the Hub is not to be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants, try_to_load_from_cache

    base = recipe.model.base
    if base is not None and not is_local(base) and constants.HF_HUB_OFFLINE:
        require(
            isinstance(try_to_load_from_cache(base, "config.json", revision=recipe.model.revision), str),
            f"model.base: {base} is no folder here, as a Hub id it is not in the cache, and HF_HUB_OFFLINE is set. Fetch it while online"
            f" (`hf download {base}`), or name a folder",
        )


def _check_parameters(found: list[tuple[str, Path]]) -> None:
    """Raise SalsaError for adapters on other parameters (of experts), which PEFT can't hold side by side on one base."""
    first: tuple[str, Path, set[str]] | None = None
    for where, folder in found:
        own = read_mapping(folder / CONFIG).get("target_parameters") if (folder / CONFIG).is_file() else None
        if not own:
            continue
        first = first or (where, folder, set(own))
        require(
            set(own) == first[2],
            f"{where}: {folder} adapts the parameters {', '.join(sorted(own))}, and {first[0]}, {first[1]}, adapts"
            f" {', '.join(sorted(first[2]))}. PEFT holds adapters side by side only if they adapt the same parameters; train both with the same"
            " target_parameters",
        )


def _note_same(recipe: Recipe) -> None:
    """Say where two seeds are the same weights: a soup of them is no other model than each."""
    seen: dict[str, int] = {}
    for index, path in enumerate(recipe.sft.from_ or []):
        if path is None:
            continue
        weights = Path(path) / WEIGHTS
        local = is_local(path) and Path(path).is_dir()
        same = sha256(weights) if local and weights.is_file() else base_fingerprint(path) if local else path
        if same in seen:
            print(
                f"sft.from: seeds {seen[same]} and {index} have the same weights ({path}), so that they add nothing to each other in a soup",
                file=sys.stderr,
                flush=True,
            )
        seen.setdefault(same, index)


def check_family(recipe: Recipe, folder: Path, where: str) -> None:
    """Raise SalsaError for an adapter that was trained on another architecture than the recipe's base, as far as both are at hand."""
    base = recipe.model.base
    config = None if base is None else config_of_base(base, recipe.model.revision)
    if config is not None:
        require_same_family(folder, config, f"the recipe's base {base}", where)


def _read_by(role: str, stages: Collection[str]) -> bool:
    """Whether one of the stages reads what has this role: seeds are the first stage's, the rest the policies' and the evaluation's."""
    return "sft" in stages if role == SEED else bool(set(stages) - {"toy", "sft", "reward", "soup"})


def _fetched(recipe: Recipe, where: str, path: str) -> Path:
    """What can be looked at of a Hub id, in the Hub's cache: the adapter, or a checkpoint's files without its weights."""
    from huggingface_hub import snapshot_download

    weights = [WEIGHTS] if recipe.adapter is not None else []
    try:
        with readable_hub_errors(path):
            return Path(snapshot_download(path, allow_patterns=["*.json", "*.jinja", *weights]))
    except SalsaError as error:
        raise SalsaError(f"{where}: {error}") from error


def base_of(recipe: Recipe) -> Checkpoint | None:
    """The headers of the recipe's base, where its files are at hand."""
    base = recipe.model.base
    if base is None:
        return None
    folder = Path(base)
    if not is_local(base):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base, "config.json", revision=recipe.model.revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    try:
        return read_checkpoint(folder)
    except SalsaError:
        return None  # without it less is known here; what is wrong with a base, the plan and the stages say


def check_adapter(where: str, folder: Path, role: str, base: Checkpoint | None, head: bool = True) -> None:
    """Raise SalsaError unless the folder holds a LoRA adapter that can be switched on a base which all roles share.

    head: log-probabilities are read from the base's output embeddings (PPO), so that no policy or reference can have LoRA on them.
    """
    config = read_mapping(folder / CONFIG)
    _check_config(f"{where}: {folder}", config, role)
    require(
        (folder / WEIGHTS).is_file(),
        f"{where}: {folder} holds "
        + (
            f"{PICKLED}, a pickle, which is never read; load it"
            if (folder / PICKLED).exists()
            else f"no {WEIGHTS}; save it"
        )
        + " with PEFT and save_pretrained (safetensors)",
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
        f"{where}: {folder} is a reward adapter (it holds {', '.join(heads)}). Name it as `reward:`; a seed is an adapter of a language model",
    )
    if base is not None:
        _check_shapes(f"{where}: {folder}", {name: file.entries[key].shape for name, key in names.items()}, base)


def _check_output(what: str, names: Iterable[str], tied: bool) -> None:
    """Raise SalsaError for LoRA on the output embeddings; with `ensure_weight_tying` PEFT puts it there too where embeddings are tied."""
    modules = (name.removeprefix(PREFIX).partition(".lora_")[0] for name in names if ".lora_" in name)
    odd = next((name for name in modules if name.rpartition(".")[2] in OUTPUT), None)
    why = " (put there by ensure_weight_tying)" if tied else ""
    require(
        odd is None,
        f"{what} has LoRA on {odd}, the output embeddings{why}. PPO reads log-probabilities from the base's own; {MERGE}",
    )


def _check_soup(recipe: Recipe) -> None:
    """Raise SalsaError where the soup of taken seeds is no adapter that PEFT has: with lora_bias, and with LoRA on embeddings or parameters."""
    given = recipe.sft.from_ or []
    biased, odd = None, None
    for place in recipe.soup.members:
        path = given[place] if place < len(given) else None
        if path is None or not is_local(path) or not (Path(path) / WEIGHTS).is_file():
            continue
        config = read_mapping(Path(path) / CONFIG)
        biased = biased or (path if config.get("lora_bias") else None)
        special = any(".lora_embedding_" in name for name in SafetensorsFile(Path(path) / WEIGHTS).entries)
        odd = odd or (path if special or config.get("target_parameters") else None)
    require(
        len(recipe.soup.members) == 1 or biased is None or odd is None,
        f"sft.from: {biased} has lora_bias, and {odd} has LoRA on embeddings or parameters. PEFT has no adapter that holds both, and so none for"
        " their soup. Leave one of them out of soup.members, or merge each into its base (`salsa soup OUT ADAPTER --merge --base BASE`) and run"
        " with full weights (without --lora)",
    )


def _check_config(what: str, config: dict[str, Any], role: str) -> None:
    """What PEFT's configuration alone says."""
    tuner = config.get("peft_type")
    require(
        tuner == "LORA",
        f"{what} is a {tuner} adapter; only LoRA adapters can be used, or checkpoints with full weights, without --lora",
    )
    initial = config.get("init_lora_weights")
    require(
        not isinstance(initial, str) or initial in KEEPS_BASE,
        f"{what} has init_lora_weights {initial!r}, which changed the base's own weights when it was trained. Save it as a plain LoRA"
        " (PEFT's save_pretrained with path_initial_model_for_weight_conversion)",
    )
    bias = config.get("bias", "none")
    for name, value in (
        ("bias", None if bias == "none" else bias),
        ("trainable_token_indices", config.get("trainable_token_indices")),
        ("layer_replication", config.get("layer_replication")),
        ("use_dora", config.get("use_dora") if role == SEED else None),
    ):
        why = (
            "no mean of such adapters is an adapter"
            if name == "use_dora"
            else "that is part of the base, which all roles share here"
        )
        require(not value, f"{what} has {name}: {short(value)}, and {why}; {MERGE}")


def _check_heads(what: str, folder: Path, heads: list[tuple[int, ...]]) -> None:
    """A reward adapter has one score head of one label."""
    if not heads and (folder / VALUE_HEAD).is_file():
        require(
            VALUE_WEIGHT in SafetensorsFile(folder / VALUE_HEAD).entries,
            f"{what} holds {VALUE_HEAD} without {VALUE_WEIGHT}: it is the value head of PPO and scores no responses; name a reward adapter",
        )
        return
    require(
        len(heads) == 1,
        f"{what} is a LoRA adapter without a score head, so it scores nothing. A reward adapter is trained with task_type SEQ_CLS (TRL's"
        " RewardTrainer), which saves one",
    )
    labels = heads[0][0]
    require(
        labels == 1,
        f"{what} has a score head of {labels} labels, and a reward is one number. Train it with num_labels 1, or write a function that"
        " says what its labels are worth (reward: module:name)",
    )


def same_as_base(file: SafetensorsFile, name: str, key: str, base: Checkpoint) -> bool:
    """Whether a tensor (`key` in the file) that PEFT saved beside the factors (embeddings) is the base's own, in the dtype that it was saved in."""
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
    """Every pair of factors against the module of the base that has its name, where there is one."""
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in saved.items():
        if match := FACTOR.fullmatch(name):
            halves.setdefault(match["module"], {})[match["half"]] = shape
    odd = _without_module(list(halves), base) if _plain(base) else []
    require(
        not odd,
        f"{what} changes {odd[0] if odd else ''}, and {base.folder} has no such module: the adapter is of another architecture, or its tensors"
        f" are named otherwise than PEFT names them ({PREFIX}MODULE.lora_A.weight); save it with PEFT from the model that it was trained on",
    )
    for module, shapes in halves.items():
        place = base.tensors.get(f"{module}.weight")
        if place is None or place.entry.dtype not in FLOATS or {len(shape) for shape in shapes.values()} != {2}:
            continue
        delta, weight = (shapes.get("B", (0,))[0], shapes.get("A", (0, 0))[1]), place.entry.shape
        require(
            delta in (weight, weight[::-1]),
            f"{what} changes {module} by a matrix of {delta[0]} × {delta[1]}, and in {base.folder} it has {' × '.join(map(str, weight))}: it was"
            " trained on another base; set model.base to that one, or take another adapter",
        )


def _plain(base: Checkpoint) -> bool:
    """Whether the tensors in a base's files are called as the modules are: not of experts, nor of several models in one."""
    return not any(base.config.get(key) for key in (*EXPERTS, "text_config"))


def _without_module(modules: list[str], base: Checkpoint) -> list[str]:
    """Those that the base has no weights for; its files may leave out the base model's prefix (gpt2, bloom)."""
    known = {name.removesuffix(".weight") for name in base.tensors}
    return [module for module in modules if not {module, module.partition(".")[2]} & known and module != "lm_head"]


def check_checkpoint(where: str, folder: Path, base: Checkpoint | None) -> None:
    """Raise SalsaError unless the folder holds a checkpoint of plain weights that a model of the base's configuration can have."""
    found = read_checkpoint(folder)
    require(
        found.quantised is None,
        f"{where}: {folder} has quantised weights ({found.quantised}), and full weights are trained and averaged in floats; dequantise it"
        " (model.dequantize(), then save_pretrained), or use adapters on it (--lora)",
    )
    for name in SIZES if base is not None else ():
        configs = [found.config, {} if base is None else base.config]
        own, other = ({**config, **text_part(config)}.get(name) for config in configs)
        resized = ": its embeddings were resized; take a base that has the added tokens" if name == "vocab_size" else ""
        require(
            own is None or other is None or own == other,
            f"{where}: {folder} has {name} {own}, and the recipe's base has {other}{resized or ', so that it is another architecture'}; set model.base"
            " to the model that it was trained from",
        )
