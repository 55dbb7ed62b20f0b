"""The four levels of activation checkpointing, from keeping everything to keeping almost nothing.

A level decides what a layer keeps of its forward pass for the backward pass. `none` keeps everything. `selective` keeps
the results of matrix products and attention and computes the rest (norms, activations, rotations) again. `full` keeps
one hidden state per layer and computes the layer again. `offload` is `full` with the hidden states in the host's
memory. The gradients are the same on every level.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qwlit.model.config import ActivationCheckpointing
from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten = torch.ops.aten
# Operators whose results are expensive to compute and small. Not eager attention's batched products: their results grow
# with the square of the length.
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._flash_attention_forward.default,  # varlen attention with dropout
}
# Of these, the ones that draw random numbers where attention has dropout; those on CPU have none.
DRAWING = {op for op in KEPT if torch.Tag.nondeterministic_seeded in op.tags} - {
    aten._scaled_dot_product_flash_attention_for_cpu.default
}


def apply_activation_checkpointing(model: "PreTrainedModel", level: ActivationCheckpointing) -> None:
    """Set what every decoder layer keeps in training mode. Call it before compiling and sharding."""
    if level == "none":
        return
    functions = {"selective": _selective, "full": _full, "offload": _offload}
    for layer in family_of(model).layers(model):
        # transformers' own switch. It checkpoints `forward` only, so hooks such as FSDP2's do not run a second time.
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functions[level]


# Before it computes a layer again, `checkpoint` restores the states that the random generators of CPU and CUDA had
# (preserve_rng_state, torch's default), so dropout inside the layer drops the same elements again. In a compiled layer
# torch does so for each operator that draws.
_full = partial(checkpoint, use_reentrant=False)


def _selective(layer: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the contexts in which `checkpoint` computes a layer for the first and for the second time."""
    first, second = create_selective_checkpoint_contexts(_keep)
    if get_proxy_mode() is not None:
        return first, second  # a graph is being traced; it repeats each operator's draws by itself
    states: deque[Tensor] = deque()
    return (
        _AfterDraws(first, lambda generator: states.append(generator.get_state())),
        _AfterDraws(second, lambda generator: generator.set_state(states.popleft())),
    )


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in KEPT or operation.name().startswith("torch_attn::_varlen_attn")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class _AfterDraws(TorchDispatchMode):
    """Does something with the generator after each kept operator that draws from it, as attention dropout does.

    The second time such an operator does not run, so it leaves the generator as it was, and what is dropped after it in
    the layer would be other elements than the first time.
    """

    def __init__(self, keeping: TorchDispatchMode, act: Callable[[torch.Generator], Any]) -> None:
        super().__init__()
        self._keeping, self._act = keeping, act

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __enter__(self) -> Self:
        self._keeping.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._keeping.__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation in DRAWING:
            self._act(_generator(result[0].device))
        return result


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def _offload(layer: Callable[..., Any], *inputs: Any) -> Any:
    on_cuda = any(isinstance(value, Tensor) and value.is_cuda for value in inputs)
    with save_on_cpu(pin_memory=on_cuda):
        return _full(layer, *inputs)
