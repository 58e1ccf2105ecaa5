"""Answers of every model, their scores, and comparisons of them."""
