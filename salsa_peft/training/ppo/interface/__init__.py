"""The arguments of SalsaPPOTrainer, which are those of TRL's trainers, and publishing a policy on the Hub."""
