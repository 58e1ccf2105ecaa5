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
from salsa_peft.training.ppo.guards import GUARDS, START, GuardMonitor, KLCoefBounds, alarms, repetition

SOUND = {
    "update": 1,
    "objective/empty_share": 0.02,
    "objective/response_length": 40.0,
    "objective/entropy": 100.0,  # 2.5 nats a token
    "objective/repetition": 0.04,
    "objective/kl": 5.0,
    "objective/kl_coef": 0.2,
}
BOUNDS = KLCoefBounds(0.01, 1.0, 6.0)


def row(**changes: float) -> dict[str, float]:
    """SOUND with some figures changed; names without `objective/`."""
    return SOUND | {name if name == "update" else f"objective/{name}": value for name, value in changes.items()}


def names(
    now: dict[str, float], then: dict[str, float] = SOUND, bounds: KLCoefBounds | None = BOUNDS, **said: object
) -> list[str]:
    """Which guards have an alarm."""
    return [alarm.name for alarm in alarms(parse_guards(said), now, then, bounds)]


def test_a_sound_update_has_no_alarm():
    assert names(SOUND) == []


@pytest.mark.parametrize(
    ("guard", "bad", "good"),
    [
        ("empty", row(empty_share=0.51), row(empty_share=0.5)),
        ("length", row(response_length=9.9, entropy=24.75), row(response_length=10.0, entropy=25.0)),
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
    """`kl` has a test of its own below."""
    marks = test_each_guard_at_its_limit.pytestmark[0].args[1]
    assert {guard for guard, *_ in marks} | {"kl"} == set(GUARDS) == set(DEFAULTS)


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
    assert [(alarm.name, alarm.action) for alarm in alarms(parse_guards({"kl": "stop"}), far, SOUND)] == [
        ("kl", "stop")
    ]
    assert names(row(kl=60.0), kl="stop") == []
    assert names(row(kl=31.0), kl={"limit": 30}) == ["kl"]  # a limit alone warns


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("empty_share", ["empty"]),
        ("response_length", ["length", "entropy_low", "entropy_high"]),
        ("repetition", ["repetition"]),
        ("entropy", ["entropy_low", "entropy_high"]),
        ("kl", ["negative_kl", "kl"]),
    ],
)
def test_a_figure_that_is_nan_is_an_alarm(name: str, found: list[str]):
    """Comparisons with NaN are false, so a guard written the other way round would be silent."""
    assert names(row(**{name: math.nan}), kl="warn") == found


def test_the_message_is_one_line_with_the_numbers_and_the_remedy():
    (alarm,) = alarms(parse_guards({"length": "stop"}), row(response_length=8.0, entropy=20.0, update=12), SOUND)
    assert alarm.action == "stop"
    assert alarm.message == (
        "guards.length: update 12: the mean response length is 8 tokens; the limit is 10 (0.25 × the first update's 40)."
        " Short responses cost little KL, which PPO can exploit: set min_new_tokens or kl_per=token, or lower kl_coef"
    )


def test_remedies_name_options_that_exist():
    """Every word with an underscore in a remedy is a field."""
    from salsa_peft.training.ppo.config import SalsaPPOConfig

    fields = SalsaPPOConfig.__dataclass_fields__
    for guard in GUARDS.values():
        words = [word.split("=")[0] for word in guard.remedy.replace(",", " ").replace(";", " ").split() if "_" in word]
        assert set(words) <= set(fields)
        assert "\n" not in guard.remedy


def test_what_a_recipe_may_say():
    said = {
        "empty": "off", "length": False, "repetition": "stop", "entropy_low": {"limit": 0},
        "entropy_high": {"action": "stop", "limit": 3}, "kl": {"action": "stop"}, "kl_coef": {"action": False},
    }  # fmt: skip
    assert parse_guards(said) == {
        "empty": GuardSetting("off", 0.5),
        "length": GuardSetting("off", 0.25),
        "repetition": GuardSetting("stop", 0.5),
        "entropy_low": GuardSetting("warn", 0.0),
        "entropy_high": GuardSetting("stop", 3.0),
        "kl_coef": GuardSetting("off", 0.01),
        "negative_kl": GuardSetting("warn", 1.0),
        "kl": GuardSetting("stop", 60.0),
    }
    assert parse_guards({})["kl"].action == "off"
    assert {name for name, setting in parse_guards({}).items() if setting.action == "warn"} == set(GUARDS) - {"kl"}


def test_off_is_silent():
    assert names(row(empty_share=1.0), empty="off") == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"lenght": "warn"}, r"^guards: unknown guard 'lenght'; did you mean length\?$"),
        ({"x": "warn"}, "guards: empty, length, repetition"),
        (
            {1: "warn"},
            "guards: unknown guard 1; guards: empty, length, repetition, entropy_low, entropy_high, kl_coef, negative_kl, kl",
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
    assert state["quiet"] == {}


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


def test_guards_import_no_torch():
    """A recipe is parsed and refused within two seconds."""
    code = "import salsa_peft.training.ppo.guards, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
