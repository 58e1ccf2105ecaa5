"""Averages of LoRA adapters, exact in their deltas."""
