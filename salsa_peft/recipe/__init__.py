"""Running a recipe: its units, their cache, and the processes that make them."""
