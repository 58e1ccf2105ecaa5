"""Rewards: reward adapters, sequence classifiers, Python functions, and weighted sums of rewards."""
