"""What must fit together in a recipe beyond its types: names, positions, batches, and what it names on this machine.

Every refusal is a SalsaError `key: found …, expected …`; config/load.py puts the file in front. What the Hub holds is
looked at before the first stage, not here. Imports no torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from salsa_peft.config import judge, sweeps
from salsa_peft.config.fields import MAX_POLICIES, NAME, SEED
from salsa_peft.config.job import unit_of
from salsa_peft.config.options.trl import ALGORITHMS, PREFERENCE_ALGORITHMS
from salsa_peft.config.paths import check_files, check_path, is_local
from salsa_peft.config.references import Reference, parse_reference
from salsa_peft.config.rewards import (
    RewardPart,
    check_classifier_folder,
    check_columns,
    check_function,
    check_signature,
)
from salsa_peft.config.schema import Policy, Recipe
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import short

TOY_PROMPTS = ("in", "out")


def check(recipe: Recipe) -> None:
    """Everything that types don't say. Raises SalsaError `key: found …, expected …`."""
    require(NAME.match(recipe.name) is not None, f"name: found {short(recipe.name)}, {NAME_RULE}")
    seeds = recipe.sft.seeds
    require(len(set(seeds)) == len(seeds), f"sft.seeds: found {short(seeds)}, expected no seed twice")
    recipe.sft.check("sft", recipe.num_processes)
    _check_taken(recipe)
    recipe.reward.check("reward", recipe.num_processes)
    _check_reward(recipe)
    recipe.ppo.check("ppo", recipe.num_processes)
    for algorithm in ALGORITHMS:
        getattr(recipe, algorithm).check(algorithm)
    recipe.soup.check("soup", len(seeds))
    require(
        len(set(recipe.reward.seeds)) == len(recipe.reward.seeds),
        f"reward.seeds: found {short(recipe.reward.seeds)}, expected no seed twice",
    )
    _check_lengths(recipe)
    require(
        len(recipe.policies) <= MAX_POLICIES,
        f"policies: found {len(recipe.policies)} of them, expected at most {MAX_POLICIES}; take fewer",
    )
    for name, policy in recipe.policies.items():
        _check_name("policies", name)
        taken = name in ("base", "soup", "reward") or SEED.match(name)
        require(not taken, f"policies.{name}: found a name that means something else, expected another one")
        references = policy.references(f"policies.{name}")
        for reference in references:
            _check_reference(f"policies.{name}.reference", reference, recipe)
        _check_algorithm(f"policies.{name}", policy, len(references), recipe)
    _check_landscape(recipe)
    _check_prompt_set(recipe, "ppo.eval_prompts", recipe.ppo.eval_prompts)
    _check_evaluate(recipe)
    _check_hub(recipe)
    _check_present(recipe)
    check_files(recipe)
    _check_mode(recipe)
    _check_sharded(recipe)


def _check_taken(recipe: Recipe) -> None:
    """Seeds that are taken from somewhere: one for each position, weights of the mode's kind."""
    given, seeds = recipe.sft.from_, recipe.sft.seeds
    if given is None:
        return
    require(
        len(given) == len(seeds),
        f"sft.from: found {len(given)} seeds, and {len(seeds)} in sft.seeds, expected one for each",
    )
    for index, path in enumerate(given):
        if path is not None:
            _check_weights(f"sft.from[{index}]", path, recipe)


def _check_weights(where: str, path: str, recipe: Recipe) -> None:
    """A folder's files, or the form of a Hub id."""
    adapters = recipe.adapter is not None
    what = "a LoRA adapter" if adapters else "a checkpoint"
    require("/" in path, f"{where}: found {short(path)}, expected {what}'s folder or Hub id (namespace/name)")
    if is_local(path) and Path(path).is_dir():
        _check_kind(where, Path(path), adapters)
    for file in ("adapter_config.json", "adapter_model.safetensors") if adapters else ("config.json",):
        check_path(where, path, what, file)


def _check_kind(where: str, folder: Path, adapters: bool) -> None:
    """An adapter with --lora, a checkpoint without. A folder of axolotl's holds the base's config.json beside an adapter."""
    pickled = (folder / "adapter_model.bin").is_file() and not (folder / "adapter_model.safetensors").is_file()
    require(
        not pickled,
        f"{where}: {folder} holds adapter_model.bin, a pickle, which is never read. Load it with PEFT and save it again (save_pretrained"
        " writes adapter_model.safetensors)",
    )
    adapter, model = (folder / "adapter_config.json").is_file(), (folder / "config.json").is_file()
    require(
        adapter or not model or not adapters,
        f"{where}: {folder} is a full checkpoint, and this run uses LoRA adapters. Run it without --lora (every seed and reference is then a"
        " checkpoint), or name an adapter",
    )
    require(
        not adapter or adapters,
        f"{where}: {folder} is a LoRA adapter, and this run uses full weights. Add --lora, or merge it first: `salsa soup MERGED {folder.name}"
        " --merge --base BASE`",
    )


def _check_algorithm(where: str, policy: Policy, references: int, recipe: Recipe) -> None:
    """What TRL's trainers have no place for."""
    algorithm, moving = policy.algorithm, any(one.sync_every is not None for one in policy.references(where))
    require(
        not moving or not recipe.sharded,
        f"{where}.reference: found sync_every with accelerate {recipe.accelerate}, which cuts weights in pieces, expected none",
    )
    if algorithm == "ppo":
        return
    require(
        not moving or recipe.adapter is not None,
        f"{where}.reference: found sync_every with {algorithm} and full weights, expected ppo, or adapters (add --lora)",
    )
    require(
        policy.kl_coef != 0,
        f"{where}.kl_coef: found 0 for {algorithm}, whose trainer then looks at no reference, expected more than 0",
    )
    require(
        references == 1 or algorithm != "grpo",
        f"{where}.reference: found {references} of them for grpo, whose KL estimator k3 of a mean is not the mean of k3, expected one, such as"
        " soup",
    )
    require(
        algorithm in PREFERENCE_ALGORITHMS or recipe.generation.min_new_tokens == 0,
        f"generation.min_new_tokens: found {recipe.generation.min_new_tokens} with a policy by {algorithm}, expected 0: TRL scores responses"
        " as if EOS had been allowed",
    )


def _check_mode(recipe: Recipe) -> None:
    """What adapters alone have, or full weights alone."""
    if recipe.adapter is not None:
        for key, given, unused, why in (
            ("offload", recipe.offload, "none", "references share the base, nothing waits"),
            ("precision", recipe.precision, "auto", "it is for full weights, adapters train in float32"),
        ):
            require(
                given == unused,
                f"{key}: found {given} with adapters, expected {unused}: {why}; `lora: {{{key}: {unused}}}` in the recipe, or --set"
                f" {key}={unused}, takes it back",
            )
        return
    for key, found, idle in (
        ("model.quantization", recipe.model.quantization, None),
        ("soup.rank", recipe.soup.rank, None),
        ("ppo.value", recipe.ppo.value, "head"),
    ):
        require(
            found == idle,
            f"{key}: found {found} with full weights, expected {idle or 'none'}: it is for adapters; add --lora",
        )


def _check_sharded(recipe: Recipe) -> None:
    """What needs every process to hold what is trained whole."""
    ppo, seeds = recipe.ppo, recipe.reward.seeds
    optims = {f"{name}.optim": getattr(recipe, name).optim for name in ("sft", "reward", "ppo", *ALGORITHMS)}
    for key, found, fits, expected in (
        ("model.quantization", recipe.model.quantization, recipe.model.quantization is None, "none"),
        ("precision", recipe.precision, recipe.precision != "stochastic", "master"),
        ("reward.seeds", short(seeds), len(seeds) == 1 or not recipe.reward.trained, "one seed"),
        ("ppo.rollout_backend", ppo.rollout_backend, ppo.rollout_backend == "hf", "hf"),
        ("ppo.rollout_compile", str(ppo.rollout_compile).lower(), not ppo.rollout_compile, "false"),
        *((key, optim, not optim.startswith("paged"), "adamw_torch_fused") for key, optim in optims.items()),
    ):
        require(
            fits or not recipe.sharded,
            f"{key}: found {found} with accelerate {recipe.accelerate}, which cuts weights in pieces, expected {expected}; or set"
            " accelerate=ddp",
        )


NAME_RULE = "expected letters, digits, dots, - and _, starting with a letter or digit, at most 64"


def _check_name(where: str, name: str) -> None:
    require(NAME.match(name) is not None, f"{where}: found the name {short(name)}, {NAME_RULE}")


def _check_lengths(recipe: Recipe) -> None:
    sampling, limit = recipe.generation, recipe.model.max_length
    require(
        sampling.max_new_tokens < limit,
        f"generation.max_new_tokens: found {sampling.max_new_tokens}, expected fewer than model.max_length {limit}, which"
        " holds prompt and response",
    )
    require(
        sampling.min_new_tokens <= sampling.max_new_tokens,
        f"generation.min_new_tokens: found {sampling.min_new_tokens}, expected at most max_new_tokens {sampling.max_new_tokens}",
    )
    prompt = recipe.ppo.max_prompt_length
    require(
        prompt is None or prompt + sampling.max_new_tokens <= limit,
        f"ppo.max_prompt_length: found {prompt}, expected at most {limit - sampling.max_new_tokens}: model.max_length {limit}"
        f" less generation.max_new_tokens {sampling.max_new_tokens}",
    )


def _check_reference(where: str, reference: Reference, recipe: Recipe) -> None:
    seeds, adapters = len(recipe.sft.seeds), recipe.adapter is not None
    what = "a LoRA adapter" if adapters else "a checkpoint"
    for member in reference.members:
        require(
            member < seeds, f"{where}: found seed-{member}, expected seed-0 to seed-{seeds - 1}: positions in sft.seeds"
        )
    if reference.path is not None:
        near = difflib.get_close_matches(reference.path, ["base", "soup", *(f"seed-{n}" for n in range(seeds))], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        require(
            "/" in reference.path,
            f"{where}: found {short(reference.path)}, expected seed-N, base, soup, {{soup: …}}, {{shrunk: …}}, or {what}'s"
            f" folder or Hub id (namespace/name){hint}",
        )
        _check_weights(where, reference.path, recipe)


def _check_reward(recipe: Recipe) -> None:
    """Functions' modules and classifiers' folders are there; the critic has the reward adapter that it starts from."""
    for part in recipe.reward.parts:
        if part.kind == "function":
            check_function("reward.model", part.value)
            check_signature("reward.model", part.value)
            if recipe.data.prompts is None and recipe.toy is not None:
                check_columns("reward.model", part.value, ["prompt"], "the embedded world's prompts")
        elif part.kind == "classifier":
            _check_classifier(part, recipe)
    require(
        recipe.ppo.value == "head" or recipe.reward.trained,
        "ppo.value: found adapter, which starts from the reward adapter, but reward.model trains none; expected head, or adapter"
        " among reward.model",
    )


def _check_classifier(part: RewardPart, recipe: Recipe) -> None:
    near = difflib.get_close_matches(part.value, ["adapter"], 1)
    require(
        "/" in part.value,
        f"reward.model: found {short(part.value)}, expected adapter, module:name (a function), or a reward adapter's or a sequence classifier's folder or"
        f" Hub id (namespace/name){'; did you mean adapter?' if near else ''}",
    )
    if is_local(part.value) and (Path(part.value) / "adapter_config.json").is_file():
        require(
            recipe.adapter is not None,
            f"reward.model: found {short(Path(part.value).name)}, an adapter, with full weights, expected a sequence classifier; or add --lora",
        )
        check_path("reward.model", part.value, "a reward adapter", "adapter_model.safetensors")
        return
    check_path("reward.model", part.value, "a sequence classifier", "config.json")
    if is_local(part.value):
        check_classifier_folder("reward.model", part.value)


def _check_landscape(recipe: Recipe) -> None:
    if (landscape := recipe.landscape) is None:
        return
    seeds = len(recipe.sft.seeds)
    for key, found, count in (("line", landscape.line, 2), ("plane", landscape.plane, 3)):
        fits = found is None or (
            len(found) == len(set(found)) == count and all(0 <= position < seeds for position in found)
        )
        require(
            fits,
            f"landscape.{key}: found {short(found)}, expected {count} different positions 0 to {seeds - 1} of sft.seeds",
        )
    _check_prompt_set(recipe, "landscape.prompts", landscape.prompts)


def _check_prompt_set(recipe: Recipe, where: str, name: str | None) -> None:
    sets = _prompt_sets(recipe)
    fits = name is None or name in sets
    require(fits, f"{where}: found {short(name)}, expected one of evaluate.prompts: {', '.join(sets)}")


def _prompt_sets(recipe: Recipe) -> list[str]:
    return list(recipe.evaluate.prompts) or (list(TOY_PROMPTS) if recipe.toy else [])


def _check_evaluate(recipe: Recipe) -> None:
    for name in recipe.evaluate.prompts:
        _check_name("evaluate.prompts", name)
    for index, model in enumerate(recipe.evaluate.models):
        known = model in recipe.policies
        for reference in [] if known else parse_reference(f"evaluate.models[{index}]", model):
            _check_reference(f"evaluate.models[{index}]", reference, recipe)
    answering = list(dict.fromkeys(["seed-0", "soup", *recipe.policies, *recipe.evaluate.models]))
    sweeps.check_search(recipe, answering, _prompt_sets(recipe))
    models = [*answering, *sweeps.candidates(recipe)]
    if recipe.evaluate.judge is not None:
        judge.check(recipe.evaluate.judge, "evaluate.judge")
    for index, pair in enumerate(recipe.evaluate.pairs):
        where = f"evaluate.pairs[{index}]"
        require(len(pair) == 2 and pair[0] != pair[1], f"{where}: found {short(pair)}, expected two different names")
        for name in pair:
            close = difflib.get_close_matches(name, models, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            require(name in models, f"{where}: found {short(name)}, expected one of {', '.join(models)}{hint}")


def _check_hub(recipe: Recipe) -> None:
    """Results that there will be, and a base that others can load."""
    section = recipe.hub
    section.check("hub")
    for name in section.push:
        try:
            unit_of(recipe, name)
        except SalsaError as error:
            raise SalsaError(f"hub.push: {error}") from error
    base = recipe.model.base
    require(
        not section.push or section.base_model is not None or (base is not None and not is_local(base)),
        f"hub.base_model: found none, and the base is {'the embedded world' if base is None else 'a folder'} of this machine, expected its id on"
        " the Hub, namespace/name",
    )


def _check_present(recipe: Recipe) -> None:
    """Without the embedded world, base, template and data must be named."""
    algorithms = {policy.algorithm for policy in recipe.policies.values()}
    given: dict[str, object] = {
        "model.base": recipe.model.base,
        "model.chat_template": recipe.model.chat_template,
        "data.demonstrations": recipe.data.demonstrations or None not in (recipe.sft.from_ or [None]),
        "data.preferences": recipe.data.preferences
        or not (recipe.reward.trained or {*PREFERENCE_ALGORITHMS} & algorithms),
        "data.prompts": recipe.data.prompts
        or not (algorithms - {*PREFERENCE_ALGORITHMS} or recipe.soup.measure_source == "prompts"),
        "data.held_out": recipe.data.held_out or recipe.soup.measure_source != "held_out",
        "evaluate.prompts": recipe.evaluate.prompts,
    }
    for key, value in given.items():
        require(
            bool(value) or recipe.toy is not None,
            f"{key}: found nothing, expected a value (or a `toy` section, the embedded world)",
        )
