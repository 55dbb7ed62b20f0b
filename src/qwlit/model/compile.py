"""Compile every decoder layer, so that it has fewer kernels, and elementwise operations read and write memory less."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dynamo's limit of graphs per layer. With fullgraph, exceeding it is an error, and torch's default of 8 is too low.
RECOMPILE_LIMIT = 32
# Dynamo's names of a layer's inputs whose sizes differ from micro-batch to micro-batch; behind the colon the dimension.
# They are hidden states (B, T, D), cosines and sines (B, T, K), cumulative lengths, label positions and longest length.
LENGTHS = (
    *(rf"L\['args'\]\[0\]:{dimension}" for dimension in (0, 1)),
    *(rf"L\['kwargs'\]\['position_embeddings'\]\[[01]\]:{dimension}" for dimension in (0, 1)),
    r"L\['kwargs'\]\['cu_seqlens'\]:0",
    r"L\['kwargs'\]\['label_positions'\]:0",
    r"L\['kwargs'\]\['max_seqlen'\]",
)


def compile_layers(model: "PreTrainedModel", *, backend: str = "inductor") -> None:
    """Compile each decoder layer by itself. Layers with the same code share their compiled graphs.

    Call it after `apply_activation_checkpointing` and before sharding.
    """
    configure_compiler()
    for layer in family_of(model).layers(model):
        # A graph break inside a layer would cost more time than compiling saves, so fullgraph makes it an error.
        layer.compile(fullgraph=True, backend=backend)


def configure_compiler() -> None:
    """Set what torch's compiler does for the whole process."""
    import torch._dynamo
    import torch._functorch.config
    import torch.compiler.config

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # Otherwise dynamo makes a graph for the lengths of the first micro-batch, and then one for all others. So it does
    # where a version of transformers names the inputs differently.
    torch.compiler.config.dynamic_sources = ",".join(LENGTHS)
    # Dynamo cuts what it compiles inside DDP's forward pass at DDP's buckets, to exchange gradients earlier. Layers are
    # compiled one by one, so their gradients are exchanged one by one without cuts, which would only add launches.
    torch._dynamo.config.optimize_ddp = False
    # Where a layer is computed again, its dropout would draw from generators that belong to the graph and are not reset
    # for each micro-batch, so a resumed run would drop other elements. Without them torch keeps the generator's state.
    torch._functorch.config.graphsafe_rng_functionalization = False


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
