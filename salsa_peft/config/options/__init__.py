"""Sections of the recipe that other modules need without the whole schema."""
