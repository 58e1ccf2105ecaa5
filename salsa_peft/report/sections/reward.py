"""The report's section on the reward: measures on held-out pairs and on seed-0's responses, in tables and sentences."""

from typing import Any

from salsa_peft.models.rewards.quality import LARGE_SHARE
from salsa_peft.report.format import Row, estimate, percent, signed


def context(reward: Row, quality: Row | None, verdicts: Row | None) -> dict[str, Any] | None:
    """Variables of the section's templates; None if nothing was measured.

    reward: metrics.json of the reward stage, {} without it. quality: that of the reward_quality stage, None without it.
    verdicts: verdicts.json, None without a judge.
    """
    pairs = reward.get("calibration", {}).get("held_out")
    if pairs is None and quality is None:
        return None
    spreads = {"held-out pairs": reward["spread"]["held_out"]} if "spread" in reward else {}
    return {
        "sentences": [*sentences(reward, quality), *judge_sentences((verdicts or {}).get("best_of_n"))],
        "calibration": pairs,
        "accuracy": reward.get("accuracy", {}).get("held_out"),
        "spreads": spreads | ({} if quality is None else {"responses of seed-0": quality}),
        "best_of_n": (quality or {}).get("best_of_n"),
    }


def sentences(reward: Row, quality: Row | None) -> list[str]:
    """What the measures mean for RL, in plain sentences."""
    found = []
    if (right := reward.get("accuracy", {}).get("held_out")) is not None:
        found.append(f"The reward model ranks {share_of(right)} of {right['n']} held-out pairs as the data does.")
    if quality is None:
        return found
    between = quality["between_prompt_share"]
    if quality["score_sd_within"] == 0:
        found.append(
            "All scores of seed-0’s responses to the same prompt are equal, so RL cannot learn from this reward."
        )
    elif between is not None:
        found.append(
            f"On {quality['responses']} responses of seed-0 to each of {quality['prompts']} prompts, {share_of(between)}"
            " of the score’s variance lies between prompts; a policy learns from the rest, between responses to a prompt."
        )
        if between["mean"] >= LARGE_SHARE:
            found.append(
                "This share is large: PPO’s critic has to learn each prompt’s level before PPO learns from the rest. Set"
                " reward.center_rewards_coefficient to lower it, or use ppo.value=adapter, ppo.value=group or algorithm rloo."
            )
    if "best_of_n" in quality:
        found.append(best_sentence(quality["best_of_n"]))
    return found


def share_of(value: Row) -> str:
    """A share with its interval, in percent."""
    return f"{percent(value['mean'])}% [{percent(value['low'])}, {percent(value['high'])}]"


def best_sentence(best: Row) -> str:
    """The gain of the best of n responses by the reward, and what it forecasts."""
    gain, n = best["gain"], best["n"]
    text = (
        f"Before any RL, choosing the best of {n} responses of seed-0 by the reward changes the gold reward from"
        f" {estimate(best['one_response'])} to {estimate(best['best_by_reward'])}, a difference of {signed(gain)}; choosing"
        f" by gold would give {estimate(best['best_by_gold'])}."
    )
    if gain["n"] > 1 and gain["low"] <= 0:
        return f"{text} No gain was shown, so little can be expected of RL on this reward."
    return text


def judge_sentences(best: Row | None) -> list[str]:
    """The judge's win rate of the best of n responses over one response; empty without it."""
    if best is None or not best["n"]:
        return []
    rate = share_of({"mean": best["adjusted_win_rate"], **best})
    text = (
        f"By the judge, the best of {best['responses']} responses of seed-0 by the reward has an adjusted win rate of {rate}"
        f" over one response, on {best['n']} prompts"
    )
    return [
        f"{text}: no gain was shown, so little can be expected of RL on this reward."
        if best["low"] <= 0.5
        else f"{text}."
    ]


def facts(reward: Row) -> dict[str, Any]:
    """The reward stage's metrics for the table of facts, without those that the section shows in tables of its own."""
    shown = {name: value for name, value in reward.items() if name not in ("calibration", "spread", "members")}
    members = {f"seed {one['seed']}": one["accuracy"]["held_out"] for one in reward.get("members", [])}
    return shown | ({"accuracy of members": members} if members else {})
