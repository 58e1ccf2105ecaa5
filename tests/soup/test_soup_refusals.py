"""Every refusal of a soup of adapters, in one line that names the folder; and which warnings let pass."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from soup_members import Q0, WEIGHTS, edit, edit_tensors, train

from salsa_peft.soup.__main__ import main
from salsa_peft.soup.average import soup
from salsa_peft.soup.lora.read import read_config
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import locked


def drop(key: str) -> Callable[[Path], None]:
    return lambda member: edit_tensors(member, lambda tensors: tensors.pop(f"base_model.model.{key}"))


def put(key: str, shape: tuple[int, ...] = (2, 2), dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    return lambda member: edit_tensors(
        member, lambda t: t.update({f"base_model.model.{key}": torch.zeros(shape, dtype=dtype)})
    )


def poison(member: Path) -> None:
    edit_tensors(member, lambda tensors: tensors[f"base_model.model.{Q0}.lora_A.weight"].view(-1)[3:4].fill_(math.nan))


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda member: (member / old).rename(member / new)


def truncate(member: Path) -> None:
    path = member / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def configure(**fields: object) -> Callable[[Path], None]:
    return lambda member: edit(member, **fields)


def other_base(member: Path) -> None:
    edit(member, base_model_name_or_path="org/other")
    (member / "fingerprint.json").unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda member: (member / name).write_text(text)


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "dora": (configure(use_dora=True), "use_dora is True: a DoRA delta is not linear"),
    "dora tensor": (
        put(f"{Q0}.lora_magnitude_vector.weight", (16,)),
        f"{Q0}.lora_magnitude_vector.weight: a DoRA delta",
    ),
    "lora_bias": (
        configure(lora_bias=True),
        f"{Q0}.lora_B.bias is not in the file, but adapter_config.json has lora_bias True",
    ),
    "lora_bias tensor": (
        put(f"{Q0}.lora_B.bias", (16,)),
        f"{Q0}.lora_B.bias is in the file, but adapter_config.json has lora_bias False",
    ),
    "bias": (configure(bias="some"), "bias is 'some'; use one of none, all, lora_only"),
    "bias tensor": (put(f"{Q0}.base_layer.bias", (16,)), f"{Q0}.base_layer.bias: adapter_config.json has bias 'none'"),
    "bias of one": (
        lambda m: [configure(bias="all")(m), put(f"{Q0}.base_layer.bias", (16,))(m)],
        f" has no {Q0}.bias, but ",
    ),
    "another tuner": (configure(peft_type="IA3"), "peft_type is 'IA3'; only LoRA adapters (peft_type 'LORA')"),
    "trainable tokens": (
        configure(trainable_token_indices=[1]),
        "has no token_adapter.trainable_tokens_delta, but",
    ),
    "token tensor": (
        put("model.embed_tokens.token_adapter.trainable_tokens_delta"),
        "trainable_tokens_delta: these are rows of trained tokens, but adapter_config.json has no trainable_token_indices",
    ),
    "token rows": (
        lambda m: [
            configure(trainable_token_indices=[1])(m),
            put("model.embed_tokens.token_adapter.trainable_tokens_delta", (2, 16))(m),
        ],
        "trainable_tokens_delta has 2 rows, but trainable_token_indices name 1 tokens",
    ),
    "modules_to_save": (configure(modules_to_save=["score"]), "has no tensor of modules_to_save ['score']"),
    "saved by one": (
        lambda m: [configure(modules_to_save=["score"])(m), put("score.weight")(m)],
        " has no score.weight, but ",
    ),
    "saved embeddings of one": (put("model.embed_tokens.weight"), " has no model.embed_tokens.weight, but"),
    "saved parameter": (
        put("model.embed_tokens.scale"),
        "embed_tokens.scale: unknown tensor, which belongs to none of modules_to_save (None)",
    ),
    "embedding lora alone": (
        lambda m: [
            configure(target_modules=["q_proj", "v_proj", "embed_tokens"])(m),
            put("model.embed_tokens.lora_embedding_A")(m),
        ],
        "has lora_embedding_A, but both lora_embedding_A and lora_embedding_B are needed",
    ),
    "kinds of fields": (configure(target_modules=3), "target_modules is 3, which is not a list or str"),
    "regex": (configure(target_modules="(q_proj"), "target_modules is not a regular expression"),
    "pattern": (configure(rank_pattern={"(q": 3}), "rank_pattern or alpha_pattern holds an invalid regular expression"),
    "manifest": (
        lambda m: (m / "manifest.json").write_text(json.dumps({"files": {WEIGHTS: {"size": 1, "sha256": "0"}}})),
        ": differs from its manifest.json in size or SHA-256 (changed: adapter_model.safetensors)",
    ),
    "manifest, missing": (
        lambda m: (m / "manifest.json").write_text(
            json.dumps({"files": {"tokenizer.json": {"size": 1, "sha256": "0"}}})
        ),
        ": differs from its manifest.json in size or SHA-256 (missing: tokenizer.json)",
    ),
    "layer_replication": (
        configure(layer_replication=[[0, 2], [0, 2]]),
        "layer_replication is [[0, 2], [0, 2]]: it repeats layers of the base",
    ),
    "unknown option": (
        configure(use_warp=True),
        "use_warp is True. This version of salsa-peft does not know the option",
    ),
    "unknown configuration": (
        configure(warp_config={"a": 1}),
        "warp_config is {'a': 1}. This version of salsa-peft does not know the option",
    ),
    "aLoRA": (configure(alora_invocation_tokens=[1]), "alora_invocation_tokens are [1], but None in "),
    "PEFT 0.2": (
        configure(enable_lora=[True, False]),
        "enable_lora is [True, False]: this is fused-layer LoRA of PEFT 0.2",
    ),
    "LoRA-GA": (configure(init_lora_weights="lora_ga"), "'lora_ga', which changes the weights of the base"),
    "two adapters": (
        put(f"{Q0}.lora_A.default.weight", (2, 16)),
        f"are two names of the tensor base_model.model.{Q0}.lora_A.weight; save the adapter again",
    ),
    "two adapters by name": (
        lambda m: [put(f"{Q0}.lora_A.{name}.weight", (2, 16))(m) for name in ("one", "two")],
        "the file has the tensors of 2 adapters (one, two), expected one",
    ),
    "pissa": (configure(init_lora_weights="pissa"), "'pissa', which changes the weights of the base"),
    "bad option": (configure(layers_pattern="layers", layers_to_transform=None), "is not a valid LoRA configuration"),
    "alpha": (configure(lora_alpha="x"), f"adapter_config.json: {Q0} has rank 2 and alpha 'x'; the rank must be"),
    "not json": (write("adapter_config.json", "{"), "adapter_config.json: not valid JSON"),
    "list": (write("adapter_config.json", "[]"), "adapter_config.json: the JSON is a list, but must be a mapping"),
    "deep json": (write("adapter_config.json", "[" * 100_000), "adapter_config.json: not valid JSON"),
    "no config": (
        rename("adapter_config.json", "x"),
        "holds neither an adapter (adapter_config.json) nor a checkpoint (config.json)",
    ),
    "no weights": (rename("adapter_model.safetensors", "x"), "adapter_model.safetensors is missing"),
    "pickled": (
        rename("adapter_model.safetensors", "adapter_model.bin"),
        "a pickle, which is never read because it can run code",
    ),
    "truncated": (truncate, "adapter_model.safetensors: truncated or damaged: "),
    "not safetensors": (
        write(WEIGHTS, "nonsense that is long enough"),
        "adapter_model.safetensors: not a safetensors file, or damaged",
    ),
    "empty": (lambda m: edit_tensors(m, lambda tensors: tensors.clear()), "holds no tensors"),
    "nan": (poison, f"{Q0}.lora_A.weight has values that are not finite"),
    "half": (drop(f"{Q0}.lora_B.weight"), f"{Q0} has lora_A, but both lora_A and lora_B are needed"),
    "infinite": (
        lambda m: edit_tensors(m, lambda t: t[f"base_model.model.{Q0}.lora_B.weight"].fill_(-math.inf)),
        "not finite",
    ),
    "not gathered": (put(f"{Q0}.lora_A.weight", (0,)), "lora_A [0] and lora_B [16, 2]: the parts of a sharded model"),
    "half a convolution": (
        put(f"{Q0}.lora_A.weight", (2, 16, 1, 1)),
        f"{Q0} has lora_A [2, 16, 1, 1] and lora_B [16, 2], which are neither two matrices nor the factors of a convolution",
    ),
    "groups that r does not divide into": (
        lambda m: [put(f"{Q0}.lora_A.weight", (2, 16, 1))(m), put(f"{Q0}.lora_B.weight", (15, 1, 1))(m)],
        "but r and rank_pattern of adapter_config.json say rank 2",
    ),
    "integers": (
        put(f"{Q0}.lora_A.weight", (2, 16), torch.int8),
        "has dtype I8 (shape [2, 16]); save the adapter in one of F64, F32",
    ),
    "rank": (
        put(f"{Q0}.lora_A.weight", (3, 16)),
        f"{Q0} has lora_A [3, 16] and lora_B [16, 2], but r and rank_pattern of adapter_config.json say rank 2",
    ),
    "width": (put(f"{Q0}.lora_A.weight", (2, 15)), f"{Q0} maps 15 to 16 features"),
    "unknown tensor": (put(f"{Q0}.lora_C.weight"), f"{Q0}.lora_C.weight: unknown tensor"),
    "not targeted": (configure(target_modules=["v_proj"]), f"{Q0} is not among the target_modules"),
    "other base": (other_base, "names the base 'org/other@main'"),
    "other revision": (lambda m: [edit(m, revision="v2"), (m / "fingerprint.json").unlink()], "@v2'"),
    "other fingerprint": (write("fingerprint.json", '{"base": "abc"}'), "was trained on base abc…"),
    "bad fingerprint": (
        write("fingerprint.json", '{"base": 1}'),
        'fingerprint.json: must be {"base": SHA-256 of the base}',
    ),
    "task": (configure(task_type="SEQ_2_SEQ_LM"), "has task_type 'SEQ_2_SEQ_LM'"),
}


class TestRefusals:
    @pytest.fixture(scope="class")
    def pair(self, base, tmp_path_factory) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp("pair")
        return train(base, root / "good", 0, target_modules=["q_proj", "v_proj", "o_proj"]), train(
            base, root / "bad", 1
        )

    @pytest.mark.parametrize("case", REFUSALS)
    def test_one_line_that_names_the_folder(self, case, pair, folder, capsys) -> None:
        import shutil

        good, bad = (Path(shutil.copytree(member, folder / member.name)) for member in pair)
        spoil, line = REFUSALS[case]
        spoil(bad)
        assert main([str(folder / "soup"), str(good), str(bad)]) == 2
        captured = capsys.readouterr()
        shown = [text for text in captured.err.splitlines() if not text.startswith("warning: ")]
        assert len(shown) == 1 and shown[0].startswith("salsa soup: ") and line in shown[0] and str(bad) in shown[0]
        assert captured.out == "" and not (folder / "soup").exists()

    def test_fingerprints_decide_over_names_and_one_that_is_missing_is_warned_of(
        self, base, folder: Path, caplog
    ) -> None:
        members = [train(base, folder / "a", 0), train(base, folder / "b", 1)]
        edit(members[1], base_model_name_or_path="the/same/elsewhere")
        soup(folder / "soup", members)
        assert not caplog.messages
        edit(
            members[1],
            base_model_name_or_path=json.loads((members[0] / "adapter_config.json").read_text())[
                "base_model_name_or_path"
            ],
        )
        (members[1] / "fingerprint.json").unlink()
        soup(folder / "soup", members)
        assert caplog.messages == [
            f"warning: {members[1]} has no fingerprint.json, so its base cannot be compared with those of the other members"
        ]

    @pytest.mark.parametrize(
        ("weights", "line"),
        [
            ([0.5], "weights: 1 weights (0.5) for 2 members"),
            ([0.5, 0.3, 0.2], "weights: 3 weights (0.5, 0.3, 0.2) for 2 members"),
            ([math.nan, 1], "weights: nan, 1 are not all finite numbers"),
            ([math.inf, -math.inf], "weights: inf, -inf are not all finite numbers"),
            ([0, 0], "weights: all are 0"),
        ],
    )
    def test_weights(self, base, folder: Path, weights: list[float], line: str) -> None:
        members = [train(base, folder / "a", 0), train(base, folder / "b", 1)]
        with pytest.raises(SalsaError) as caught:
            soup(folder / "soup", members, weights)
        assert line in str(caught.value) and not (folder / "soup").exists()
        if any(weights):
            with pytest.raises(SalsaError):
                StackedAdapter.load(members).save(folder / "soup", weights)

    def test_no_members_names_and_strategy(self, base, folder: Path) -> None:
        member = train(base, folder / "a", 0)
        with pytest.raises(
            SalsaError, match="members: the list is empty; a soup needs at least one adapter or checkpoint"
        ):
            soup(folder / "soup", [])
        with pytest.raises(SalsaError, match="names: 2 names for 1 members; give one per member"):
            StackedAdapter.load([member], ["a", "b"])
        with pytest.raises(SalsaError, match="'slurp' is unknown; use one of linear"):
            soup(folder / "soup", [member], strategy="slurp")
        (folder / "file").touch()
        with pytest.raises(SalsaError, match="is a file"):
            soup(folder / "file", [member])

    def test_a_folder_that_another_process_writes(self, base, folder: Path) -> None:
        """Neither is disturbed: the other's temporary file stays; afterwards no lock is left."""
        member, out = train(base, folder / "a", 0), folder / "soup"
        soup(out, [member])
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert ".lock" not in before
        with locked(out):
            (out / f".{WEIGHTS}.1.tmp").write_text("the other's")
            with pytest.raises(SalsaError, match=rf"in use by .*pid {os.getpid()}"):
                soup(out, [member])
            assert (out / f".{WEIGHTS}.1.tmp").exists()
            assert all((out / name).read_bytes() == content for name, content in before.items())
        soup(out, [member])
        assert {path.name for path in out.iterdir()} == before.keys()

    def test_a_tokenizer_that_is_no_soups_stays(self, base, folder: Path) -> None:
        """An earlier soup's goes, where the members have none."""
        member, other, out = train(base, folder / "a", 0), train(base, folder / "b", 1), folder / "soup"
        out.mkdir()
        (out / "tokenizer.json").write_text("mine")
        with pytest.raises(SalsaError, match=r"soup: this folder holds tokenizer.json but no soup.json, so it is not"):
            soup(out, [member])
        assert [(path.name, path.read_text()) for path in out.iterdir()] == [("tokenizer.json", "mine")]
        (other / "tokenizer.json").write_text("the other's")
        soup(folder / "again", [other])
        assert (folder / "again" / "tokenizer.json").read_text() == "the other's"
        soup(folder / "again", [member])
        assert not (folder / "again" / "tokenizer.json").exists()


def test_a_runs_folders_are_called_by_their_units(tmp_path: Path) -> None:
    """sft/seed-0 by its manifest; others by the ends of their paths; all by their paths where two are alike."""
    from salsa_peft.soup.member_folders import member_names

    for name in ("a/0123", "b/4567", "c/plain", "d/plain"):
        (tmp_path / name).mkdir(parents=True)
    for name, unit in (("a/0123", "sft/seed-0"), ("b/4567", "sft/seed-1")):
        (tmp_path / name / "manifest.json").write_text(json.dumps({"unit": unit, "files": {}}))
    folders = [tmp_path / name for name in ("a/0123", "b/4567", "c/plain")]
    assert member_names(folders) == ["sft/seed-0", "sft/seed-1", "plain"]
    alike = [tmp_path / "c/plain", tmp_path / "d/plain"]
    assert member_names(alike) == [str(path) for path in alike]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--measure", "sft_loss"], "--data: measure sft_loss needs held-out rows; add --data FILE"),
        (
            ["--measure", "sft_loss", "--data", "none.jsonl"],
            "--data: no such file: none.jsonl; use a jsonl, json or parquet file",
        ),
        (
            ["--measure", "reward", "--data", "none.jsonl"],
            "--reward: measure reward needs a reward model; add --reward REWARD",
        ),
        (["--measure", "no_such_module:f"], "there is no module no_such_module"),
        (["--measure", "loss"], "--measure: loss is unknown; use sft_loss, reward"),
    ],
)
def test_what_a_measure_needs_is_looked_for_before_a_model_is_loaded(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from argparse import Namespace

    from salsa_peft.soup import measures

    monkeypatch.setattr(measures, "load_tokenizer", lambda name: pytest.fail("loaded"))
    given = {"measure": None, "data": None, "reward": None, "limit": 8, "base": None}
    given |= {words[at].removeprefix("--"): words[at + 1] for at in range(0, len(words), 2)}
    with pytest.raises(SalsaError, match=re.escape(said)):
        measures.command_measure(Namespace(**given), [Path("a"), Path("b")], "adapters")


@pytest.mark.parametrize("field", ["modules_to_save", "trainable_token_indices", "alora_invocation_tokens"])
def test_an_empty_list_says_what_null_says(tmp_path: Path, field: str) -> None:
    """Some tools write one for the other; PEFT makes no difference."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, field: []}))
    assert read_config(tmp_path)[field] is None
