"""A judge of your own, which compares two models. Nothing is downloaded: the model is made on the spot.

    python examples/own_judge.py

The judge is the function `more_right_words`; `salsa judge A B --judge own_judge.py:more_right_words --questions FILE`
is the same. TRL trains an adapter, which is compared with its base. Prints TRL's metrics, what is compared, where the
report is, and the adapter's wins, ties and losses, in one run on a CPU:

    pair         W    T  L  win rate, % [95%]        p  equal length
    sft – base  51  199  6  58.8 [56.2, 61.6]  < 0.001          58.6
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
    rows = Dataset.from_json(f"{folder}/demonstrations.jsonl")
    config = SFTConfig(out, learning_rate=7e-3, assistant_only_loss=True, bf16=False)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(f"{folder}/base", config, train_dataset=rows, peft_config=lora)
    trainer.train()
    trainer.save_model(f"{out}/sft")
    judge = ["--judge", f"{__file__}:more_right_words", "--questions", f"{folder}/eval_in.jsonl"]
    main(["judge", f"{out}/sft", f"{folder}/base", *judge, "--max-new-tokens", "10", "--output-dir", f"{out}/report"])
