"""Demonstrations, preferences, prompts and questions from data of many formats; and the embedded world."""
