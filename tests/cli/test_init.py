"""`salsa init`: the recipe fits the model and the files, says why, passes a dry run, and nothing is overwritten."""

from __future__ import annotations

import csv
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import SHARED
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from salsa_peft.cli.main import main as salsa
from salsa_peft.config.load import LoadedRecipe, load_recipe
from salsa_peft.config.yaml import read_yaml
from salsa_peft.data.row_formats import DEMONSTRATIONS, PAIR_COLUMNS, PROMPTS

WORDS = " ".join(f"w{n}" for n in range(2000)).split()
Rows = list[dict[str, Any]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base `base` of 512 tokens whose tokenizer has a token for each word, and no template."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
              "intermediate_size": 8, "vocab_size": 10, "max_position_embeddings": 512}  # fmt: skip
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(5)  # some tokenizers are saved so
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    save_file({"model.embed_tokens.weight": np.zeros((10, 8), np.float32)}, tmp_path / "base" / "model.safetensors")
    return tmp_path


def write(path: Path, rows: Rows) -> str:
    """Write rows in the format of the path's suffix. Returns the file's name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            texts = [
                {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
                for row in rows
            ]
            table.writerows(texts)
    return path.name


def chat(question: int, answer: int, number: int) -> Rows:
    """A question and an answer of so many words."""
    return [
        {"role": "user", "content": " ".join([f"q{number}", *WORDS[: question - 1]])},
        {"role": "assistant", "content": " ".join(WORDS[:answer])},
    ]


def demonstrations(rows: int, question: int = 4, answer: int = 6) -> Rows:
    return [{"messages": chat(question, answer, number)} for number in range(rows)]


def pairs(rows: int, question: int = 4, answer: int = 6) -> Rows:
    made = [chat(question, answer, number) for number in range(rows)]
    return [{"prompt": q["content"], "chosen": a["content"], "rejected": "no"} for q, a in made]


@pytest.fixture
def init(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[LoadedRecipe, str]]:
    """Run `salsa init my.yaml WORDS`; the recipe and what was printed."""

    def run(*words: str) -> tuple[LoadedRecipe, str]:
        code = salsa(["init", "my.yaml", *words])
        said = capsys.readouterr()
        assert code == 0 and said.err == "", said.err
        return load_recipe("my.yaml", lora="lora", overrides=[]), said.out

    return run


def plan(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe passes a dry run, which checks every row."""
    assert salsa(["run", file, "--lora", "--dry-run"]) == 0, capsys.readouterr().err
    capsys.readouterr()


def test_lengths_batches_and_questions_by_hand(here: Path, init: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """ChatML as text adds to each turn a word for its mark and role, whose end joins the last word: q + a + 2 words."""
    answers = [100] * 75 + [300] * 22 + [400] * 3
    write(here / "chats.jsonl", [{"messages": chat(40, answer, n)} for n, answer in enumerate(answers)])
    write(here / "pairs.jsonl", pairs(200, question=10, answer=20))
    found, said = init("--model", "base", "--demonstrations", "chats.jsonl", "--preferences", "pairs.jsonl")
    recipe = found.recipe
    assert "chats.jsonl" in read_yaml("my.yaml")["description"]
    assert recipe.model.base == str(here / "base") and found.data["model"]["chat_template"].endswith("zephyr.jinja")
    # of 300 answers 200 have 21 tokens, 75 have 101, 25 more: 90% have at most 101, the next multiple of 16 is 112
    assert recipe.generation.max_new_tokens == 112
    # of 100 chats 75 have 40 + 100 + 2 tokens, 22 have 342, 3 have 442: 95% at most 342, the next multiple of 64 is 384
    assert recipe.model.max_length == 384
    assert "demonstrations: 100 rows, columns messages; tokens of a chat: 50% up to 142, 95% up to 342" in said
    assert "demonstrations: about 3.0% of the rows are longer than 384 tokens and will be cut" in said
    assert "preferences: 200 rows, columns prompt, chosen, rejected; tokens of a chat: 50% up to 32" in said
    # 100 rows / 16 steps: 4. 180 pairs, 9 of them held out: 171 / 16: 8. 180 prompts / 8 updates: 16
    assert (recipe.sft.batch_size, recipe.reward.batch_size, recipe.ppo.batch_size) == (4, 8, 16)
    assert (recipe.sft.num_train_epochs, recipe.ppo.num_train_epochs) == (3, 4)
    assert recipe.evaluate.prompts["own"].split == "train[180:]" and recipe.landscape.limit == 20
    assert {recipe.data.prompts.split, recipe.data.preferences.split} == {"train[:180]"}
    plan("my.yaml", capsys)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_of_rows(here: Path, init: Any, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    """Each set of columns that row_formats knows, in each kind of file: init names the columns, and the plan accepts them."""
    write(here / "chats.jsonl", demonstrations(40))
    write(here / "pairs.jsonl", pairs(40))
    for number, names in enumerate(DEMONSTRATIONS):
        messages = [chat(4, 6, n) for n in range(40)]
        rows: Rows = [{names[0]: turns if len(names) == 1 else turns[0]["content"]} for turns in messages]
        if len(names) == 2:
            rows = [{**row, names[1]: turns[1]["content"]} for row, turns in zip(rows, messages, strict=True)]
        file = write(here / f"d{number}{suffix}", rows)
        _, said = init("--force", "--model", "base", "--demonstrations", file, "--preferences", "pairs.jsonl")
        assert f"demonstrations: 40 rows, columns {', '.join(names)};" in said
    for number, (chosen, rejected) in enumerate(PAIR_COLUMNS):
        rows = [{"question": f"q{n}", chosen: "a b", rejected: "c"} for n in range(40)]
        file = write(here / f"p{number}{suffix}", rows)
        _, said = init("--force", "--model", "base", "--demonstrations", "chats.jsonl", "--preferences", file)
        assert f"preferences: 40 rows, columns question, {chosen}, {rejected};" in said
    for name in PROMPTS:
        whole = name.startswith(("messages", "conversation"))
        value = [chat(3, 2, n)[:1] if whole else [f"q{n}", "more"] if name == "turns" else f"q{n}" for n in range(40)]
        rows = [{name: one} for one in value]
        if name.startswith("chosen"):
            rejected = name.replace("chosen", "rejected")
            rows = [{name: chat(3, 2, n), rejected: chat(3, 1, n)} for n in range(40)]
        file = write(here / f"q{suffix}", rows)
        _, said = init(
            "--force",
            "--model",
            "base",
            "--demonstrations",
            "chats.jsonl",
            "--preferences",
            "pairs.jsonl",
            "--prompts",
            file,
        )
        assert f"prompts: 40 rows, columns {name};" in said
    plan("my.yaml", capsys)


@pytest.mark.parametrize("rows", [2, 3, 9, 33, 500])
def test_few_and_more_rows(here: Path, init: Any, capsys: pytest.CaptureFixture[str], rows: int) -> None:
    """Batches divide and are filled; the evaluation has rows that nothing is trained on."""
    write(here / "chats.jsonl", demonstrations(rows))
    write(here / "pairs.jsonl", pairs(max(3, rows)))
    found, _ = init("--model", "base", "--demonstrations", "chats.jsonl", "--preferences", "pairs.jsonl")
    ppo = found.recipe.ppo
    assert (
        ppo.batch_size % ppo.num_mini_batches == 0
        and (ppo.micro_batch_size or 1) <= ppo.batch_size // ppo.num_mini_batches
    )
    assert found.recipe.sft.batch_size <= max(1, rows // 16) and found.recipe.sft.batch_size <= 16
    plan("my.yaml", capsys)


def test_the_models_template_and_limit(here: Path, init: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own template; ChatML where the tokenizer has its marks; no length beyond the model's."""
    write(here / "chats.jsonl", demonstrations(40, question=300, answer=900))
    write(here / "pairs.jsonl", pairs(40))
    words = ("--model", "base", "--demonstrations", "chats.jsonl", "--preferences", "pairs.jsonl", "--force")
    found, _ = init(*words)
    assert found.recipe.model.max_length == 512 and found.recipe.generation.max_new_tokens == 256
    text = (here / "base" / "tokenizer.json").read_text()
    (here / "base" / "tokenizer.json").write_text(text.replace('"[UNK]": 0', '"[UNK]": 0, "<|im_start|>": 1'))
    assert init(*words)[0].data["model"]["chat_template"].endswith("chatml.jinja")
    (here / "base" / "chat_template.jinja").write_text("{{ messages }}")
    assert init(*words)[0].recipe.model.chat_template == "tokenizer"
    plan("my.yaml", capsys)


def test_a_model_that_is_not_here(here: Path, init: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Characters / 4, and it says so."""
    write(
        here / "chats.jsonl",
        [{"messages": [{"role": "user", "content": "q" * 400}, {"role": "assistant", "content": "a" * 400}]}] * 40,
    )
    found, said = init(
        "--model",
        "nobody/nothing",
        "--demonstrations",
        "chats.jsonl",
        "--preferences",
        "org/pairs",
        "--prompts",
        "chats.jsonl",
    )
    assert (
        found.recipe.generation.max_new_tokens == 112
    )  # (400 characters, <|im_start|>assistant, <|im_end|>) / 4 = 108
    text = (here / "my.yaml").read_text()
    assert "counted as characters / 4" in text.replace("\n  # ", " ")
    assert "nobody/nothing is not on this machine" in said
    assert found.recipe.data.preferences.path == "org/pairs"
    assert found.recipe.model.max_length == 1024  # smollm2's, because the pairs are not known
    plan("my.yaml", capsys)


def test_nothing_is_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, unless --force; a draft that fails its check leaves the old file."""
    (here / "my.yaml").write_text("mine")
    assert salsa(["init"]) == 2
    assert capsys.readouterr().err == "salsa init: my.yaml: exists; give another name, or --force to overwrite it\n"
    write(here / "one.jsonl", pairs(1))
    assert salsa(["init", "--force", "--preferences", "one.jsonl"]) == 2
    assert "my.yaml: line" in capsys.readouterr().err
    assert (here / "my.yaml").read_text() == "mine"
    assert sorted(path.name for path in here.iterdir()) == ["base", "my.yaml", "one.jsonl"]
    assert salsa(["init", "--output", "my.yaml", "--force"]) == 0
    assert read_yaml("my.yaml")["name"] == "my"


def test_all_wrong_options_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in a line that names the option."""
    write(here / "pairs.jsonl", pairs(3))
    write(here / "bad.jsonl", [{"prompt": "a", "chosen": 3, "rejected": "c"}])
    assert (
        salsa(
            [
                "init",
                "x.txt",
                "--model",
                "./nope",
                "--demonstrations",
                "pairs.jsonl",
                "--preferences",
                "gone.jsonl",
                "--prompts",
                "a b",
            ]
        )
        == 2
    )
    lines = capsys.readouterr().err.splitlines()
    starts = ["x.txt: a recipe's name ends with .yaml", "--model: there is no folder", "--demonstrations: 'pairs.jsonl' has the columns",
              "--preferences: there is no file or folder", "--prompts: 'a b' is no file, folder or Hub id"]  # fmt: skip
    assert len(lines) == len(starts) and all(
        line.startswith(f"salsa init: {start}") for line, start in zip(lines, starts, strict=True)
    )
    assert salsa(["init", "--preferences", "bad.jsonl"]) == 2
    assert "bad.jsonl, row 1, chosen" in capsys.readouterr().err
    assert salsa(["init", "a.yaml", "--output", "b.yaml"]) == 2
    assert not list(here.glob("*.yaml"))


def test_the_bundled_recipes(init: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without files the settings stay, but for the judge, which is left to a comment; quickstart takes no files."""
    for start, bundled in (("quickstart", "quickstart"), ("smollm2", "smollm2"), ("llama2", "llama2_full")):
        found, _ = init("--from", start, "--force")
        wanted = {**load_recipe(bundled, lora="lora", overrides=[]).recipe.as_data(), "name": "my"}
        wanted["evaluate"]["judge"] = None
        assert found.recipe.as_data() == wanted
        plan("my.yaml", capsys)
    assert "add: judge: {kind: openai, model: gpt-4-turbo}" in (here / "my.yaml").read_text()
    write(here / "chats.jsonl", demonstrations(3))
    assert salsa(["init", "q.yaml", "--from", "quickstart", "--demonstrations", "chats.jsonl", "--model", "base"]) == 2
    assert "--model, --demonstrations cannot replace; use --from smollm2" in capsys.readouterr().err


def test_paths_are_relative_to_the_recipe(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe in another folder is found to work from anywhere; a folder of files is a source, too."""
    for folder in ("recipes", "pairs"):
        (here / folder).mkdir()
    write(here / "chats.jsonl", demonstrations(20))
    write(here / "pairs" / "train.jsonl", pairs(20))
    assert (
        salsa(
            [
                "init",
                "recipes/mine.yaml",
                "--model",
                "base",
                "--demonstrations",
                "chats.jsonl",
                "--preferences",
                "pairs",
            ]
        )
        == 0
    )
    text = (here / "recipes" / "mine.yaml").read_text()
    assert "../chats.jsonl" in text and "../base" in text and "../pairs" in text and str(here) not in text
    monkeypatch.chdir("/")
    capsys.readouterr()
    plan(str(here / "recipes" / "mine.yaml"), capsys)


def test_every_key_has_a_comment(init: Any, here: Path) -> None:
    """From the schema's docstrings, with the reason for what was filled in; lines are short."""
    write(here / "chats.jsonl", demonstrations(20))
    init("--model", "base", "--demonstrations", "chats.jsonl", "--preferences", "org/pairs")
    lines = (here / "my.yaml").read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(r"(  )?\w+:", line) and not line.startswith(("  ppo:", "  salsa:", "  ppo-shrunk:")):
            assert above.lstrip().startswith("#"), line
    assert "  # Number of rows in an optimizer step over all processes. Here: 20 steps in a pass over 20 rows." in lines
    assert max(len(line) for line in lines[1:]) <= 120


def test_no_torch(here: Path) -> None:
    """Nor Transformers; a prompt column is found in another process than this one."""
    write(here / "chats.jsonl", demonstrations(20))
    write(here / "pairs.csv", pairs(20))
    script = (
        "import sys; from salsa_peft.cli.main import main\n"
        "code = main(['init', '--model', 'base', '--demonstrations', 'chats.jsonl', '--preferences', 'pairs.csv'])\n"
        "assert not {'torch', 'transformers', 'peft', 'trl'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs real rows")
def test_real_rows(init: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """999 chats and 300 pairs."""
    files = (
        "--demonstrations",
        str(SHARED / "data" / "demonstrations.jsonl"),
        "--preferences",
        str(SHARED / "data" / "preferences.jsonl"),
    )
    found, said = init("--from", "smollm2", *files)
    assert "demonstrations: 999 rows, columns messages" in said and "preferences: 300 rows" in said
    assert found.recipe.model.max_length == 2048 and found.recipe.evaluate.prompts["own"].split == "train[270:]"
    plan("my.yaml", capsys)
