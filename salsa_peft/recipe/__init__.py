"""Runs recipes: units of work, the cache of their results, and the processes that run the units."""
