"""LoRA adapters on a loaded base."""
