"""Adapters merged into their base, and the average of such merges."""
