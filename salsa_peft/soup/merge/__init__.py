"""Soups of adapters that are merged into their base, as full checkpoints."""
