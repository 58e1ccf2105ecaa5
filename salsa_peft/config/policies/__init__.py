"""Policies of a recipe, and the sections that stand for policies: WARP, rewarded soups, searches."""
