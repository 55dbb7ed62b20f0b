"""Compile every decoder layer, so that it has fewer kernels, and elementwise operations read and write memory less."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dynamo's limit of graphs per layer. It compiles a layer for training and for validation, each with static and with
# dynamic shapes. With fullgraph, exceeding the limit is an error, and torch's default of 8 is too low.
RECOMPILE_LIMIT = 32


def compile_layers(model: "PreTrainedModel", *, backend: str = "inductor") -> None:
    """Compile each decoder layer by itself. Layers with the same code share their compiled graphs.

    Call it after `apply_activation_checkpointing` and before sharding.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for layer in family_of(model).layers(model):
        # A graph break inside a layer would cost more time than compiling saves, so fullgraph makes it an error.
        layer.compile(fullgraph=True, backend=backend)


def compile_seconds() -> float:
    """Return how long this process has spent on compiling so far."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]


def failed_to_compile(error: Exception) -> bool:
    """Whether torch failed to compile a layer, and not to run it."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run `model` without its compiled layers in the block: while it generates, the shapes change with every token."""
    compiled = {module: module._compiled_call_impl for module in model.modules()}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
