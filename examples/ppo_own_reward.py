"""PPO with a reward function of your own. Nothing is downloaded: the model is a tiny Llama that is made on the spot.

    python examples/ppo_own_reward.py

The reward is the share of birds among the words of an answer. The policy is a LoRA adapter, and its reference is the
model without the adapter. For your own run, replace the model, the prompts and the function. Prints the trainer's
metrics of 50 updates and the mean reward on other prompts, in one run on a CPU:

    before PPO 0.12, after PPO 0.92
"""

from datasets import Dataset
from peft import LoraConfig

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
from salsa_peft.data.toy import world

BIRDS = ("owl", "wren", "crow", "finch", "robin", "heron")


def birds(completions, **_):
    """A number for each completion. The prompts are messages, so a completion is a list of one message."""
    answers = [completion[0]["content"].split() for completion in completions]
    return [sum(word in BIRDS for word in words) / max(len(words), 1) for words in answers]


if __name__ == "__main__":
    folder = world("runs/world")
    steps = {"batch_size": 64, "max_steps": 200, "learning_rate": 1e-2, "kl_coef": 0.1, "save_strategy": "no"}
    trainer = SalsaPPOTrainer(
        model=str(folder / "base"),
        reward_funcs=birds,
        args=SalsaPPOConfig("runs/birds", max_new_tokens=10, **steps),
        train_dataset=Dataset.from_json(str(folder / "prompts.jsonl")),
        eval_dataset=Dataset.from_json(str(folder / "eval_in.jsonl")),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    before = trainer.evaluate()["eval_score"]
    trainer.train()
    print(f"before PPO {before:.2f}, after PPO {trainer.evaluate()['eval_score']:.2f}")
