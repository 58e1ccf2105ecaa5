"""Demonstrations, preferences, prompts and questions from data of many formats; the embedded world."""
