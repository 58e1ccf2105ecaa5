"""Helpers that know nothing of a recipe."""
