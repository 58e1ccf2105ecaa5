"""Running a recipe: its units of work, the cache of their results, and the processes that run them."""
