"""Rewards: adapters, classifiers, functions, and weighted sums of them."""
