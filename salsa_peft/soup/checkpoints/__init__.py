"""Weighted averages of full checkpoints, computed piece by piece."""
