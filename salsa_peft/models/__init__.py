"""Base models, adapters, reward models, sampling of responses and log-probabilities of tokens."""
