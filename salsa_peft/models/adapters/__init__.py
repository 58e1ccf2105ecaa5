"""LoRA adapters: their files and bases, and attaching, switching and merging adapters on a base."""
