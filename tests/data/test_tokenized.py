"""The data stage's results: what TRL's trainers would tokenize, cut as they cut, the same bytes each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trl_rows import by_reward, tokenizer_of

from salsa_peft.config.schema import Source
from salsa_peft.data import datasets, tokenized
from salsa_peft.utils.errors import SalsaError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    import tiny

    return tiny.make_base(tokenizer_of(CHATML), max_position_embeddings=1024)


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Source]:
    """Rows → a jsonl file as a Source."""

    def make(*rows: dict[str, Any]) -> Source:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(path=str(tmp_path / "rows.jsonl"))

    return make


DEMONSTRATIONS = [{"messages": chat("owl " * n, "saw " * (n + 2), "more", "end")} for n in range(1, 30)]
PAIRS = [{"chosen": chat(f"q{n // 2} " * (n // 2 + 1), "yes"), "rejected": chat(f"q{n // 2} " * (n // 2 + 1), f"no {n} " * n)} for n in range(1, 30)]  # fmt: skip


def ignore(done: int, total: int) -> None:
    """No progress bar."""


class TestDemonstrations:
    @pytest.mark.parametrize("longest", [1, 12, 40, 60, 10_000])
    def test_cut_as_row_by_row(self, source: Any, tmp_path: Path, longest: int) -> None:
        """TRL's two steps by hand: cut both columns, then leave out rows without a token that counts; of a subset too."""
        tokenizer = tokenizer_of(CHATML)
        facts = tokenized.write_demonstrations(source(*DEMONSTRATIONS), tokenizer, tmp_path, ignore)
        rows = tokenized.load(tmp_path)
        assert facts == {"rows": 29, "tokens": sum(len(row["input_ids"]) for row in rows)}
        for part in (rows, rows.select([7, 3, 21])):
            cut = [(row["input_ids"][:longest], row["labels"][:longest]) for row in part]
            expected = [row for row in cut if any(label != -100 for label in row[1])]
            found = tokenized.cut_demonstrations(part, longest)
            assert [(row["input_ids"], row["labels"]) for row in found] == expected

    def test_the_cut_at_every_answers_start(self, source: Any, tmp_path: Path) -> None:
        """A row stays as soon as one token of an answer is within the limit."""
        tokenized.write_demonstrations(source(DEMONSTRATIONS[3]), tokenizer_of(CHATML), tmp_path, ignore)
        rows = tokenized.load(tmp_path)
        first = next(place for place, label in enumerate(rows[0]["labels"]) if label != -100)
        assert [len(tokenized.cut_demonstrations(rows, limit)) for limit in (first, first + 1)] == [0, 1]

    def test_nothing_is_copied_that_fits(self, source: Any, tmp_path: Path) -> None:
        tokenized.write_demonstrations(source(*DEMONSTRATIONS), tokenizer_of(CHATML), tmp_path, ignore)
        rows = tokenized.load(tmp_path)
        assert tokenized.cut_demonstrations(rows, 10_000) is rows


class TestPreferences:
    def test_ids_are_the_reward_trainers(self, source: Any, tiny_model: Any, tmp_path: Path) -> None:
        tokenizer = tokenizer_of(CHATML)
        facts = tokenized.write_preferences(source(*PAIRS), tokenizer, tmp_path / "made", ignore)
        rows = tokenized.load(tmp_path / "made")
        plain = datasets.to_dataset(datasets.preferences(source(*PAIRS), tokenizer))
        theirs = by_reward(tokenizer, tiny_model, plain, tmp_path)
        assert [{name: row[name] for name in tokenized.PAIR_TOKENS} for row in rows] == theirs
        assert facts["rows"] == 29 and facts["prompts"] == len({row["chosen"][0]["content"] for row in rows}) == 15
        assert facts["tokens"] == sum(len(ids) for row in theirs for ids in row.values())

    @pytest.mark.parametrize("longest", [1, 40, 90, 10_000])
    def test_pairs_that_fit(self, source: Any, tmp_path: Path, longest: int) -> None:
        """Both sides count."""
        tokenized.write_preferences(source(*PAIRS), tokenizer_of(CHATML), tmp_path, ignore)
        rows = tokenized.load(tmp_path)
        fits = [row for row in rows if max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= longest]
        assert list(tokenized.pairs_that_fit(rows, longest)) == fits

    def test_chats_stay_as_they_are(self, source: Any, tmp_path: Path) -> None:
        """Objects of different keys, tools, options: what dpo and kto read."""
        given = [
            {**PAIRS[0], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}]},
            {**PAIRS[3], "chat_template_kwargs": {"date": "today"}},
        ]
        tokenizer = tokenizer_of(CHATML)
        tokenized.write_preferences(source(*given), tokenizer, tmp_path, ignore)
        found = list(tokenized.load(tmp_path).remove_columns([*tokenized.PAIR_TOKENS, "prompt_digest"]))
        assert found == list(datasets.to_dataset(datasets.preferences(source(*given), tokenizer)))

    def test_a_single_prompt_is_refused_before_anything_trains(self, source: Any, tmp_path: Path) -> None:
        same = source(*({"prompt": "q", "chosen": f"a{n}", "rejected": "b"} for n in range(3)))
        with pytest.raises(
            SalsaError, match=r"rows\.jsonl: all 3 pairs have the same prompt.* add pairs of other prompts$"
        ):
            tokenized.write_preferences(same, tokenizer_of(CHATML), tmp_path, ignore)


@pytest.mark.parametrize(("kind", "rows"), [("demonstrations", DEMONSTRATIONS), ("preferences", PAIRS)])
def test_a_result_is_the_same_bytes_each_time_and_nothing_is_written_beside_it(
    kind: str, rows: list[Any], source: Any, tmp_path: Path
) -> None:
    """Also after map and filter, which would write datasets' caches into the folder of a memory-mapped Dataset."""

    def content(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    for name in ("one", "two"):
        tokenized.WRITERS[kind](source(*rows), tokenizer_of(CHATML), tmp_path / name, ignore)
    assert content(tmp_path / "one") == content(tmp_path / "two") != {}
    found = tokenized.load(tmp_path / "one")
    found.map(lambda row: {"more": 1}).filter(lambda row: True).shuffle(seed=1)[0]
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_progress_is_the_number_of_rows(source: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    tokenized.write_demonstrations(
        source(*DEMONSTRATIONS), tokenizer_of(CHATML), tmp_path, lambda *numbers: seen.append(numbers)
    )
    assert seen == [(place, 29) for place in range(1, 30)]
