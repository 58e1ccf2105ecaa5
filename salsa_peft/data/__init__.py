"""Rows of any source as demonstrations, preferences, prompts and questions; and the embedded world."""
