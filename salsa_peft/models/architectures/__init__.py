"""Facts that a base's config.json gives: sizes, GPU memory, and conflicts with a recipe. Imports no torch."""
