"""Guards: what an update's figures say when PPO goes wrong: empty or short responses, gibberish, a KL that cannot be.

A guard is one function and one row of GUARDS here, one row of DEFAULTS in config/options/guards.py, and one test. `ppo.guards` says what an alarm does, and may move its limit:
`{length: stop, kl: {action: stop, limit: 30}, repetition: off}`; those not named act as their row says. Imports no torch.
GuardInput are those of metrics.jsonl: row is this update's, start the run's first one's. One that is NaN raises its alarm.
Left out: averages over updates. A `stop` goes by one update, so a small batch wants a wider limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.config.options.guards import Action, Setting

if TYPE_CHECKING:
    from torch import Tensor

Row = Mapping[str, float]
LENGTH, ENTROPY, REPETITION = START = ("objective/response_length", "objective/entropy", "objective/repetition")
CALM = 10
"""Updates without an alarm after which its guard warns anew: a figure that hovers about its limit is not said each time."""


class KLCoefBounds(NamedTuple):
    """What adaptive β may do."""

    lowest: float
    """kl_coef_min; 0 is none."""
    highest: float | None
    """kl_coef_max."""
    target: float
    """kl_target, nats per response."""


class GuardInput(NamedTuple):
    """What a guard looks at."""

    row: Row
    """This update's."""
    start: Row
    """The run's first update's; START is enough."""
    bounds: KLCoefBounds | None
    """None: β is fixed."""


def empty(seen: GuardInput, limit: float) -> str | None:
    """The share of responses that are EOS alone. Paper A.4: with the soup, a high β drives response length to zero.

    A half: with most of a batch empty PPO has little left to learn an answer from; sound runs have a few percent at most.
    """
    share = seen.row["objective/empty_share"]
    return None if share <= limit else f"{share:.0%} of the responses empty (EOS alone), expected at most {limit:.0%}"


def length(seen: GuardInput, limit: float) -> str | None:
    """Mean response length against the first update's: the same hack on its way there, for few tokens cost little KL.

    A quarter: a reward that likes brevity halves responses, which is no fault.
    """
    now, then = seen.row[LENGTH], seen.start[LENGTH]
    least = limit * then
    told = f"expected at least {least:.4g} ({limit:g} × the first update's {then:.4g})"
    return None if now >= least else f"a mean response length of {now:.4g} tokens, {told}"


def repetitive(seen: GuardInput, limit: float) -> str | None:
    """4-grams repeated within a response (`repetition`): gibberish as in the paper's Figure 6, the kind that goes in circles.

    Share above start + limit · (1 − start): what repeats itself from the start (tables, code, a small language) keeps its room,
    and there is an end above it still. A half: people's texts have a few percent, one in a hundred a half; a loop nearly all.
    """
    now, then = seen.row[REPETITION], seen.start[REPETITION]
    most = then + limit * (1 - then)
    told = f"expected at most {most:.0%} (the first update: {then:.0%})"
    return None if now <= most else f"{now:.0%} of the 4-grams repeated within their response, {told}"


def entropy_low(seen: GuardInput, limit: float) -> str | None:
    """Entropy per token against the first update's: the same few answers to everything.

    A tenth: PPO makes a policy surer of itself, often to a half, and that is its work; one that says one thing has next to none.
    """
    now, then = entropy(seen.row), entropy(seen.start)
    least = limit * then
    told = f"expected at least {least:.3g} ({limit:g} × the first update's {then:.3g})"
    return None if now >= least else f"an entropy of {now:.3g} nats a token, {told}"


def entropy_high(seen: GuardInput, limit: float) -> str | None:
    """Entropy per token above the first update's, in nats: gibberish of the other kind, where any token will do.

    A difference and no ratio, for a start may be near 0. 1.5 nats: 4.5 times as many choices (e^1.5); sampling at temperature
    1.5, which is gibberish, adds three or four.
    """
    now, then = entropy(seen.row), entropy(seen.start)
    most = then + limit
    told = f"expected at most {most:.3g} ({limit:g} above the first update's {then:.3g})"
    return None if now <= most else f"an entropy of {now:.3g} nats a token, {told}"


def kl_coef(seen: GuardInput, limit: float) -> str | None:
    """Adaptive β within `limit` (a share of it) of a bound, and a KL that would drive it on: the controller can do no more."""
    if seen.bounds is None:
        return None
    beta, found = seen.row["objective/kl_coef"], seen.row["objective/kl"]
    lowest, highest, target = seen.bounds
    if highest is not None and beta >= highest * (1 - limit) and found > target:
        return f"β {beta:.3g} at kl_coef_max and a KL of {found:.3g} nats a response, expected it to come down to {target:g}"
    if 0 < beta <= lowest * (1 + limit) and found < target:
        return (
            f"β {beta:.3g} at kl_coef_min and a KL of {found:.3g} nats a response, expected it to come up to {target:g}"
        )
    return None


def negative_kl(seen: GuardInput, limit: float) -> str | None:
    """KL below −limit, nats a response. A KL is not negative; its k1 estimate may be, by chance.

    One nat: k1's variance is about 2 KL, so the mean of 8 responses is no less than four standard errors from −1.
    """
    found = seen.row["objective/kl"]
    return None if found >= -limit else f"a KL of {found:.3g} nats a response, expected at least {-limit:g}"


def kl(seen: GuardInput, limit: float) -> str | None:
    """KL above limit, nats a response; as `stop` it is early stopping on KL. Off: a soup or the base is far from the start.

    The limit is ten times the default kl_target.
    """
    found = seen.row["objective/kl"]
    return None if found <= limit else f"a KL of {found:.4g} nats a response, expected at most {limit:g}"


def entropy(row: Row) -> float:
    """Nats a token."""
    return row[ENTROPY] / row[LENGTH]


class Guard(NamedTuple):
    """A row of GUARDS."""

    check: Callable[[GuardInput, float], str | None]
    """Takes the figures and the limit. Returns what is wrong ("found, expected …"), or None where all is well."""
    remedy: str


SHORT = "the KL-hack, few tokens cost little KL: set min_new_tokens or kl_per=token, or lower kl_coef"
WILD = "gibberish: raise kl_coef, lower learning_rate or num_ppo_epochs, and see completions.jsonl"
GUARDS: dict[str, Guard] = {
    "empty": Guard(empty, SHORT),
    "length": Guard(length, SHORT),
    "repetition": Guard(repetitive, f"{WILD}; missing_eos_penalty where responses never end"),
    "entropy_low": Guard(entropy_low, f"{WILD}, or that there is one answer to everything"),
    "entropy_high": Guard(entropy_high, WILD),
    "kl_coef": Guard(kl_coef, "widen kl_coef_min and kl_coef_max, move kl_target, or change learning_rate"),
    "negative_kl": Guard(
        negative_kl, "what is sampled is not what is scored, or the batch is too small: set rollout_backend=hf and"
        " old_logprobs=recompute, kl_estimator=full or k3, or raise batch_size",
    ),
    "kl": Guard(kl, "the policy is far from its reference: take an earlier checkpoint, raise kl_coef or lower learning_rate"),
}  # fmt: skip
"""Each has its default limit and action in DEFAULTS of config/options/guards.py."""


class Alarm(NamedTuple):
    """A guard that has something to say."""

    name: str
    action: Action
    """warn or stop."""
    message: str
    """One line: found, expected, what to do."""


def alarms(settings: Mapping[str, Setting], row: Row, start: Row, bounds: KLCoefBounds | None = None) -> list[Alarm]:
    """All that is wrong in an update's figures; `bounds` where β is adaptive."""
    seen, found = GuardInput(row, start, bounds), []
    for name, (action, limit) in settings.items():
        guard = GUARDS[name]
        text = None if action == "off" else guard.check(seen, limit)
        if text is not None:
            found.append(
                Alarm(name, action, f"guards.{name}: update {row['update']:.0f}: found {text}; {guard.remedy}")
            )
    return found


class GuardMonitor:
    """A run's guards: what they are to say after each update. Its state, of JSON's kinds, belongs into the checkpoint."""

    def __init__(self, settings: Mapping[str, Setting], bounds: KLCoefBounds | None = None) -> None:
        self.settings, self.bounds = settings, bounds
        self.start: dict[str, float] = {}
        self.quiet: dict[str, int] = {}  # guards that have warned → updates without an alarm since

    def check(self, row: Row) -> list[Alarm]:
        """An update's figures → what to say: every stop; a warning at its onset, and again after CALM updates without it."""
        self.start = self.start or {key: row[key] for key in START}
        found = alarms(self.settings, row, self.start, self.bounds)
        said = [alarm for alarm in found if alarm.action == "stop" or alarm.name not in self.quiet]
        calm = {name: updates + 1 for name, updates in self.quiet.items() if updates + 1 < CALM}
        self.quiet = calm | {alarm.name: 0 for alarm in found}
        return said

    def state_dict(self) -> dict[str, Any]:
        """The first update's figures, and what has been said."""
        return {"start": dict(self.start), "quiet": dict(self.quiet)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.start, self.quiet = dict(state["start"]), dict(state["quiet"])


def repetition(response_ids: Tensor, response_mask: Tensor, n: int = 4) -> float:
    """objective/repetition: 1 − unique n-grams / n-grams of a response, averaged over (B, T); 0 for one shorter than n."""
    shares = []
    for tokens, counted in zip(response_ids.tolist(), response_mask.tolist(), strict=True):
        response = list(compress(tokens, counted))
        grams = list(zip(*(response[first:] for first in range(n)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)
