"""Every decoder layer as one compiled function: fewer kernels, and less of the memory that elementwise steps move."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Graphs of one layer: training, validation, and each with sizes fixed and free. Torch's limit of 8 would be an error.
GRAPHS = 32


def compile_layers(model: "PreTrainedModel", *, backend: str = "inductor") -> None:
    """Compile each decoder layer by itself; all of them share their graphs. After checkpointing, before sharding."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = GRAPHS
    for layer in family_of(model).layers(model):
        # A break inside a layer would cost more than compiling gains, so it is an error.
        layer.compile(fullgraph=True, backend=backend)


def compile_seconds() -> float:
    """Return how long this process has spent on compiling so far."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]


def failed_to_compile(error: Exception) -> bool:
    """Tell a layer that cannot be compiled from one that fails when it runs."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let `model` run as it is written: the shapes of generated text differ at every token."""
    compiled = {module: module._compiled_call_impl for module in model.modules()}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
