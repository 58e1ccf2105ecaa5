"""Weight averaging of LoRA adapters and of checkpoints: `soup()`, `StackedAdapter`, and `salsa soup`."""

from salsa_peft.soup.average import soup
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.strategies import STRATEGIES

__all__ = ["STRATEGIES", "StackedAdapter", "soup"]
