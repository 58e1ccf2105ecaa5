"""PPO against any reference models. The trainer and its config are also imported by `from salsa_peft import …`."""
