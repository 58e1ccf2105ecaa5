"""The paper's claims (Chegini et al., 2024) as one table: what was expected, and what replicates of a recipe found.

Each claim is one function of the replicates' numbers. Its first finding is the claim itself; the others say where it
comes from: `control` findings compare with models that average nothing, so that "as claimed" there, and only there,
speaks for averaging. A function returns None if the replicates lack what it compares. The recipe's soup is taken to be
that of seed-0 and seed-1 with equal weights, as in the paper.

Scores are means over questions; all findings are differences, paired by replicate, with 95% t-intervals over replicates.
"At its best β" means: at the β that is best in the other replicates, out of those that both methods were trained with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from salsa_peft.config.references import SOUP_NORM
from salsa_peft.report.replicates.numbers import (
    FEWEST,
    Numbers,
    at_best_beta,
    at_beta,
    best_shrunk,
    control_labels,
    corner,
    label_of,
    mean_of,
    of_model,
    on_line,
    on_plane,
    policies_by_beta,
    shared_betas,
)
from salsa_peft.report.replicates.summary import Replicate
from salsa_peft.utils.statistics import Estimate, mean_interval

SEED, SOUP, OTHER = "seed-0", "soup", "seed-1"
"""Labels of the references of PPO and SALSA, and of the soup's other member."""
NORM_SHRUNK = {"shrunk": {"seed": 0, "scale": SOUP_NORM}}
"""The reference of one seed that is shrunk to the soup's norm, as a recipe writes it."""
TRAINING = "training"
"""Column of the findings that are measured in training, not on a set of questions."""
LOW_BETA, HIGH_BETA = 0.05, 2.0
"""Claims about a small β need policies at a β of at most the first, claims about a high β at one of at least the second."""
SIGNS = {1: "> 0", -1: "< 0", 0: "≤ 0"}
"""Expected sign of a difference → text. 0: not above 0."""


@dataclass(frozen=True)
class Finding:
    """One difference of a claim, on each set of questions."""

    what: str
    values: dict[str, Estimate]
    """Set of questions, or TRAINING → the difference over replicates."""
    expected: int
    """Its sign if the claim holds (for a control: if averaging is the reason): 1, −1, or 0 for "not above 0"."""
    control: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and what was found about it."""

    source: str
    """Where the paper makes it."""
    text: str
    findings: list[Finding]


def verdict(expected: int, found: Estimate) -> str:
    """What an interval says about an expected sign: as claimed, the opposite, or not shown."""
    if found.n < FEWEST:
        return "one replicate"
    if found.low > 0 or found.high < 0:
        above = found.low > 0
        return "as claimed" if above == (expected == 1) else "the opposite"
    return "not shown" if expected else "not contradicted"


def _difference(what: str, a: Numbers, b: Numbers, expected: int = 1, control: bool = False) -> Finding | None:
    """The finding a − b on the sets of questions that both have; None if there is none."""
    values = {name: mean_interval([x - y for x, y in zip(a[name], b[name], strict=True)]) for name in a if name in b}
    return Finding(what, values, expected, control) if values else None


def _claim(source: str, text: str, *findings: Finding | None) -> Claim | None:
    """A claim with the findings that could be computed; None without its first one."""
    return None if findings[0] is None else Claim(source, text, [one for one in findings if one is not None])


def _best_against(
    replicates: Sequence[Replicate], what: str, a: str, b: str, expected: int = 1, control: bool = False
) -> Finding | None:
    """Policies with reference a minus policies with reference b, each at its best β."""
    betas = shared_betas(replicates, a, b)
    return _difference(what, at_best_beta(replicates, a, betas), at_best_beta(replicates, b, betas), expected, control)


def interior_peak(replicates: Sequence[Replicate]) -> Claim | None:
    """Figure 2a and b: along the line of two seeds, before PPO, the score peaks at the midpoint."""
    seeds, soup = mean_of(of_model(replicates, SEED), of_model(replicates, OTHER)), of_model(replicates, SOUP)
    stretched = label_of({"stretched": {}})
    return _claim(
        "Figure 2a, b",
        "Between two seeds, before RLHF, the reward peaks at the midpoint, the soup.",
        _difference("soup − mean of its two seeds", soup, seeds),
        _difference("α = ½ − mean of α = ¼ and ¾", on_line(replicates, 0.5), on_line(replicates, 0.25, 0.75)),
        _difference("mean of α = −½ and 1½ − mean of the ends", on_line(replicates, -0.5, 1.5), on_line(replicates, 0.0, 1.0), -1),
        _difference("soup − base", soup, of_model(replicates, "base"), control=True),
        _difference("midpoint − best shrunk seed", on_line(replicates, 0.5), best_shrunk(replicates), control=True),
        _difference("soup − seed with the soup’s norm", soup, of_model(replicates, label_of(NORM_SHRUNK)), control=True),
        _difference("soup stretched to the seed’s norm − mean of the seeds", of_model(replicates, stretched), seeds, control=True),
    )  # fmt: skip


def triangle(replicates: Sequence[Replicate]) -> Claim | None:
    """Figure 2c: on the plane of three seeds the score is best near the centre and falls outside."""
    third = 1 / 3
    centre = on_plane(replicates, corner(third, third, third))
    inside = on_plane(replicates, lambda weights: min(weights) > -1e-6)
    return _claim(
        "Figure 2c",
        "In the triangle of three seeds the reward is highest at the centre; outside it falls.",
        _difference("centre − mean of the vertices", centre, on_plane(replicates, corner(0, 0, 1))),
        _difference("centre − mean of the sides’ midpoints", centre, on_plane(replicates, corner(0, 0.5, 0.5))),
        _difference("inside − outside", inside, on_plane(replicates, lambda weights: min(weights) < -1e-6)),
        _difference("centre − best shrunk seed", centre, best_shrunk(replicates), control=True),
    )


def salsa_over_ppo(replicates: Sequence[Replicate]) -> Claim | None:
    """Tables 1 to 4: SALSA over PPO and over SFT, each method at the β that suits it best."""
    betas = shared_betas(replicates, SOUP, SEED)
    salsa, ppo = at_best_beta(replicates, SOUP, betas), at_best_beta(replicates, SEED, betas)
    start = of_model(replicates, SEED)
    gap = {name: [x - y for x, y in zip(salsa[name], ppo[name], strict=True)] for name in salsa}
    inside, outside = {"out": gap["in"]} if "in" in gap else {}, {"out": gap["out"]} if "out" in gap else {}
    return _claim(
        "Tables 1–4",
        "SALSA beats PPO and SFT, above all out of distribution.",
        _difference("SALSA − PPO", salsa, ppo),
        _difference("SALSA − PPO, out − in of distribution", outside, inside),
        _difference("SALSA − its start, seed-0", salsa, start),
        _difference("PPO − its start, seed-0", ppo, start),
        *(
            _best_against(replicates, f"SALSA − PPO with reference {label}", SOUP, label, control=True)
            for label in control_labels(replicates)
        ),
    )


def reward_shift(replicates: Sequence[Replicate]) -> Claim | None:
    """Figure 3: the training reward of SALSA's answers is above that of PPO's."""
    betas = shared_betas(replicates, SOUP, SEED)
    salsa = at_best_beta(replicates, SOUP, betas, "rewards")
    others = [label for label in control_labels(replicates) if label.startswith("shrunk")]
    return _claim(
        "Figure 3",
        "SALSA’s answers have a higher training reward than PPO’s.",
        _difference("training reward, SALSA − PPO", salsa, at_best_beta(replicates, SEED, betas, "rewards")),
        *(
            _difference(
                f"training reward, SALSA − PPO with reference {label}",
                at_best_beta(replicates, SOUP, shared_betas(replicates, SOUP, label), "rewards"),
                at_best_beta(replicates, label, shared_betas(replicates, SOUP, label), "rewards"),
                control=True,
            )
            for label in others
        ),
    )


def alpha_as_reference(replicates: Sequence[Replicate]) -> Claim | None:
    """Figure 4a: of the references along the line of two seeds, α = ½ is best, and the other seed is worse than PPO."""
    quarters = [label_of({"soup": {"members": [0, 1], "weights": [1 - at, at]}}) for at in (0.25, 0.75)]
    inner, outer = shared_betas(replicates, SOUP, *quarters), shared_betas(replicates, SOUP, SEED, OTHER)
    return _claim(
        "Figure 4a",
        "As a reference α = ½ is best; the other seed alone (α = 1) is worse than PPO.",
        _difference(
            "α = ½ − mean of α = ¼ and ¾",
            at_best_beta(replicates, SOUP, inner),
            mean_of(*(at_best_beta(replicates, label, inner) for label in quarters)),
        ),
        _difference(
            "α = ½ − mean of the ends",
            at_best_beta(replicates, SOUP, outer),
            mean_of(at_best_beta(replicates, SEED, outer), at_best_beta(replicates, OTHER, outer)),
        ),
        _best_against(replicates, "seed-1 as reference − PPO", OTHER, SEED, -1),
    )


def mean_of_kls(replicates: Sequence[Replicate]) -> Claim | None:
    """Figure 4b and Table 5: the mean of the KLs to two seeds (MKL) is no substitute for their soup."""
    mkl = label_of([SEED, OTHER])
    return _claim(
        "Figure 4b, Table 5",
        "The mean of the KLs to both seeds (MKL) is worse than SALSA and does not outperform PPO.",
        _best_against(replicates, "SALSA − MKL", SOUP, mkl),
        _best_against(replicates, "MKL − PPO", mkl, SEED, 0),
    )


def members(replicates: Sequence[Replicate]) -> Claim | None:
    """Figure 5: a soup of more seeds is a better reference."""
    three = label_of({"soup": {"members": [0, 1, 2]}})
    return _claim(
        "Figure 5",
        "A soup of three seeds is a better reference than one of two.",
        _best_against(replicates, "SALSA with three members − with two", three, SOUP),
        _best_against(replicates, "SALSA with three members − PPO", three, SEED),
    )


def low_beta(replicates: Sequence[Replicate]) -> Claim | None:
    """A.4 and Figure 6: at a small β SALSA is at its best, while PPO over-optimises into gibberish."""
    betas = shared_betas(replicates, SOUP, SEED)
    if len(betas) < FEWEST or betas[0] > LOW_BETA:
        return None
    low, rest = betas[0], betas[1:]
    salsa, ppo = at_beta(replicates, SOUP, low), at_beta(replicates, SEED, low)
    return _claim(
        "A.4, Figure 6",
        f"SALSA bears a small β (here {low:g}), at which PPO turns to gibberish.",
        _difference(f"SALSA − PPO at β = {low:g}", salsa, ppo),
        _difference(f"PPO at β = {low:g} − at its best larger β", ppo, at_best_beta(replicates, SEED, rest), -1),
        _difference(f"SALSA at β = {low:g} − at its best larger β", salsa, at_best_beta(replicates, SOUP, rest)),
        *(
            _difference(
                f"SALSA − PPO with reference {label}, at β = {low:g}",
                salsa,
                at_beta(replicates, label, low),
                control=True,
            )
            for label in control_labels(replicates)
        ),
    )


def kl_deviation(replicates: Sequence[Replicate]) -> Claim | None:
    """Section 4.2: with the soup as reference, the policy moves further from its reference."""
    betas = shared_betas(replicates, SOUP, SEED)
    if not betas or any(not one.kl for one in replicates):
        return None

    def kl(label: str) -> Numbers:
        names = policies_by_beta(replicates, label)
        means = [sum(one.kl[names[beta][row]] for beta in betas) / len(betas) for row, one in enumerate(replicates)]
        return {TRAINING: means}

    shrunk = [label for label in control_labels(replicates) if shared_betas(replicates, label, SOUP) == betas]
    return _claim(
        "Section 4.2",
        "The soup as reference permits a larger KL.",
        _difference("KL to the own reference, SALSA − PPO, mean over β", kl(SOUP), kl(SEED)),
        *(
            _difference(f"KL to the own reference, SALSA − PPO with reference {label}", kl(SOUP), kl(label), control=True)
            for label in shrunk
        ),
    )  # fmt: skip


def kl_hack(replicates: Sequence[Replicate]) -> Claim | None:
    """A.4: at a high β, the soup as reference drives the length of the answers to zero; one seed does not."""
    betas = shared_betas(replicates, SOUP, SEED)
    if not betas or betas[-1] < HIGH_BETA:
        return None
    high = betas[-1]

    def change(label: str) -> Numbers:
        """Tokens of an answer of the policy, less those of its reference."""
        after, before = at_beta(replicates, label, high, "lengths"), of_model(replicates, label, "lengths")
        return {name: [x - y for x, y in zip(after[name], before[name], strict=True)] for name in after if name in before}  # fmt: skip

    salsa = change(SOUP)
    return _claim(
        "A.4",
        f"At a high β (here {high:g}) the soup as reference drives the answers’ length to zero (KL-hack).",
        _difference("tokens of an answer, SALSA − its reference", salsa, {name: [0.0] * len(of) for name, of in salsa.items()}, -1),
        _difference("the same, SALSA − PPO", salsa, change(SEED), -1),
        *(
            _difference(f"the same, SALSA − PPO with reference {label}", salsa, change(label), -1, control=True)
            for label in control_labels(replicates)
        ),
    )  # fmt: skip


CLAIMS: tuple[Callable[[Sequence[Replicate]], Claim | None], ...] = (
    interior_peak, triangle, salsa_over_ppo, reward_shift, alpha_as_reference, mean_of_kls, members, low_beta, kl_deviation,
    kl_hack,
)  # fmt: skip
"""The claims in the order of the paper; a new one is one function and one entry here."""


def claims(replicates: Sequence[Replicate]) -> list[Claim]:
    """The claims about which these replicates say something."""
    return [found for claim in CLAIMS if (found := claim(replicates)) is not None]
