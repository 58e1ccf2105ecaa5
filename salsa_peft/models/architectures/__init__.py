"""Sizes, GPU memory and unsupported settings of a base, from its config.json. Imports no torch."""
