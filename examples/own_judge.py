"""A judge of your own, which compares two models. Nothing is downloaded: the model is made on the spot.

    python examples/own_judge.py

The judge is the function `more_right_words`. After TRL has trained an adapter, this is the same as the command

    salsa judge runs/judged/sft runs/world/base --questions runs/world/eval_in.jsonl \
        --judge examples/own_judge.py:more_right_words --max-new-tokens 10 --output-dir runs/judged/report

Prints what it compares, a table of wins, ties, losses and intervals, and where the report is. In one run on a CPU the
adapter won 40% and lost 30%.
"""

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from salsa_peft.cli.main import main
from salsa_peft.data.toy import world
from salsa_peft.data.toy_language import grade


def more_right_words(questions, first, second, **_):
    """A verdict for each pair of answers: A, B, or C for a tie. questions: conversations, whose last turn is judged."""
    tasks = [messages[-1]["content"] for messages in questions]
    scores = [(grade(task, a), grade(task, b)) for task, a, b in zip(tasks, first, second, strict=True)]
    return ["C" if a == b else "A" if a > b else "B" for a, b in scores]


if __name__ == "__main__":
    folder, out = world("runs/world"), "runs/judged"
    rows = Dataset.from_json(str(folder / "demonstrations.jsonl"))
    config = SFTConfig(out, learning_rate=7e-3, assistant_only_loss=True, bf16=False, save_strategy="no")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(f"{folder}/base", config, train_dataset=rows, peft_config=lora)
    trainer.train()
    trainer.save_model(f"{out}/sft")
    judge = ["--judge", f"{__file__}:more_right_words", "--questions", f"{folder}/eval_in.jsonl"]
    main(["judge", f"{out}/sft", f"{folder}/base", *judge, "--max-new-tokens", "10", "--output-dir", f"{out}/report"])
