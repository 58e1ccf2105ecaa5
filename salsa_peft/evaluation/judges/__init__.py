"""Judges of pairs of answers: an endpoint, a local model, the reward, a function."""
