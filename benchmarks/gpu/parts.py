"""The parts, in their order: what one proves and what the next ones cost decides it."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Part:
    """One part: a module with `measure(tables, scale)`, whose docstring says what it measures."""

    name: str
    title: str
    minutes: float
    """Expected on one H100, assumption."""

    @property
    def module(self) -> Any:
        return import_module(f"benchmarks.gpu.{self.name}")


PARTS = {
    part.name: part
    for part in (
        Part("check", "Self-check", 2.5),
        Part("ceilings", "Ceilings", 1),
        Part("full", "Qwen3-0.6B, full, against TRL", 5.5),
        Part("lora", "Qwen3-0.6B, LoRA, against TRL", 4.5),
        Part("head", "The head", 1.5),
        Part("memory", "Planned against allocated memory", 5),
        Part("large", "1.7B, 4B LoRA, 8B QLoRA", 5),
        Part("determinism", "reproducible against fast", 2.5),
    )
}
LIMIT_MINUTES = 9.0
"""After this long a part is cut off."""
