"""Weighted means of LoRA adapters, computed from their deltas B·A and not from their factors."""
