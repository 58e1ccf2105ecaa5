"""Base models, adapters on them, sampling and log-probabilities."""
