"""PPO with any references. `from salsa_peft import SalsaPPOTrainer` imports the trainer."""
