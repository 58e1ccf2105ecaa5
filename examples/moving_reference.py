"""PPO whose reference follows the policy: a soup with the policy as a member, renewed every 5 updates.

    python examples/moving_reference.py

The model is made on the spot. TRL trains the adapter seed-0, from which the policy starts; the reference is the mean of
both. Prints the trainers' metrics and the reward, the share of answers with an owl, in one run on a CPU:

    before PPO 0.03, after PPO 0.69
"""

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer, soup
from salsa_peft.data.toy import world


def owls(completions, **_):
    return [float("owl" in completion[0]["content"]) for completion in completions]


if __name__ == "__main__":
    folder, out = world("runs/world"), "runs/moving"
    rows, prompts = (Dataset.from_json(f"{folder}/{name}.jsonl") for name in ("demonstrations", "prompts"))
    config = SFTConfig(out, learning_rate=7e-3, assistant_only_loss=True, bf16=False)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    sft = SFTTrainer(f"{folder}/base", config, train_dataset=rows, peft_config=lora)
    sft.train()
    sft.save_model(f"{out}/seed-0")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    model = PeftModel.from_pretrained(model, f"{out}/seed-0", adapter_name="policy", is_trainable=True)
    model.load_adapter(f"{out}/seed-0", adapter_name="seed-0")
    reference = soup.attach(model, ["seed-0", "policy"], sync_every=5)
    steps = {"batch_size": 64, "max_new_tokens": 10, "max_steps": 200, "learning_rate": 1e-2}
    args = SalsaPPOConfig(f"{out}/policy", save_strategy="no", kl_coef=0.1, **steps)
    trainer = SalsaPPOTrainer(model, owls, args, prompts, prompts.select(range(128)), references=[reference])
    before, _ = trainer.evaluate()["eval_score"], trainer.train()
    print(f"before PPO {before:.2f}, after PPO {trainer.evaluate()['eval_score']:.2f}")
