"""Each guard on figures with one thing wrong, what a recipe may say of it, when it speaks, and the repetition it reads."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from salsa_peft.config.load import load_recipe
from salsa_peft.config.options.guards import DEFAULTS, GuardSetting, parse_guards
from salsa_peft.models.responses import token_lists
from salsa_peft.training.ppo.guards.checks import RECENT, SEVERAL, START, WINDOW, GuardInput, KLCoefBounds
from salsa_peft.training.ppo.guards.measures import between_prompt_share, repetition, variety
from salsa_peft.training.ppo.guards.monitor import GUARDS, Alarm, GuardMonitor, alarms

SOUND = {
    "update": 1,
    "episode": 128,
    "objective/scores": 1.0,
    "objective/distinct_share": 0.9,
    "objective/commonest_share": 0.03,
    "objective/kl_per_token": 0.125,
    "val/num_eos_tokens": 120,
    "val/explained_variance": 0.5,
    "objective/empty_share": 0.02,
    "objective/response_length": 40.0,
    "objective/entropy": 100.0,  # 2.5 nats a token
    "objective/repetition": 0.04,
    "objective/kl": 5.0,
    "objective/kl_coef": 0.2,
}
BOUNDS = KLCoefBounds(0.01, 1.0, 6.0)


def row(update: int = 1, **changes: float) -> dict[str, float]:
    """SOUND with some metrics changed; names without `objective/` and `val/`."""
    others = ("num_eos_tokens", "explained_variance")
    changed = {f"{'val' if name in others else 'objective'}/{name}": value for name, value in changes.items()}
    return SOUND | {"update": update, "episode": 128 * update} | changed


def found(
    now: dict[str, float], then: dict[str, float] = SOUND, bounds: KLCoefBounds | None = BOUNDS, **said: object
) -> list[Alarm]:
    """The alarms of an update."""
    return alarms(parse_guards(said), GuardInput(now, then, bounds))


def names(*args: object, **said: object) -> list[str]:
    """Which guards have an alarm."""
    return [alarm.name for alarm in found(*args, **said)]  # type: ignore[arg-type]


def test_a_sound_update_has_no_alarm():
    assert names(SOUND) == []


@pytest.mark.parametrize(
    ("guard", "bad", "good"),
    [
        ("empty", row(empty_share=0.51), row(empty_share=0.5)),
        (
            "collapse",
            row(commonest_share=0.52, entropy=49.0),
            row(commonest_share=0.51, entropy=49.0),
        ),  # 0.03 + 0.5 · 0.97
        ("collapse", row(commonest_share=1.0, entropy=49.9), row(commonest_share=1.0, entropy=50.0)),
        ("distinct", row(distinct_share=0.22, entropy=49.0), row(distinct_share=0.23, entropy=49.0)),  # 0.225
        ("distinct", row(distinct_share=0.01, entropy=49.9), row(distinct_share=0.01, entropy=50.0)),
        ("length", row(response_length=9.9, entropy=24.75), row(response_length=10.0, entropy=25.0)),
        ("length_high", row(response_length=80.1, entropy=200.25), row(response_length=80.0, entropy=200.0)),
        ("unfinished", row(num_eos_tokens=59), row(num_eos_tokens=60)),  # 8/128 + 0.5 · 120/128 = 68/128
        ("kl_per_token", row(kl_per_token=1.13), row(kl_per_token=1.125)),
        ("repetition", row(repetition=0.53), row(repetition=0.52)),  # 0.04 + 0.5 · 0.96
        ("entropy_low", row(entropy=9.9), row(entropy=10.1)),  # 0.25 nats a token
        ("entropy_high", row(entropy=160.1), row(entropy=159.9)),  # 4 nats a token
        ("kl_coef", row(kl_coef=0.995, kl=6.1), row(kl_coef=0.985, kl=6.1)),
        ("kl_coef", row(kl_coef=0.01005, kl=5.9), row(kl_coef=0.0102, kl=5.9)),
        ("negative_kl", row(kl=-1.1), row(kl=-1.0)),
    ],
)
def test_each_guard_at_its_limit(guard: str, bad: dict[str, float], good: dict[str, float]):
    """And none but this one."""
    assert names(bad) == [guard]
    assert names(good) == []


def test_every_guard_has_its_row_here():
    """`kl` and the guards that read several updates have tests of their own below."""
    marks = test_each_guard_at_its_limit.pytestmark[0].args[1]
    others = {"kl", "over_optimization", "between_prompts"}
    assert {guard for guard, *_ in marks} | others == set(GUARDS) == set(DEFAULTS)


def test_a_task_with_few_answers_keeps_its_room():
    """Labels: 60% of the first responses are the same; 79% later is no alarm, 81% is."""
    start = row(commonest_share=0.6, distinct_share=0.02)
    assert names(row(commonest_share=0.79, distinct_share=0.02, entropy=10.1), start) == []
    assert names(row(commonest_share=0.81, distinct_share=0.02, entropy=10.1), start) == ["collapse"]


def test_empty_responses_are_no_collapse_of_their_own():
    """empty_share is a float32 mean, so it differs from the commonest share by rounding."""
    assert names(row(commonest_share=0.9, empty_share=0.8999999762, entropy=20.0)) == ["empty"]
    assert names(row(commonest_share=0.9, empty_share=0.1, entropy=20.0)) == ["collapse"]


def test_collapse_stops_unless_a_recipe_says_otherwise():
    bad = row(commonest_share=0.95, entropy=40.0)
    assert [alarm.action for alarm in found(bad)] == ["stop"]
    assert [alarm.action for alarm in found(bad, collapse={"limit": 0.6})] == ["stop"]
    assert [alarm.action for alarm in found(bad, collapse="warn")] == ["warn"]


@pytest.mark.parametrize("name", sorted(set(SOUND) - {"update"}))
def test_a_metric_that_an_older_run_lacks_is_no_error(name: str):
    """In the update, or in the first update as an older checkpoint has it."""
    less = {key: value for key, value in SOUND.items() if key != name}
    assert names(less) == names(SOUND, less) == []
    bad = row(empty_share=0.6, kl=-2.0)
    assert names(bad, less) == ["empty", "negative_kl"]


def test_entropy_is_a_tokens_not_a_responses():
    """Half the length and half the nats a response are the same policy as before."""
    assert names(row(response_length=20.0, entropy=50.0)) == []
    assert names(row(response_length=20.0, entropy=81.0)) == ["entropy_high"]


def test_a_start_that_repeats_itself_keeps_its_room():
    """Tables or a small language: 60% at the start is no alarm there, nor at 75%; at 85% it is."""
    start = row(repetition=0.6)
    assert names(start, start) == []
    assert names(row(repetition=0.75), start) == []
    assert names(row(repetition=0.85), start) == ["repetition"]


def test_a_start_of_no_entropy_is_no_alarm_of_its_own():
    start = row(entropy=0.0)
    assert names(start, start) == []
    assert names(row(entropy=40.0), start) == []
    assert names(row(entropy=61.0), start) == ["entropy_high"]


def test_beta_at_a_bound_is_an_alarm_only_where_the_kl_drives_it_on():
    assert names(row(kl_coef=1.0, kl=5.0)) == []
    assert names(row(kl_coef=0.01, kl=7.0)) == []
    assert names(row(kl_coef=1.0, kl=7.0), bounds=None) == []  # β fixed
    assert names(row(kl_coef=99.0, kl=7.0), bounds=KLCoefBounds(0.0, None, 6.0)) == []
    assert names(row(kl_coef=0.0, kl=5.0), bounds=KLCoefBounds(0.0, None, 6.0)) == []  # no KL term is no bound


def test_kl_is_early_stopping_and_off_unless_asked_for():
    far = row(kl=61.0, update=7)
    assert names(far) == []
    assert [(alarm.name, alarm.action) for alarm in found(far, kl="stop")] == [("kl", "stop")]
    assert names(row(kl=60.0), kl="stop") == []
    assert names(row(kl=31.0), kl={"limit": 30}) == ["kl"]  # a limit alone warns


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty_share", ["empty"]),
        ("response_length", ["length", "length_high", "entropy_low", "entropy_high"]),
        ("repetition", ["repetition"]),
        ("entropy", ["entropy_low", "entropy_high"]),
        ("kl", ["negative_kl", "kl"]),
        ("kl_per_token", ["kl_per_token"]),
    ],
)
def test_a_figure_that_is_nan_is_an_alarm(name: str, expected: list[str]):
    """Comparisons with NaN are false, so a guard written the other way round would be silent."""
    assert names(row(**{name: math.nan}), kl="warn") == expected


def test_the_message_is_one_line_with_the_numbers_and_the_remedy():
    (alarm,) = found(row(response_length=8.0, entropy=20.0, update=12), length="stop")
    assert alarm.action == "stop"
    assert alarm.message == (
        "guards.length: update 12: the mean response length is 8 tokens; the limit is 10 (0.25 × the first update's 40)."
        " Short responses cost little KL, which PPO can exploit: set min_new_tokens or kl_per=token, or lower kl_coef"
    )


def test_remedies_name_options_that_exist():
    """Every word with an underscore in a remedy is a field of PPO's, or of the recipe's reward."""
    from salsa_peft.config.schema import Reward
    from salsa_peft.training.ppo.config import SalsaPPOConfig

    fields = {*SalsaPPOConfig.__dataclass_fields__, *Reward.__dataclass_fields__}
    for guard in GUARDS.values():
        words = [word.strip(",;.()").split("=")[0] for word in guard.remedy.split() if "_" in word]
        assert set(words) <= set(fields)
        assert "\n" not in guard.remedy


def test_what_a_recipe_may_say():
    said = {
        "empty": "off", "length": False, "repetition": "stop", "entropy_low": {"limit": 0},
        "entropy_high": {"action": "stop", "limit": 3}, "kl": {"action": "stop"}, "kl_coef": {"action": False},
    }  # fmt: skip
    assert parse_guards(said) == {
        "empty": GuardSetting("off", 0.5),
        "collapse": GuardSetting("stop", 0.5),
        "distinct": GuardSetting("warn", 0.25),
        "length": GuardSetting("off", 0.25),
        "length_high": GuardSetting("warn", 2.0),
        "unfinished": GuardSetting("warn", 0.5),
        "repetition": GuardSetting("stop", 0.5),
        "entropy_low": GuardSetting("warn", 0.0),
        "entropy_high": GuardSetting("stop", 3.0),
        "kl_coef": GuardSetting("off", 0.01),
        "negative_kl": GuardSetting("warn", 1.0),
        "kl": GuardSetting("stop", 60.0),
        "kl_per_token": GuardSetting("warn", 1.0),
        "over_optimization": GuardSetting("warn", 5.0),
        "between_prompts": GuardSetting("warn", 0.45),
    }
    actions = {name: setting.action for name, setting in parse_guards({}).items()}
    assert actions == dict.fromkeys(GUARDS, "warn") | {"kl": "off", "collapse": "stop"}
    assert parse_guards({"collapse": {"limit": 0.9}})["collapse"] == GuardSetting("stop", 0.9)


def test_off_is_silent():
    assert names(row(empty_share=1.0), empty="off") == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"lenght": "warn"}, r"^guards: unknown guard 'lenght'; did you mean length\?$"),
        ({"x": "warn"}, "guards: empty, collapse, distinct, length"),
        (
            {1: "warn"},
            "guards: unknown guard 1; guards: empty, collapse, distinct, length, length_high, unfinished, repetition, entropy_low, ",
        ),
        ({"length": "halt"}, r"guards\.length: must be off, warn or stop, not 'halt'"),
        ({"length": True}, r"guards\.length: must be off, warn or stop, not True"),
        ({"length": 0.3}, r"guards\.length: must be off, warn or stop, not 0\.3"),
        ({"length": None}, r"guards\.length: must be off, warn or stop, not None"),
        ({"length": {}}, r"guards\.length: is empty; give an action, a limit or both"),
        ({"length": {"limits": 1}}, r"guards\.length: unknown key 'limits'; the keys are action and limit"),
        ({"length": {"limit": 1.1}}, r"guards\.length\.limit: must be a number from 0 to 1, not 1\.1"),
        ({"kl": {"limit": -1}}, r"guards\.kl\.limit: must be a number of at least 0, not -1"),
        ({"kl": {"limit": math.nan}}, r"guards\.kl\.limit: must be a number of at least 0, not nan"),
        ({"kl": {"limit": math.inf}}, r"guards\.kl\.limit: must be a number of at least 0, not inf"),
        ({"kl": {"limit": True}}, r"guards\.kl\.limit: must be a number of at least 0, not True"),
        ({"kl": {"limit": "30"}}, r"guards\.kl\.limit: must be a number of at least 0, not '30'"),
        ({"kl": {"action": "halt"}}, r"guards\.kl\.action: must be off, warn or stop, not 'halt'"),
        (["length"], r"guards: must be a mapping such as \{length: stop\}, not \['length'\]"),
    ],
)
def test_what_a_recipe_may_not_say(said: dict, message: str):
    with pytest.raises(ValueError, match=message):
        parse_guards(said)


def test_guards_reach_the_recipe_from_the_command_line():
    """`off` is text in our YAML."""
    options = ["ppo.guards={length: off, kl: {action: stop, limit: 30}}"]
    recipe = load_recipe("quickstart", lora="lora", overrides=options).recipe
    assert parse_guards(recipe.ppo.guards)["length"].action == "off"
    assert parse_guards(recipe.ppo.guards)["kl"] == GuardSetting("stop", 30.0)


BAD = {"empty_share": 0.9}


def spoken(monitor: GuardMonitor, rows: list[dict[str, float]]) -> list[int]:
    """Updates at which it said something."""
    return [int(one["update"]) for one in rows if monitor.check(one)]


def series(bad: set[int], length: int) -> list[dict[str, float]]:
    """Updates 1 … length, those in `bad` with empty responses."""
    return [row(update=update, **(BAD if update in bad else {})) for update in range(1, length + 1)]


def test_a_warning_is_said_once_and_again_when_it_was_gone():
    """At its onset (3); 4 to 20 are the same one, for between them are no ten calm updates; 31 is a new one after 21 to 30."""
    monitor = GuardMonitor(parse_guards({}), BOUNDS)
    assert spoken(monitor, series({3, 4, 5, 9, 11, 20, 31, 32}, 40)) == [3, 31]


def test_nine_calm_updates_are_not_yet_gone():
    assert spoken(GuardMonitor(parse_guards({})), series({3, 13, 24}, 30)) == [3, 24]


def test_two_warnings_are_told_apart():
    monitor = GuardMonitor(parse_guards({}))
    assert [alarm.name for alarm in monitor.check(row(**BAD))] == ["empty"]
    assert [alarm.name for alarm in monitor.check(row(**BAD, kl=-5.0))] == ["negative_kl"]


def test_a_stop_is_said_each_time():
    """A run that goes on from the checkpoint of a stop must stop again."""
    monitor = GuardMonitor(parse_guards({"empty": "stop"}))
    assert spoken(monitor, series({2, 3}, 4)) == [2, 3]


def test_the_first_update_is_the_start():
    monitor = GuardMonitor(parse_guards({}))
    assert monitor.check(row(update=1)) == []
    assert (
        monitor.check(row(update=2, response_length=11.0, entropy=27.5)) == []
    )  # no new start, or the next would pass
    assert [alarm.name for alarm in monitor.check(row(update=3, response_length=9.0, entropy=22.5))] == ["length"]


@pytest.mark.parametrize("killed", [1, 3, 4, 9, 20, 30])
def test_a_resumed_run_says_what_an_unbroken_one_says(killed: int):
    """The state goes through JSON; without it update 4 would warn again, and a later start would hide a short length."""
    rows = series({3, 4, 5, 9, 31}, 33)
    rows[19] = row(update=20, response_length=9.0, entropy=22.5)
    rows[9] = row(update=10, response_length=20.0, entropy=50.0)
    unbroken, first, second = (
        GuardMonitor(parse_guards({})),
        GuardMonitor(parse_guards({})),
        GuardMonitor(parse_guards({})),
    )
    expected = [unbroken.check(one) for one in rows]
    said = [first.check(one) for one in rows[:killed]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert said + [second.check(one) for one in rows[killed:]] == expected
    assert [int(one["update"]) for one, alarm in zip(rows, expected, strict=True) if alarm] == [3, 20, 31]
    assert second.state_dict() == unbroken.state_dict()
    assert set(second.state_dict()["start"]) == set(START)


def test_a_state_is_a_copy():
    monitor = GuardMonitor(parse_guards({}))
    monitor.check(SOUND)
    state = monitor.state_dict()
    monitor.check(row(**BAD))
    assert state["quiet"] == {} and len(state["recent"]) == 1


def test_a_state_from_before_a_metric_existed():
    """The metric's first value is then its start."""
    monitor = GuardMonitor(parse_guards({}))
    start = {f"objective/{name}": SOUND[f"objective/{name}"] for name in ("response_length", "entropy", "repetition")}
    monitor.load_state_dict({"start": start, "quiet": {"length": 3}})
    assert monitor.check(row(update=9, commonest_share=0.6, entropy=40.0)) == []
    assert monitor.check(row(update=10, commonest_share=0.75, entropy=40.0)) == []
    assert [alarm.name for alarm in monitor.check(row(update=11, commonest_share=0.81, entropy=40.0))] == ["collapse"]
    assert set(monitor.state_dict()["start"]) == set(START)


def scored(held_out: list[float], scores: list[float] | None = None) -> list[dict[str, float]]:
    """Updates with these held-out scores, whose scores rise by 0.1 each unless given."""
    rising = [0.1 * update for update in range(len(held_out))]
    return [
        row(update, held_out_score=held, scores=score)
        for update, (held, score) in enumerate(zip(held_out, scores or rising, strict=True), 1)
    ]


def test_a_jump_of_the_kl_per_token():
    """More than 4 × the median of 20 updates, and more than a quarter of the limit above the first update's 0.05."""

    def jumps(usual: float, last: float, updates: int = RECENT) -> list[int]:
        values = [0.05, *[usual] * (updates - 2), last]
        rows = [row(update, kl_per_token=value) for update, value in enumerate(values, 1)]
        return spoken(GuardMonitor(parse_guards({})), rows)

    assert jumps(0.1, 0.41) == [RECENT]
    assert jumps(0.1, 0.4) == jumps(0.1, 0.41, updates=RECENT - 1) == []
    assert jumps(0.05, 0.31) == [RECENT]
    assert jumps(0.05, 0.3) == []


def test_over_optimization_by_hand():
    """1, 0, 1, … has windows of 0.6 and 0.4, and σ = √½: a fall of 0.2 is 0.2 / (√0.4 · √0.5) = 0.447 standard errors."""
    rows = scored([1.0, 0.0] * 5)
    assert WINDOW == 5
    assert spoken(GuardMonitor(parse_guards({"over_optimization": {"limit": 0.44}})), rows) == [6]
    assert spoken(GuardMonitor(parse_guards({"over_optimization": {"limit": 0.45}})), rows) == []


def test_over_optimization_is_a_fall_beyond_noise_while_the_score_rises():
    noise = [0.02, -0.01, 0.0, -0.02, 0.01]
    level, risen, fallen = ([mean + one for one in noise * 2] for mean in (0.6, 0.7, 0.5))
    monitor = GuardMonitor(parse_guards({}))
    assert spoken(monitor, scored(level + risen + fallen))[:1] == [24]
    assert spoken(GuardMonitor(parse_guards({})), scored(fallen + level + risen)) == []  # it only rises
    assert spoken(GuardMonitor(parse_guards({})), scored(level + risen + level[:4] + fallen[:0])) == []
    falling = [-0.1 * update for update in range(30)]
    assert spoken(GuardMonitor(parse_guards({})), scored(level + risen + fallen, falling)) == []  # both fall
    without = [{key: value for key, value in one.items() if "held_out" not in key} for one in scored(level + fallen)]
    assert spoken(GuardMonitor(parse_guards({})), without) == []


def test_over_optimization_of_a_constant_score():
    """A reward that gives 0 to everything has no noise, and no alarm; a fall to such a constant has one."""
    assert spoken(GuardMonitor(parse_guards({})), scored([0.0] * 30)) == []
    assert spoken(GuardMonitor(parse_guards({})), scored([0.5] * 5 + [0.0] * RECENT + [0.0] * 9))[:1] != []


def test_the_message_of_over_optimization():
    rows = scored([0.6] * 10 + [0.2] * RECENT)
    monitor = GuardMonitor(parse_guards({}))
    message = next(alarm.message for one in rows for alarm in monitor.check(one))
    assert message.startswith("guards.over_optimization: update ")
    assert "the held-out score fell from its best, 0.6 at update 5, to 0.2" in message
    assert "train no longer than until then (max_steps)" in message and "\n" not in message


def low(share: float | None, explained: list[float], given: float | None = None) -> list[int]:
    """Updates with an alarm of between_prompts. share: of each batch; given: that of reward_quality."""
    more = {} if share is None else {"between_prompt_share": share}
    monitor = GuardMonitor(parse_guards({}))
    monitor.between_prompt_share = given
    rows = [row(update, explained_variance=value, **more) for update, value in enumerate(explained, 1)]
    return [int(one["update"]) for one in rows if [alarm.name for alarm in monitor.check(one)] == ["between_prompts"]]


def test_scores_that_lie_between_prompts_and_a_value_function_that_does_not_learn_them():
    """Once, with the tenth update; the share at its limit and a median explained variance of half of it are no alarm."""
    assert SEVERAL == 10
    assert low(0.46, [0.2] * 30) == low(0.5, [0.249] * 30) == [10]
    assert low(0.45, [0.2] * 30) == low(0.5, [0.25] * 30) == []
    assert low(0.9, [0.9] * 4 + [-1.0] * 6) == [10]
    assert low(0.9, [0.9] * 6 + [-1.0] * 4) == []
    assert low(0.9, [-1.0] * 9) == []


def test_the_share_is_the_batchs_or_else_that_of_reward_quality():
    assert low(None, [-1.0] * 12, given=0.8) == [10]
    assert low(0.4, [-1.0] * 12, given=0.8) == low(None, [-1.0] * 12) == low(None, [-1.0] * 12, given=0.4) == []


def test_a_resumed_run_remembers_scores_and_explained_variances():
    """The newest RECENT updates and the best window go through JSON."""
    rows = scored([0.6] * 12 + [0.2] * 12)
    for one in rows:
        one |= {"val/explained_variance": 0.0, "objective/between_prompt_share": 0.9}
    unbroken, first, second = (GuardMonitor(parse_guards({})) for _ in range(3))
    expected = [unbroken.check(one) for one in rows]
    said = [first.check(one) for one in rows[:8]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert said + [second.check(one) for one in rows[8:]] == expected
    assert [alarm.name for alarms_ in expected for alarm in alarms_] == ["between_prompts", "over_optimization"]
    assert len(unbroken.state_dict()["recent"]) == RECENT


def test_repetition_by_hand():
    """abababab: 5 4-grams, 2 of them different; abcdefgh: 5 different; abc: none; all in one batch, and what is masked is not read."""
    import torch

    ids = torch.tensor(
        [[1, 2, 1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 0, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0]]
    )
    mask = torch.arange(8) < torch.tensor([8, 8, 3, 1])[:, None]
    assert repetition(token_lists(ids[:1], mask[:1])) == pytest.approx(0.6)
    assert repetition(token_lists(ids, mask)) == pytest.approx(0.6 / 4)
    assert repetition(token_lists(ids[:1], mask[:1]), n=2) == pytest.approx(1 - 2 / 7)
    assert repetition(ids[2:].tolist()) == pytest.approx((1 / 5 + 3 / 5) / 2)


def test_repetition_of_a_gram_in_two_responses_is_none():
    """The same answer to every prompt is no loop."""
    import torch

    ids = torch.arange(6).repeat(4, 1)
    assert repetition(ids.tolist()) == 0.0


def test_variety_by_hand():
    """Five responses, three of them different; one is given three times. A response that goes on is another one."""
    assert variety([[1, 2], [3], [1, 2], [1, 2, 4], [1, 2]]) == (0.6, 0.6)
    assert variety([[1], [2], [3], [4]]) == (1.0, 0.25)
    assert variety([[7]] * 8) == (0.125, 1.0)


PAIRS = [[prompt] for prompt in range(8) for _ in range(2)]


def test_between_prompt_share_by_hand():
    """Means 0 … 7 with scores ±1 around them: MSB = 2 · 6, MSW = 2, σ²_b = 5, so 5/7."""
    scores = [prompt[0] + sign for prompt, sign in zip(PAIRS, [1, -1] * 8, strict=True)]
    assert between_prompt_share(PAIRS, scores) == pytest.approx(5 / 7)
    assert between_prompt_share(PAIRS, [float(prompt[0]) for prompt in PAIRS]) == 1.0
    assert between_prompt_share(PAIRS, [0.0, 1.0] * 8) == 0.0  # less between prompts than chance gives
    assert between_prompt_share(PAIRS, [1.5] * 16) is None
    # prompts of one response do not count, and are too many if they are the most
    alone = [[100 + prompt] for prompt in range(17)]
    assert between_prompt_share(PAIRS + alone[:16], [*scores, *[50.0] * 16]) == pytest.approx(5 / 7)
    assert between_prompt_share(PAIRS + alone, [*scores, *[50.0] * 17]) is None
    assert between_prompt_share(PAIRS[:14], scores[:14]) is None  # seven prompts are too few


def test_between_prompt_share_with_groups_of_several_sizes():
    """Against the definition: n₀ of 4 groups of 2 and 4 of 4 is (24 − 80/24) / 7."""
    sizes = [2, 4] * 4
    prompts = [[number] for number, size in enumerate(sizes) for _ in range(size)]
    scores = [float(3 * number + place % 2) for number, size in enumerate(sizes) for place in range(size)]
    mean = sum(scores) / 24
    between = sum(size * (3 * number + 0.5 - mean) ** 2 for number, size in enumerate(sizes)) / 7
    within = 24 * 0.25 / 16
    variance = (between - within) / ((24 - 80 / 24) / 7)
    assert between_prompt_share(prompts, scores) == pytest.approx(variance / (variance + within))


def test_guards_import_no_torch():
    """A recipe is parsed and refused within two seconds."""
    code = "import salsa_peft.training.ppo.guards.monitor, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
