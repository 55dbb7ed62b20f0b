"""Which parameters share a weight decay. Every trainable parameter is in exactly one group."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from qwlit.optim.config import OptimConfig


def kind(name: str) -> str:
    """Return "bias", "norm" or "weight" for a parameter's name, as Qwen2 and Qwen3 name them."""
    if name.endswith(".bias"):
        return "bias"
    owner = name.rpartition(".")[0].rpartition(".")[2]
    return "norm" if owner.endswith("norm") else "weight"


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters into decayed and not decayed, each group with its `name`."""
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    free = [p for name, p in trainable if kind(name) in config.no_decay]
    decayed = [p for name, p in trainable if kind(name) not in config.no_decay]
    groups = [
        {"name": "decay", "params": decayed, "weight_decay": config.weight_decay},
        {"name": "no_decay", "params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
