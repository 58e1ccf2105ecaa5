"""Checks of a recipe across its sections: names, positions, batch sizes, modes, local files.

Each check raises a SalsaError that starts with the key; config/load.py adds the file. Hub repositories are checked
before the first stage, not here. Imports no torch.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from salsa_peft.config import sweeps
from salsa_peft.config.fields import MAX_POLICIES, SEED, require_unique
from salsa_peft.config.job import recipe_of_policy, unit_of
from salsa_peft.config.options.guards import parse_guards
from salsa_peft.config.options.rollout import MAX_RANKS, check_sampling
from salsa_peft.config.options.soup import named
from salsa_peft.config.options.toy import TOY_PROMPTS
from salsa_peft.config.options.trl import ALGORITHMS, PREFERENCE_ALGORITHMS
from salsa_peft.config.paths import check_files, check_path, is_local
from salsa_peft.config.policies.checks import (
    check_model,
    check_name,
    check_reference,
    check_result_name,
    check_soups,
    check_weights,
    suggestion,
)
from salsa_peft.config.policies.policy import Policy
from salsa_peft.config.references import Reference, parse_reference
from salsa_peft.config.rewards import (
    RewardPart,
    check_classifier_folder,
    check_columns,
    check_function,
    check_signature,
)
from salsa_peft.config.schema import Recipe
from salsa_peft.utils.errors import SalsaError, require, run_checks
from salsa_peft.utils.messages import short


def check(recipe: Recipe) -> None:
    """Raise SalsaError for all settings that contradict other settings or this machine's files."""
    sections = (recipe.sft, recipe.reward, recipe.ppo)
    run_checks((
        partial(check_name, "name", recipe.name),
        partial(require_unique, "sft.seeds", recipe.sft.seeds),
        *(partial(section.check, name, recipe.num_processes) for name, section in zip(TRAINED, sections, strict=True)),
        *(partial(getattr(recipe, algorithm).check, algorithm) for algorithm in ALGORITHMS),
        partial(require_unique, "reward.seeds", recipe.reward.seeds),
        partial(_check_prompt_set, recipe, "ppo.eval_prompts", recipe.ppo.eval_prompts),
        *(partial(check_one, recipe) for check_one in CHECKS),
    ))  # fmt: skip


def _check_policies(recipe: Recipe) -> None:
    require(
        len(recipe.policies) <= MAX_POLICIES,
        f"policies: {len(recipe.policies)} policies are more than {MAX_POLICIES}, the maximum; use fewer",
    )
    run_checks((
        *(partial(_check_policy, name, policy, recipe) for name, policy in recipe.policies.items()),
        *(partial(check_result_name, f"search.methods: {method}", method) for method in sweeps.candidates(recipe)),
    ))  # fmt: skip


def _check_policy(name: str, policy: Policy, recipe: Recipe) -> None:
    check_name("policies", name)
    check_result_name(f"policies.{name}", name)
    references = policy.references(f"policies.{name}")
    check_model(f"policies.{name}.start", policy.start, recipe)
    for reference in references:
        check_reference(f"policies.{name}.reference", reference, recipe)
    require(
        policy.kl_coef != 0 or policy.algorithm == "ppo",
        f"policies.{name}.kl_coef: must be more than 0, because with 0 TRL's {policy.algorithm} trainer ignores the"
        " reference",
    )
    _check_own_settings(name, policy, recipe)
    _check_algorithm(f"policies.{name}", policy, references, recipe_of_policy(recipe, name))


def _check_own_settings(name: str, policy: Policy, recipe: Recipe) -> None:
    """Raise SalsaError for a policy's reward and overrides that the recipe would not accept in its sections."""
    where = f"policies.{name}"
    require(
        "kl_coef" not in policy.overrides, f"{where}.overrides.kl_coef: must be {where}.kl_coef, outside of overrides"
    )
    require(
        policy.reward is None or policy.algorithm not in PREFERENCE_ALGORITHMS,
        f"{where}.reward: has no effect with algorithm {policy.algorithm}, which learns from pairs; remove it",
    )
    require(policy.reward != {}, f"{where}.reward: has no weights; give one, or leave the key out")
    own = recipe_of_policy(recipe, name)
    section = getattr(own, policy.algorithm)
    checks = {
        "reward": [partial(_check_reward, own)] if policy.reward is not None else [],
        "overrides": [
            partial(section.check, policy.algorithm, *([own.num_processes] if policy.algorithm == "ppo" else [])),
            *(partial(check_one, own) for check_one in (_check_lengths, _check_mode, _check_sharded, _check_reward)),
            partial(_check_prompt_set, own, "ppo.eval_prompts", own.ppo.eval_prompts),
        ]
        if policy.overrides
        else [],
    }
    for key, check_one in ((key, check_one) for key, all_checks in checks.items() for check_one in all_checks):
        try:
            check_one()
        except SalsaError as error:
            raise SalsaError(f"{where}.{key}: {error}") from error


def _check_made(recipe: Recipe) -> None:
    """Raise SalsaError for sections that stand for policies and whose values are repeated or unusable."""
    if recipe.warp is not None:
        recipe.warp.check()
    if recipe.rewarded_soups is not None:
        recipe.rewarded_soups.check(recipe.reward.parts)


def _check_existing_seeds(recipe: Recipe) -> None:
    """Raise SalsaError unless sft.from has one usable adapter or checkpoint, or null, per seed."""
    entries, seeds = recipe.sft.from_, recipe.sft.seeds
    if entries is None:
        return
    require(
        len(entries) == len(seeds),
        f"sft.from: has {len(entries)} entries, but sft.seeds has {len(seeds)} seeds; give one entry per seed, or null"
        " for a seed that this run is to train",
    )
    for index, path in enumerate(entries):
        if path is not None:
            check_weights(f"sft.from[{index}]", path, recipe)


def _check_algorithm(where: str, policy: Policy, references: list[Reference], recipe: Recipe) -> None:
    """Raise SalsaError for references and settings that TRL's trainers or sharding do not support."""
    algorithm, sync = policy.algorithm, any(reference.sync_every is not None for reference in references)
    require(
        not sync or not recipe.sharded,
        f"{where}.reference: sync_every does not work with accelerate {recipe.accelerate}, which shards the weights;"
        " remove sync_every or set accelerate=ddp",
    )
    if algorithm == "ppo":
        recipe.ppo.check_references("ppo.", f"{where}: ", len(references))
        return
    require(
        not sync or recipe.adapter is not None,
        f"{where}.reference: with full weights, sync_every works with algorithm ppo only, not {algorithm}; use ppo, or"
        " adapters (--lora)",
    )
    require(
        len(references) == 1 or algorithm != "grpo",
        f"{where}.reference: grpo supports one reference, not {len(references)}, because the k3 estimate of a mean is"
        " not the mean of the k3 estimates; use one, such as soup",
    )
    require(
        algorithm in PREFERENCE_ALGORITHMS or recipe.generation.min_new_tokens == 0,
        f"generation.min_new_tokens: must be 0 with a policy of algorithm {algorithm}, not"
        f" {recipe.generation.min_new_tokens}, because TRL computes log-probs as if EOS had been allowed",
    )


def _check_dtype(recipe: Recipe) -> None:
    """Raise SalsaError if a stage would train over a base in float16."""
    reward = recipe.reward
    stages = ["sft"] if None in (recipe.sft.from_ or [None]) else []
    stages += ["reward"] if reward.trained else []
    stages += [policy.algorithm for policy in recipe.policies.values()]
    require(
        recipe.model.dtype != "float16" or not stages,
        f"model.dtype: float16 is only for runs that train nothing, but this run trains {', '.join(stages[:1])}."
        " Gradients in float16 need a loss scaler, which is not supported. Set model.dtype=bfloat16 or float32",
    )


def _check_mode(recipe: Recipe) -> None:
    """Raise SalsaError for settings of full weights in a run with adapters, and the reverse."""
    sync = recipe.ppo.rollout_options.get("sync", "merged")
    if recipe.adapter is not None:
        require(
            sync == "merged" or recipe.adapter.r <= MAX_RANKS[-1],
            f"adapter.r: {recipe.adapter.r} is more than {MAX_RANKS[-1]}, the highest rank that vLLM loads with"
            " ppo.rollout_options.sync=adapter. Lower it, or set ppo.rollout_options.sync=merged",
        )
        require(
            recipe.ppo.rollout_backend != "vllm" or sync == "adapter" or recipe.model.quantization is None,
            f"ppo.rollout_options.sync: merged does not work with model.quantization {recipe.model.quantization}, because"
            " an adapter cannot be merged into quantised weights. Set ppo.rollout_options.sync=adapter",
        )
        for key, value, default, why in (
            ("offload", recipe.offload, "none", "references share the base, so there is nothing to offload"),
            ("precision", recipe.precision, "auto", "adapters are always trained in float32"),
        ):
            require(
                value == default,
                f"{key}: {value} has no effect with adapters: {why}. Set {key}={default}, or add `lora:"
                f" {{{key}: {default}}}` to the recipe",
            )
        return
    for key, found, unset in (
        ("model.quantization", recipe.model.quantization, None),
        ("soup.rank", recipe.soup.rank, None),
        *((f"soups.{name}.rank", soup.rank, None) for name, soup in recipe.soups.items()),
        ("ppo.rollout_options.sync", sync, "merged"),
    ):
        require(found == unset, f"{key}: {found} needs adapters; add --lora, or set {key}={unset or 'null'}")
    require(
        recipe.ppo.value != "adapter",
        "ppo.value: adapter needs adapters; add --lora, or set ppo.value=head, none or group",
    )


def _check_sharded(recipe: Recipe) -> None:
    """Raise SalsaError if weights are sharded and a setting needs the whole weights in every process."""
    ppo, seeds = recipe.ppo, recipe.reward.seeds
    optims = {f"{name}.optim": getattr(recipe, name).optim for name in ("sft", "reward", "ppo", *ALGORITHMS)}
    for key, value, fits, other in (
        ("model.quantization", recipe.model.quantization, recipe.model.quantization is None, "null"),
        ("precision", recipe.precision, recipe.precision != "stochastic", "master"),
        ("reward.seeds", short(seeds), len(seeds) == 1 or not recipe.reward.trained, f"[{seeds[0]}]"),
        ("ppo.rollout_backend", ppo.rollout_backend, ppo.rollout_backend == "hf", "hf"),
        ("ppo.rollout_compile", str(ppo.rollout_compile).lower(), not ppo.rollout_compile, "false"),
        ("ppo.value_warmup_updates", ppo.value_warmup_updates, not ppo.value_warmup_updates, "0"),
        ("ppo.micro_batch_tokens", ppo.micro_batch_tokens, ppo.micro_batch_tokens is None, "null"),
        *((key, optim, not optim.startswith("paged"), "adamw_torch_fused") for key, optim in optims.items()),
    ):
        require(
            fits or not recipe.sharded,
            f"{key}: {value} does not work with accelerate {recipe.accelerate}, which shards the weights; set"
            f" {key}={other} or accelerate=ddp",
        )


def _check_lengths(recipe: Recipe) -> None:
    sampling, limit = recipe.generation, recipe.model.max_length
    require(
        sampling.max_new_tokens < limit,
        f"generation.max_new_tokens: {sampling.max_new_tokens} must be less than model.max_length {limit}, which"
        " includes the prompt",
    )
    require(
        sampling.min_new_tokens <= sampling.max_new_tokens,
        f"generation.min_new_tokens: {sampling.min_new_tokens} must be at most max_new_tokens"
        f" {sampling.max_new_tokens}",
    )
    prompt = recipe.ppo.max_prompt_length
    require(
        prompt is None or prompt + sampling.max_new_tokens <= limit,
        f"ppo.max_prompt_length: {prompt} must be at most {limit - sampling.max_new_tokens}, which is model.max_length"
        f" {limit} less generation.max_new_tokens {sampling.max_new_tokens}",
    )
    check_sampling(
        recipe.ppo.rollout_backend,
        recipe.ppo.rollout_options,
        temperature=sampling.temperature,
        min_new_tokens=sampling.min_new_tokens,
        processes=recipe.num_processes,
    )


def _check_reward(recipe: Recipe) -> None:
    """Raise SalsaError if the reward or a part of it is unusable, or if a guard needs a part that it lacks."""
    weights = [part.weight for part in recipe.reward.parts]
    require(any(weights), "reward.model: all weights are 0, so that nothing is optimized; give one part another weight")
    guard = "over_optimization"
    require(
        guard not in recipe.ppo.guards or parse_guards(recipe.ppo.guards)[guard].action == "off" or 0 in weights,
        f"ppo.guards.{guard}: never raises an alarm, because it compares the score with a held-out reward, and reward.model"
        " has no part of weight 0; add one: [adapter, {model: MODULE:FUNCTION, weight: 0, name: gold}]",
    )
    for part in recipe.reward.parts:
        if part.kind == "function":
            check_function("reward.model", part.value)
            check_signature("reward.model", part.value)
            if recipe.data.prompts is None and recipe.toy is not None:
                check_columns("reward.model", part.value, ["prompt"], "the toy data's prompts")
        elif part.kind == "classifier":
            _check_classifier(part, recipe)
        others = ["reward", *(["gold"] if recipe.toy is not None else []), *(["kl"] if recipe.warp is not None else [])]
        require(
            (part.weight != 0 and not recipe.measures_parts) or part.name not in others,
            f"reward.model: this part is a measure of its own in the evaluation, which has another measure named"
            f" {part.name}; give the part another name: {{model: …, weight: {part.weight:g}, name: …}}",
        )


def _check_synthetic(recipe: Recipe) -> None:
    """Raise SalsaError for a `synthetic` section without effect, or with an unusable function."""
    section, data = recipe.synthetic, recipe.data
    if section is None:
        return
    require(
        data.demonstrations is None or data.preferences is None,
        "synthetic: has no effect, because data.demonstrations and data.preferences are given; remove one of the three",
    )
    require(
        section.answers_per_pair <= section.num_generations,
        f"synthetic.answers_per_pair: {section.answers_per_pair} must be at most num_generations"
        f" {section.num_generations}",
    )
    check_function("synthetic.function", section.function)
    check_signature("synthetic.function", section.function)
    if data.prompts is None and recipe.toy is not None:
        check_columns("synthetic.function", section.function, ["prompt"], "the toy data's prompts")


def _check_classifier(part: RewardPart, recipe: Recipe) -> None:
    require(
        "/" in part.value,
        "reward.model: must be adapter, module:name (a function), or the folder or Hub id (namespace/name) of a reward"
        f" adapter or sequence classifier, not {short(part.value)}{suggestion(part.value, ['adapter'])}",
    )
    if is_local(part.value) and (Path(part.value) / "adapter_config.json").is_file():
        require(
            recipe.adapter is not None,
            f"reward.model: {short(Path(part.value).name)} is an adapter, but this run uses full weights; name a"
            " sequence classifier, or add --lora",
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
        names = named(found)
        positions = all(0 <= one < seeds for one in found or () if isinstance(one, int))
        require(
            found is None or (len(names) == len(set(names)) == count and positions),
            f"landscape.{key}: must be {count} different models: positions 0 to {seeds - 1} of sft.seeds, or names, not"
            f" {short(found)}",
        )
        for name in names:
            check_model(f"landscape.{key}", name, recipe)
    _check_prompt_set(recipe, "landscape.prompts", landscape.prompts)


def _check_prompt_set(recipe: Recipe, where: str, name: str | None) -> None:
    sets = list(recipe.evaluate.prompts) or (list(TOY_PROMPTS) if recipe.toy else [])
    require(
        name is None or name in sets,
        f"{where}: evaluate.prompts has no {short(name)}; its sets are {', '.join(sets) or 'none'}",
    )


def _check_evaluate(recipe: Recipe) -> None:
    for name in recipe.evaluate.prompts:
        check_name("evaluate.prompts", name)
    for index, model in enumerate(recipe.evaluate.models):
        where = f"evaluate.models[{index}]"
        for reference in parse_reference(where, model):
            check_reference(where, reference, recipe)
    evaluated = list(dict.fromkeys(["seed-0", "soup", *recipe.soups, *recipe.policies, *recipe.evaluate.models]))
    for name, control in recipe.evaluate.controls.items():
        where = f"evaluate.controls.{name}"
        check_name("evaluate.controls", name)
        taken = name in evaluated or name == "base" or SEED.match(name)
        require(not taken, f"{where}: is the name of another model of the run; rename it")
        references = parse_reference(where, control)
        require(len(references) == 1, f"{where}: must be one model, not a list of {len(references)}; name each one")
        check_reference(where, references[0], recipe)
    evaluated += recipe.evaluate.controls
    sweeps.check_search(recipe, evaluated)
    for name in recipe.search.questions if recipe.search is not None else ():
        _check_prompt_set(recipe, "search.questions", name)
    models = [*evaluated, *sweeps.candidates(recipe)]
    if recipe.evaluate.judge is not None:
        recipe.evaluate.judge.check("evaluate.judge")
    for index, pair in enumerate(recipe.evaluate.pairs):
        where = f"evaluate.pairs[{index}]"
        require(len(pair) == 2 and pair[0] != pair[1], f"{where}: must be two different names, not {short(pair)}")
        for name in pair:
            require(
                name in models, f"{where}: {short(name)} is not one of {', '.join(models)}{suggestion(name, models)}"
            )


def _check_hub(recipe: Recipe) -> None:
    """Raise SalsaError for results to push that do not exist, and for a base that others cannot load."""
    section, base = recipe.hub, recipe.model.base
    section.check("hub")
    require(
        not section.push or recipe.replicates == 1,
        f"hub.push: does not work with replicates {recipe.replicates}, which would be pushed over one another; remove"
        " hub.push, and push one of them with `salsa hub push RUN/replicate-0 ITEM`",
    )
    for name in section.push:
        try:
            unit_of(recipe, name)
        except SalsaError as error:
            raise SalsaError(f"hub.push: {error}") from error
    require(
        not section.push or section.base_model is not None or (base is not None and not is_local(base)),
        "hub.base_model: is required, because the base is"
        f" {'the toy model' if base is None else 'a local folder'}; give the base's Hub id (namespace/name)",
    )


def _check_required(recipe: Recipe) -> None:
    """Raise SalsaError if a recipe without a `toy` section lacks its base, chat template or data."""
    algorithms = {policy.algorithm for policy in recipe.policies.values()}
    pairs = recipe.reward.trained or {*PREFERENCE_ALGORITHMS} & algorithms
    synthetic = recipe.synthetic is not None
    measured = {soup.measure_source for soup in (recipe.soup, *recipe.soups.values())}
    prompts = algorithms - {*PREFERENCE_ALGORITHMS} or "prompts" in measured or synthetic
    given: dict[str, object] = {
        "model.base": recipe.model.base,
        "model.chat_template": recipe.model.chat_template,
        "data.demonstrations": recipe.data.demonstrations or synthetic or None not in (recipe.sft.from_ or [None]),
        "data.preferences": recipe.data.preferences or synthetic or not pairs,
        "data.prompts": recipe.data.prompts or not prompts,
        "data.held_out": recipe.data.held_out or "held_out" not in measured,
        "evaluate.prompts": recipe.evaluate.prompts,
    }
    hints = {"model.chat_template": "use chatml, zephyr, tokenizer (the base's own) or the path of a Jinja file"}
    toy = "(or add a `toy` section, which builds a tiny model and toy data)"
    run_checks(
        partial(require, bool(value) or recipe.toy is not None, f"{key}: is required; {hints.get(key, 'add it')} {toy}")
        for key, value in given.items()
    )


TRAINED = ("sft", "reward", "ppo")
CHECKS: tuple[Callable[[Recipe], None], ...] = (
    _check_existing_seeds, _check_reward, _check_synthetic, _check_lengths, _check_made, _check_policies, check_soups, _check_landscape, _check_evaluate,
    _check_hub, _check_required, check_files, _check_dtype, _check_mode, _check_sharded,
)  # fmt: skip
"""Checks across sections. They run all, so each must work with a recipe that another one rejects."""
