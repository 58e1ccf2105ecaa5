"""Soups of checkpoints against mergekit's linear merge and the float64 mean. Prints one JSON line.

    python tests/benchmarks/soup_vs_mergekit.py --mergekit-python VENV/bin/python [--folder TMP]

Thirty cases: bf16, float16 and float32; two to four members; weights that are equal, uneven, negative or sum to another number than 1; one
file and shards; tied and untied; five architectures; values that cancel (two members nearly equal and huge, a third small). mergekit
computes once in the members' dtype, which its examples do, and once in float32, rounded to the members' dtype. Of both, and of ours, the
largest error of an element and the norm of the error are taken over all tensors, in float64. Target: ours is never the larger.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

MERGE = """
import json, sys
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for config, out in json.load(open(sys.argv[1])):
    run_merge(MergeConfiguration.model_validate(config), out, MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False))
"""
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Gemma2", "Phi3")
WEIGHTS = ([0.5, 0.5], [0.3, 0.7], [1.5, -0.5], [0.2, 0.3, 0.5], [1 / 3] * 3, [1.0, -1.0, 1.0], [-1.0, 1.0, 1.0], [0.25] * 4,
           [0.4, 0.3, 0.2, 0.1], [2.0, -1.5, 1.0, -0.5])  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32")


def cases() -> list[dict[str, Any]]:
    """Every dtype with every list of weights; architecture, shards, ties and the kind of values in turn."""
    found = []
    for j, dtype in enumerate(DTYPES):
        for i, weights in enumerate(WEIGHTS):
            name = ARCHITECTURES[(i + j) % 5]
            tied = name == "Gemma2" or (i % 3 == 0 and name in ("Llama", "Qwen2"))  # which mergekit knows to be tied
            cancels = weights[:2] in ([1.0, -1.0], [-1.0, 1.0], [2.0, -1.5]) or (i + j) % 7 == 0
            found.append({"dtype": dtype, "weights": weights, "architecture": name, "shards": (i + j) % 2 == 1, "tied": tied,
                          "cancels": cancels})  # fmt: skip
    return found


def make(folder: Path, case: dict[str, Any], number: int) -> list[Path]:
    """The members of a case."""
    import torch
    import transformers

    name, dtype = case["architecture"], getattr(torch, case["dtype"])
    config = getattr(transformers, f"{name}Config")(**SIZES, tie_word_embeddings=case["tied"], pad_token_id=0)
    members = []
    for member in range(len(case["weights"])):
        shared = torch.Generator().manual_seed(1000 + number)
        own = torch.Generator().manual_seed(100 * number + member)
        model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                huge = torch.randn(parameter.shape, generator=shared) * (1e3 if case["dtype"] == "float16" else 1e6)
                fresh = torch.randn(parameter.shape, generator=own)
                near = huge * (1 + torch.finfo(dtype).eps * fresh.round())
                parameter.copy_(near if case["cancels"] and member < 2 else fresh * 0.05)
        members.append(folder / str(member))
        model.save_pretrained(members[-1], **({"max_shard_size": "30KB"} if case["shards"] and member else {}))
    return members


def read(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def errors(found: dict[str, Any], members: list[dict[str, Any]], weights: list[float]) -> dict[str, float]:
    """Of all tensors of member 0 against the float64 mean: the largest of an element, and the norm."""
    largest, square = 0.0, 0.0
    for name in members[0]:
        mean = sum(member[name].double() * weight for member, weight in zip(members, weights, strict=True))
        error = (found[name].double() - mean).abs()
        largest, square = max(largest, float(error.max())), square + float(error.square().sum())
    return {"max": largest, "norm": square**0.5}


def run(folder: Path, python: str) -> dict[str, Any]:
    """All cases, ours and mergekit's."""
    from salsa_peft.soup.checkpoints.average import average

    rows, merges = cases(), []
    for number, case in enumerate(rows):
        place = folder / str(number)
        case["members"] = make(place, case, number)
        average(place / "ours", case["members"], case["weights"])
        models = [
            {"model": str(member), "parameters": {"weight": weight}}
            for member, weight in zip(case["members"], case["weights"], strict=True)
        ]
        config = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
        merges.append((config | {"dtype": case["dtype"]}, str(place / "theirs")))
        merges.append((config | {"dtype": "float32", "out_dtype": case["dtype"]}, str(place / "wide")))
    (folder / "merges.json").write_text(json.dumps(merges))
    subprocess.run([python, "-c", MERGE, str(folder / "merges.json")], check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = {
        "cases": len(rows),
        "further": {"theirs": 0, "wide": 0},
        "closer": {"theirs": 0, "wide": 0},
        "rows": [],
    }
    for number, case in enumerate(rows):
        place = folder / str(number)
        tensors = [read(member) for member in case.pop("members")]
        found = {who: errors(read(place / who), tensors, case["weights"]) for who in ("ours", "theirs", "wide")}
        for who in ("theirs", "wide"):
            result["further"][who] += any(found["ours"][key] > found[who][key] for key in ("max", "norm"))
            result["closer"][who] += any(found["ours"][key] < found[who][key] for key in ("max", "norm"))
        result["rows"].append(case | found)
    return result


def main() -> int:
    """0 where ours is never further from the float64 mean than mergekit's, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", required=True, help="of an environment that has mergekit")
    parser.add_argument("--folder", help="where the models are made (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = run(Path(folder), args.mergekit_python)
    print(json.dumps(result))
    return int(any(result["further"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
