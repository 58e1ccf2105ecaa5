"""Peak memory of PPO by number of references, on one base. Prints one JSON line.

    python tests/benchmarks/reference_memory.py MODEL_FOLDER [--updates 2]

Each count runs in a process of its own: batch 16, prompts of 64 tokens, responses of 48, 2 minibatches of 8, 1 PPO epoch, one
thread, float32; seeds are random adapters of rank 16 on all linears, references seed-1, seed-2, seed-3. The peak is the
process's largest resident set (MB), measured with the same reward function in both.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

COUNTS = (1, 3)


def measure(folder: str, references: int, updates: int) -> dict[str, float]:
    """One process: PPO with that many references → peak MB and seconds an update."""
    import torch

    torch.set_num_threads(1)
    from peft import LoraConfig, get_peft_model

    from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
    from salsa_peft.config.schema import Model
    from salsa_peft.models.adapters import lora as adapters
    from salsa_peft.models.base import load_base

    tokenizer = _tokenizer(folder)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(folder, Model(dtype="float32"), tokenizer), config, adapter_name="policy")
    names = [f"seed-{index}" for index in range(1, references + 1)]
    for name in names:
        model.add_adapter(name, config)
    for index, name in enumerate(["policy", *names]):
        generator = torch.Generator().manual_seed(index)
        for parameter in adapters.parameters(model, name):
            parameter.data.normal_(std=0.005, generator=generator)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(1000, 40000, (64,), generator=generator).tolist()} for _ in range(16 * updates)]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(set(ids))) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as scratch:
        args = SalsaPPOConfig(
            output_dir=scratch, batch_size=16, num_mini_batches=2, num_ppo_epochs=1, num_train_epochs=1, max_new_tokens=48,
            min_new_tokens=47, report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = SalsaPPOTrainer(
            model, args=args, train_dataset=rows, references=names, reward_funcs=reward, processing_class=tokenizer
        )
        start = time.perf_counter()
        trainer.train()
    seconds = (time.perf_counter() - start) / updates
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "seconds": seconds}


def _tokenizer(folder: str) -> Any:
    from salsa_peft.config.paths import bundled_folder
    from salsa_peft.models.tokenizers import load_tokenizer

    return load_tokenizer(folder, chat_template=str(bundled_folder("recipes") / "chat_templates" / "chatml.jinja"))


def main() -> None:
    """Measure each count in its own process, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.model, args.one, args.updates)))
        return
    found = {}
    for count in COUNTS:
        command = [sys.executable, __file__, args.model, "--updates", str(args.updates), "--one", str(count)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[count] = json.loads(output.splitlines()[-1])
    ratio = found[COUNTS[-1]]["peak_mb"] / found[COUNTS[0]]["peak_mb"]
    print(json.dumps({"benchmark": "reference_memory", "machine": platform.processor() or platform.machine(),
                      "references": found, "peak_ratio": round(ratio, 4)}))  # fmt: skip


if __name__ == "__main__":
    main()
