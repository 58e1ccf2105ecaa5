"""Helpers that do not depend on recipes: files, messages, fingerprints, safetensors, statistics."""
