"""The recipe: its schema, its parser and its checks. Imports no torch."""
