"""Averages of full checkpoints, streamed."""
