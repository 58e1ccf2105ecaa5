"""The recipe: its schema, reading it, and checking it. Imports no torch."""
