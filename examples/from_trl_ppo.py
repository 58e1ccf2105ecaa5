"""PPO as with TRL 1.12's PPOTrainer: the same model, adapter, reward and options. docs/from-trl.md has TRL's script.

    python examples/from_trl_ppo.py [MODEL]         a folder or Hub id, by default SmolLM2-135M-Instruct

It prints TRL's metrics after each of its three updates (`objective/kl`, `objective/scores` …), and at the end the folder of
the policy, which is an ordinary PEFT adapter. The reward is higher for shorter answers.
"""

import sys

from datasets import Dataset
from peft import LoraConfig

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
TOPICS = ["bread", "glass", "rain", "wool", "salt", "paper", "honey", "soap"]
prompts = [{"prompt": [{"role": "user", "content": f"How is {topic} made?"}]} for topic in TOPICS]


def brief(completions, **columns):
    """TRL: reward_model, which can only be a classifier."""
    return [-len(message["content"]) / 100 for (message,) in completions]


trainer = SalsaPPOTrainer(
    model=MODEL,  # TRL: a loaded model, tokenized prompts, and value_model, a second model; here a head on the policy
    reward_funcs=brief,
    args=SalsaPPOConfig(
        output_dir="from-trl-ppo", learning_rate=1e-4, batch_size=8, num_mini_batches=2, num_ppo_epochs=2, max_steps=12,
        micro_batch_size=4, max_new_tokens=24, temperature=0.7, kl_coef=0.05, kl_control="fixed", lam=0.95, vf_coef=0.1, report_to="none",
    ),  # TRL: response_length=24; its β is fixed, and its λ and vf_coef are 0.95 and 0.1
    train_dataset=Dataset.from_list(prompts),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    # ref_model: not given, so the policy at its start, as in TRL; references=["soup"] would make it SALSA
)  # fmt: skip
trainer.train()
trainer.save_model()
print("the policy is in", trainer.args.output_dir)
