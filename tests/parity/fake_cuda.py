"""A decoder layer on fake CUDA tensors, without a GPU: what it would launch, as a graph.

Without autograd: a CPU build of torch ends the process at a fake CUDA tensor that requires a gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode


class WithoutIndexing(TorchFunctionMode):
    """Replaces `states[..., index]` by operators: Python's indexing asks CUDA itself, and a CPU build has none."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            states, (dots, index) = args
            assert dots is Ellipsis
            start, stop, _ = index.indices(states.shape[-1])
            return states.narrow(-1, start, stop - start)
        return function(*args, **(kwargs or {}))


def layer_graph(layer: nn.Module, *, tokens: int, width: int, head_width: int, longest: int) -> Graph:
    """Trace a layer's forward pass over packed documents under autocast to bfloat16, as on CUDA."""

    def run(weights: dict[str, Tensor], states: Tensor, rotary: Tensor, cu_seqlens: Tensor) -> Any:
        packing = {"attention_kernel": "varlen", "cu_seqlens": cu_seqlens, "max_seqlen": longest}
        named = {"position_embeddings": (rotary, rotary), "attention_mask": None, **packing}
        return torch.func.functional_call(layer, weights, (states,), named)

    torch.set_autocast_enabled("cuda", True)  # torch.autocast switches itself off without CUDA
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad(), WithoutIndexing():
            weights = {name: torch.empty(p.shape, device="cuda:0") for name, p in layer.named_parameters()}
            states = torch.empty(1, tokens, width, device="cuda:0")
            rotary = torch.empty(1, tokens, head_width, device="cuda:0")
            return make_fx(run)(weights, states, rotary, torch.empty(4, dtype=torch.int32, device="cuda:0")).graph
    finally:
        torch.set_autocast_enabled("cuda", False)


def launches(graph: Graph) -> list[Node]:
    """Return the nodes that launch a kernel: all operators that do not only return a view."""
    return [
        node
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and not node.target.is_view and "view" not in str(node.target)
    ]


def bytes_moved(nodes: list[Node]) -> int:
    """Return the bytes that these operators read and write, each of its inputs and results once."""
    return sum(
        value.numel() * value.element_size()
        for node in nodes
        for each in (*node.all_input_nodes, node)
        for value in torch.utils._pytree.tree_leaves(each.meta["val"])
        if isinstance(value, Tensor)
    )
