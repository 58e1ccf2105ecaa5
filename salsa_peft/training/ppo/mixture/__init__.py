"""Several references in PPO's KL term: their mean (`kl.py`) and their weights (`weights.py`)."""
