"""The stages that train: SFT, reward model, PPO, and the trainers of TRL."""
