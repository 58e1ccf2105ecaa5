"""What a base's config.json says: sizes, memory, and what a run cannot do with it. Imports no torch."""
