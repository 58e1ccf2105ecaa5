"""Demonstrations, preferences, prompts and questions from data of many formats; toy data."""
