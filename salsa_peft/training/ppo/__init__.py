"""PPO with any references. `from salsa_peft import SalsaPPOTrainer, SalsaPPOConfig` imports trainer and config."""
