"""PPO with a list of references. The trainer is salsa_peft.SalsaPPOTrainer."""
