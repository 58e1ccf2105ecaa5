"""LoRA adapters: their files, their bases, and attaching, switching and merging them on a loaded base."""
