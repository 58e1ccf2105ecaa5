"""Read the folders of a finished run into the input of its report, and identify replicates."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salsa_peft.config.fields import SEED
from salsa_peft.config.job import policy_id, recipe_of_policy
from salsa_peft.config.options.soup import ELEMENTWISE_STRATEGIES, SoupSection
from salsa_peft.config.options.toy import TOY_PROMPTS, TOY_WORDS
from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.policies.policy import Policy
from salsa_peft.config.policies.rewarded_soups import RewardedSoups
from salsa_peft.config.policies.search import SEED_0
from salsa_peft.config.policies.warp import Warp
from salsa_peft.config.references import parse_reference
from salsa_peft.config.schema import PPO, Recipe
from salsa_peft.data.questions import TEMPERATURES
from salsa_peft.evaluation import comparisons
from salsa_peft.models.rewards.quality import METRICS
from salsa_peft.report.format import Row
from salsa_peft.utils import manifests
from salsa_peft.utils.files import read_json, read_json_lines
from salsa_peft.utils.fingerprints import FINGERPRINT

SOUP = "soup"
"""Name of the soup of the recipe's section `soup`: in the paper that of SFT seeds, SALSA's reference."""
COSTS = ("key", "seconds", "peak_mb", "gpu_peak_mb", "gpu_planned_mb", "planned_seconds")
MODES = {"full": "full weights", "lora": "LoRA", "qlora": "QLoRA"}
NOT_THE_RECIPE = (
    "name",
    "description",
    "replicates",
    "threads",
    "report_to",
    "landscape",
    "num_processes",
    "accelerate",
)
"""Keys of the recipe in which replicates may differ; these keys affect neither policies nor answers."""


@dataclass(frozen=True)
class PolicyReport:
    """Training of one policy."""

    reference: str
    """The KL reference as text, such as "seed-0", "soup", "shrunk: base + 0.6 · seed-0", "base"."""
    kl_coef: float
    """β at the start."""
    metrics: list[dict[str, Any]]
    """The rows of metrics.jsonl."""
    completions: list[dict[str, Any]]
    """The rows of completions.jsonl; the report shows the first and the last row."""
    algorithm: str = "ppo"
    facts: dict[str, Any] = field(default_factory=dict)
    """Metrics of a stage that trains with one of TRL's algorithms; {} for ppo."""
    references: int = 1
    """Number of references; the KLs to several are averaged (MKL)."""
    start: str = SEED_0
    """The model where training started."""
    reward: dict[str, float] | None = None
    """The policy's own weights of the parts of the reward; None: those of the recipe."""
    mean: str = "kl"
    """Mean of several references (reference_mean)."""
    learns_weights: bool = False
    """Whether the weights of several references are learned."""


@dataclass(frozen=True)
class SoupReport:
    """A soup of the recipe: the section `soup`, or one of `soups`."""

    members: list[str]
    weights: list[float]
    """As in the recipe; equal weights where the strategy chooses them."""
    strategy: str = "linear"
    start: str = "base"
    """Model from which the members' changes are measured."""
    scale: float = 1.0
    """η, the factor of the merged change."""
    ranks: list[int] = field(default_factory=list)
    """Ranks of the soup's modules; [] for checkpoints."""
    error: float | None = None
    """Relative error of the recompression to a rank; None if there was none."""

    @property
    def of_seeds(self) -> bool:
        """Whether the soup has several members, all of which are SFT seeds."""
        return len(self.members) > 1 and all(SEED.match(member) for member in self.members)

    @property
    def is_shrunk(self) -> bool:
        """Whether the soup is a single model that is only shrunk towards the start: the control of a soup."""
        return len(self.members) == 1 and 0 <= self.scale < 1 and self.strategy not in ELEMENTWISE_STRATEGIES


@dataclass(frozen=True)
class ReportInput:
    """Everything that the report shows; {}, [] or None for a stage that the run does not have."""

    name: str
    recipe_yaml: str
    mode: str
    base: str
    versions: dict[str, str]
    units: list[dict[str, Any]]
    """{"unit", "key", "inputs", "seconds", "peak_mb", "gpu_peak_mb", "gpu_planned_mb", "planned_seconds"}; inputs: ids of
    units; numbers may be None."""
    seeds: dict[str, dict[str, Any]]
    reward: dict[str, Any]
    soup: dict[str, Any]
    policies: dict[str, PolicyReport]
    landscape: dict[str, Any] | None
    evaluation: dict[str, Any]
    """evaluation.json with `pairs` (comparisons.pairs) added to each set, and the key `search` added."""
    answers: list[dict[str, Any]]
    """The rows of answers.jsonl."""
    reward_quality: dict[str, Any] | None = None
    """metrics.json of the reward_quality stage; None without it."""
    verdicts: dict[str, Any] | None = None
    """verdicts.json; None without a judge."""
    judgments: list[dict[str, Any]] = field(default_factory=list)
    """The rows of judgments.jsonl."""
    fingerprint: str | None = None
    """Fingerprint of the base's files."""
    replicate_of: str = ""
    """Hash of the recipe without its training seeds, the same for all replicates."""
    training_seeds: str = ""
    """The training seeds as text, such as "sft 0, 1; reward 0; ppo 0"."""
    temperature: str = "1"
    """Sampling temperature of the answers, as text."""
    samples: int = 20
    """Number of questions of each set that are shown: the first ones, whatever their outcome."""
    limit: int | None = None
    """generation.max_new_tokens: an answer of this length was truncated. None: unknown."""
    controls: dict[str, str] = field(default_factory=dict)
    """Name of each model in evaluate.controls → the label of its reference."""
    toy: bool = False
    """Whether base and data are made by the run (section `toy`), so that replicates have their own."""
    lengths: str = "tokens"
    """Unit of the answers' lengths."""
    explained: dict[str, str] = field(default_factory=dict)
    """Explanations of this run's measures and sets of questions, by name."""
    soups: dict[str, SoupReport] = field(default_factory=dict)
    """Name → soup: "soup" (the recipe's section of that name) and those of `soups`."""
    warp: Warp | None = None
    """The recipe's section `warp`."""
    rewarded: RewardedSoups | None = None
    """The recipe's section `rewarded_soups`."""

    @property
    def described(self) -> dict[str, str]:
        """Name → description of the models in evaluate.controls, and of the soups; `soup` only if it is not of SFT seeds."""
        found = {name: f"{label}, no RLHF" for name, label in self.controls.items()}
        return found | {name: soup_text(of) for name, of in self.soups.items() if name != SOUP or not of.of_seeds}


def soup_text(soup: SoupReport) -> str:
    """What a soup is: its members and weights, strategy, start and scale. Local paths are cut to their last part."""
    start = "the base" if soup.start == "base" else last_part(soup.start)
    members = [last_part(member) for member in soup.members]
    how = [] if soup.strategy == "linear" else [soup.strategy]
    if len(members) == 1:
        what, control = members[0], "control: " if soup.is_shrunk else ""
        if soup.scale != 1:
            word = "shrunk" if 0 <= soup.scale < 1 else "stretched" if soup.scale > 1 else "reversed"
            what += f" {word} to {soup.scale:g} of its change from {start}"
        elif soup.error is None and not how:
            what += " itself"
        how += [] if soup.error is None else [f"compressed to rank {max(soup.ranks)}"]
        return control + what + (f" ({', '.join(how)})" if how else "") + ", averages nothing"
    made = f"soup of {', '.join(members)}"
    if len(set(soup.weights)) > 1:
        made += f" with weights {', '.join(f'{weight:g}' for weight in soup.weights)}"
    how += [] if soup.start == "base" else [f"changes from {start}"]
    how += [] if soup.scale == 1 else [f"η {soup.scale:g}"]
    return made + (f" ({', '.join(how)})" if how else "")


def gather(recipe: Recipe, inputs: Mapping[str, Path], recipe_yaml: str) -> ReportInput:
    """Read the results of a finished run. inputs: unit id → its folder."""
    sft = {unit.removeprefix("sft/"): folder for unit, folder in inputs.items() if unit.startswith("sft/")}
    found = {unit: read_json(folder / manifests.MANIFEST) for unit, folder in inputs.items()}
    evaluation, soup = inputs["evaluate"], inputs["soup"]
    landscape, judge = inputs.get("landscape"), inputs.get("judge")
    base = recipe.model.base or "a tiny Llama made on the spot"
    replicate_of, training_seeds = identity(recipe)
    answers = read_json_lines(evaluation / "answers.jsonl")
    verdicts = read_json(judge / "verdicts.json") if judge else None
    return ReportInput(
        name=recipe.name,
        recipe_yaml=recipe_yaml,
        mode=MODES[recipe.mode],
        base=Path(base).name if Path(base).is_dir() else base,
        versions=manifests.versions(),
        units=[
            {"unit": unit, "inputs": list(manifest.get("inputs", {})), **{name: manifest.get(name) for name in COSTS}}
            for unit, manifest in found.items()
        ],
        seeds={name: read_json(folder / "metrics.json") for name, folder in sft.items()},
        reward=_reward(recipe, inputs),
        soup=soup_rows(read_json(soup / "soup.json")),
        policies={
            name: _policy(folder, len(policy.references(name)), policy, recipe_of_policy(recipe, name).ppo)
            for name, policy in recipe.policies.items()
            if (folder := inputs.get(policy_id(recipe, name)))
        },
        landscape=read_json(landscape / "landscape.json") if landscape else None,
        evaluation=_with_pairs(recipe, read_json(evaluation / "evaluation.json"), answers, verdicts),
        answers=answers,
        reward_quality=read_json(inputs["reward_quality"] / METRICS) if "reward_quality" in inputs else None,
        verdicts=verdicts,
        judgments=read_json_lines(judge / "judgments.jsonl") if judge else [],
        fingerprint=read_json(soup / FINGERPRINT).get("base") if (soup / FINGERPRINT).exists() else None,
        replicate_of=replicate_of,
        training_seeds=training_seeds,
        temperature=_temperature(recipe, answers),
        samples=recipe.evaluate.samples,
        limit=recipe.generation.max_new_tokens,
        toy=recipe.toy is not None,
        controls={name: parse_reference("", of)[0].label for name, of in recipe.evaluate.controls.items()},
        explained=_explained(recipe),
        soups={
            name: soup_report(section, inputs[unit])
            for name, unit, section in (
                (SOUP, "soup", recipe.soup),
                *((name, f"soups/{name}", one) for name, one in recipe.soups.items()),
            )
            if unit in inputs
        },
        warp=recipe.warp,
        rewarded=recipe.rewarded_soups,
    )


def soup_report(section: SoupSection, folder: Path) -> SoupReport:
    """A soup's settings, with the ranks and the error that its stage wrote into `folder`."""
    found = read_json(folder / "soup.json")
    error = found.get("error")
    return SoupReport(
        members=section.names,
        weights=section.resolved_weights,
        strategy=section.strategy,
        start=section.start,
        scale=section.scale,
        ranks=found.get("ranks", []),
        error=None if error is None else error["all"],
    )


def _explained(recipe: Recipe) -> dict[str, str]:
    """Explanations of the toy data's gold reward and of its sets of questions; {} for other data."""
    own = recipe.evaluate.prompts  # instead of the toy data's sets
    return {name: text for name, text in TOY_WORDS.items() if recipe.toy and not (own and name in TOY_PROMPTS)}


def _with_pairs(
    recipe: Recipe, evaluation: dict[str, Any], answers: list[dict[str, Any]], verdicts: dict[str, Any] | None
) -> dict[str, Any]:
    """evaluation.json with the recipe's pairs by every measure and the result of a search added."""
    given = comparisons.by_set(answers)
    found = comparisons.searched(recipe, given) or (verdicts or {}).get("search")
    pairs, measures = comparisons.wanted(recipe, found), evaluation["measures"]
    datasets = {
        name: {**data, "pairs": comparisons.pairs(given[name], pairs, measures)}
        for name, data in evaluation["datasets"].items()
    }
    return {**evaluation, "datasets": datasets, "search": found}


def _temperature(recipe: Recipe, answers: list[dict[str, Any]]) -> str:
    """evaluate.temperature as text; for `category`, the temperatures that were used."""
    chosen, otherwise = recipe.evaluate.temperature, recipe.generation.temperature
    if chosen != "category":
        return f"{chosen:g}"
    by_category = any(row["category"] in TEMPERATURES for row in answers)
    return f"{otherwise:g}" + (", and at FastChat’s temperatures for MT-Bench’s categories" if by_category else "")


def identity(recipe: Recipe) -> tuple[str, str]:
    """Hash of the recipe without its training seeds, which replicates share, and these seeds as text."""
    parts = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in NOT_THE_RECIPE}
    seeds = {name: parts[name].pop("seeds") for name in ("sft", "reward")} | {"ppo": [parts["ppo"].pop("seed")]}
    used = {policy.algorithm for policy in recipe.policies.values()}
    for name in ("toy", "synthetic", *ALGORITHMS):
        seed = None if parts[name] is None else parts[name].pop("seed")
        if seed is not None and (name in used or name not in ALGORITHMS):
            seeds[name] = [seed]
    for policy in parts["policies"].values():
        if (own := policy["overrides"].pop("seed", None)) is not None:
            seeds[policy["algorithm"]].append(own)
    if parts["warp"] is not None:
        parts["warp"]["overrides"].pop("seed", None)  # it is that of the policies
    parts["evaluate"].pop("samples")
    parts["counts"] = [len(of) for of in seeds.values()]
    text = json.dumps(parts, sort_keys=True, default=str)
    in_words = "; ".join(f"{name} {', '.join(map(str, of))}" for name, of in seeds.items())
    return hashlib.sha256(text.encode()).hexdigest()[:12], in_words


def _policy(folder: Path, references: int, policy: Policy, settings: PPO) -> PolicyReport:
    facts = read_json(folder / "policy.json")
    reference, beta, algorithm = facts.pop("reference"), facts.pop("kl_coef")["start"], facts.pop("algorithm", "ppo")
    if algorithm != "ppo":
        return PolicyReport(reference, beta, [], [], algorithm, facts, references, policy.start, policy.reward)
    metrics, completions = (read_json_lines(folder / f"{name}.jsonl") for name in ("metrics", "completions"))
    return PolicyReport(
        reference, beta, metrics, completions, references=references, start=policy.start, reward=policy.reward,
        mean=settings.reference_mean, learns_weights=settings.reference_weights_step is not None,
    )  # fmt: skip


def soup_rows(soup: dict[str, Any]) -> dict[str, Any]:
    """Rows of the report's table on a soup: its members, the distances between members, and the soup."""

    def norm(row: dict[str, Any]) -> str:
        return "" if row["norm"] is None else f", norm of delta {row['norm']:.4g}"

    adapters = "ranks" in soup
    members = {
        m["name"]: f"weight {m['weight']:g}" + (f", rank {m['ranks']}" if adapters else "") + norm(m)
        for m in soup["members"]
    }
    pairs = {
        f"{p['a']} – {p['b']}": f"distance {p['distance']:.4g}"
        + ("" if p["cosine"] is None else f", cosine {p['cosine']:.4f}")
        for p in soup["pairs"]
    }
    size = f"{soup['modules']} modules, rank {soup['ranks']}" if adapters else f"{soup['parameters']:,} parameters"
    return {**members, **pairs, "soup": f"{soup['strategy']}, {size}{norm(soup)}"}


def _reward(recipe: Recipe, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Rows of the reward's parts (none if only the trained model), then the reward stage's metrics."""
    parts = recipe.reward.parts
    alone = recipe.reward.trained and len(parts) == 1 and parts[0].weight == 1
    rows = {} if alone else {part.name: f"{part.weight:g} · {part.kind} {last_part(part.value)}" for part in parts}
    return {**rows, **(read_json(inputs["reward"] / "metrics.json") if "reward" in inputs else {})}


def answer_pairs(answers: Sequence[Row], dataset: str, a: str, b: str) -> list[tuple[Row, Row]]:
    """The answers of two models to the same turns of a dataset, in the order of the questions and turns."""
    first, second = (
        {(row["index"], row["turn"]): row for row in answers if row["dataset"] == dataset and row["model"] == name}
        for name in (a, b)
    )
    return [(first[turn], second[turn]) for turn in sorted(first.keys() & second.keys())]


def last_part(value: str) -> str:
    """The last part of an absolute path, since others may read the report; any other text unchanged."""
    return Path(value).name if Path(value).is_absolute() else value
