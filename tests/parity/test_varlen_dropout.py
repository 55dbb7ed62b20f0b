"""Varlen attention with dropout, without a GPU.

torch's own operator runs with kernels for CPU (`tests.parity.varlen`), which shows the call, its derivative, and that
activation checkpointing repeats the draws. Shapes and dtypes on CUDA are those of fake CUDA tensors, without autograd:
a CPU build of torch ends the process at a fake CUDA tensor that requires a gradient. That CUDA's kernel itself computes
the same is left to tests/parity/test_cuda.py.
"""

import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwlit.model import activation_checkpointing, attention
from qwlit.model.activation_checkpointing import apply_activation_checkpointing
from qwlit.model.attention import attend, register_attention
from qwlit.model.config import ActivationCheckpointing, DropoutConfig
from qwlit.model.dropout import apply_dropout
from qwlit.model.loss_model import LossModel
from qwlit.training.kernel_checks import Place
from qwlit.training.self_check import LIMITS, checks_for
from tests.parity.varlen import kept, register
from tests.tiny import packed, random_samples, tiny_causal_lm

FLASH = torch.ops.aten._flash_attention_forward.default
LENGTHS = (5, 12, 1, 9)
DROPOUT, SCALE = 0.3, 0.2


@pytest.fixture(autouse=True)
def kernels_for_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setattr(LossModel, "_kernel", lambda *_: "varlen")


def model_with(**dropout: Any) -> LossModel:
    causal_lm = tiny_causal_lm()
    causal_lm.set_attn_implementation(register_attention())
    apply_dropout(causal_lm, DropoutConfig(**dropout))
    return LossModel(causal_lm, "varlen").train()


class Calls(TorchDispatchMode):
    """Records the dropout of each call of the flash operator."""

    def __init__(self) -> None:
        super().__init__()
        self.dropouts: list[float] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is FLASH:
            self.dropouts.append(args[7])
        return operation(*args, **(kwargs or {}))


def plain(query: Tensor, key: Tensor, value: Tensor, seed: int) -> Tensor:
    """Attend by the definition, with what the kernels for CPU draw from a generator of that seed: (1, T, H, K)."""
    edges = torch.tensor([0, *LENGTHS]).cumsum(0)
    torch.manual_seed(seed)
    scaled = kept(query.shape[1], edges, DROPOUT, torch.randint(2**31, (1,)).to(torch.uint64))
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    outs = []
    for (start, end), factor in zip(pairwise(edges.tolist()), scaled, strict=True):
        q, k, v = (states[0, :, start:end] for states in (query, key, value))
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        weights = (q @ k.mT * SCALE).masked_fill(future, float("-inf")).softmax(-1)
        outs.append((weights * factor @ v).transpose(0, 1))
    return torch.cat(outs).unsqueeze(0)


def test_dropped_weights_results_and_gradients_are_those_of_the_definition_with_grouped_heads() -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, heads, sum(LENGTHS), 8, requires_grad=True) for heads in (4, 2, 2)]
    expected = plain(*states, seed=3)
    torch.manual_seed(3)
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packing = {"cu_seqlens": edges, "document_lengths": LENGTHS, "max_seqlen": max(LENGTHS)}
    kernel = {"attention_kernel": "varlen", "scaling": SCALE, "dropout": DROPOUT}
    found, _ = attend(torch.nn.Identity(), *states, None, **packing, **kernel)
    assert torch.allclose(found, expected, atol=1e-6)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weight).sum(), states) for out in (found, expected)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_training_drops_in_the_chosen_layers_and_validation_nowhere() -> None:
    model, micro = model_with(attention=0.1, layers=(1, 1)), packed(random_samples([9, 14, 5]))
    with Calls() as calls:
        model(micro)
    assert 0.1 in calls.dropouts and calls.dropouts.count(0.1) == 1
    with Calls() as calls:
        model.eval()(micro)
    assert not any(calls.dropouts)


@pytest.mark.parametrize("level", ["selective", "full"])
def test_layers_computed_again_drop_the_same_elements_again(level: ActivationCheckpointing) -> None:
    gradients = []
    for chosen in ("none", level):
        model = model_with(attention=0.1, feed_forward=0.1, residual=0.1)
        apply_activation_checkpointing(model.causal_lm, chosen)
        torch.manual_seed(5)
        model(packed(random_samples([9, 14, 5]))).loss_sum.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_selective_computes_attention_with_dropout_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for kept_operators in (activation_checkpointing.KEPT, activation_checkpointing.KEPT - {FLASH}):
        monkeypatch.setattr(activation_checkpointing, "KEPT", kept_operators)
        model = model_with(attention=0.1)
        apply_activation_checkpointing(model.causal_lm, "selective")
        with Calls() as calls:
            model(packed(random_samples([9, 14, 5]))).loss_sum.backward()
        counts.append(calls.dropouts.count(0.1))
    layers = 2
    assert counts == [layers, 2 * layers]


def test_the_self_check_passes_with_varlen_attention_and_finds_another_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(torch.device("cpu"), torch.float32, "varlen", "qwen3")
    checks = {check.subject: check for check in checks_for(place, attention_dropout=True, fused_adamw=True)}
    assert all(check.deviation(place) < 1e-4 for check in checks.values())
    flash = attention._flash_with_dropout
    monkeypatch.setattr(
        attention,
        "_flash_with_dropout",
        lambda q, k, v, edges, longest, scaling, p: flash(q, k, v, edges, longest, 1.0, p),
    )
    found = {subject for subject, check in checks.items() if check.deviation(place) > LIMITS[place.dtype]}
    assert found == {"varlen attention with dropout"}


class WithoutIndexing(TorchFunctionMode):
    """Replaces `states[..., index]` by operators: Python's indexing asks CUDA itself, and a CPU build has none."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            states, (dots, index) = args
            assert dots is Ellipsis
            start, stop, _ = index.indices(states.shape[-1])
            return states.narrow(-1, start, stop - start)
        return function(*args, **(kwargs or {}))


def test_a_decoder_layer_in_bf16_on_cuda_is_one_graph_with_the_flash_operator_in_it() -> None:
    T, H, K = 28, 4, 16
    layer = model_with(attention=0.1, feed_forward=0.1).causal_lm.model.layers[0].requires_grad_(False)

    def run(weights: dict[str, Tensor], states: Tensor, rotary: Tensor, cu_seqlens: Tensor) -> Any:
        packing = {"attention_kernel": "varlen", "cu_seqlens": cu_seqlens, "max_seqlen": 14, "attention_mask": None}
        named = {"position_embeddings": (rotary, rotary), **packing}
        return torch.func.functional_call(layer, weights, (states,), named)

    torch.set_autocast_enabled("cuda", True)  # torch.autocast switches itself off without CUDA
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad(), WithoutIndexing():
            weights = {name: torch.empty(p.shape, device="cuda:0") for name, p in layer.named_parameters()}
            states, rotary = torch.empty(1, T, 32, device="cuda:0"), torch.empty(1, T, K, device="cuda:0")
            graph = make_fx(run)(weights, states, rotary, torch.empty(4, dtype=torch.int32, device="cuda:0")).graph
    finally:
        torch.set_autocast_enabled("cuda", False)
    (flash,) = (node for node in graph.nodes if node.target is FLASH)
    inputs = [node.meta["val"] for node in flash.args[:4]]
    heads = [(tuple(value.shape), value.dtype) for value in inputs]
    assert heads[:3] == [((T, count, K), torch.bfloat16) for count in (H, 2, 2)] and heads[3][1] == torch.int32
    assert flash.args[6:] == (14, 0.1, True, False) and flash.kwargs == {"scale": K**-0.5}
    out, lse, rng_state, *_ = flash.meta["val"]
    assert (out.shape, out.dtype, out.device.type) == ((T, H, K), torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype) == ((H, T), torch.float32)
    assert (rng_state.shape, rng_state.dtype, rng_state.device.type) == ((2,), torch.uint64, "cuda")


BACKWARD = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten
with FakeTensorMode():
    query, key, value = (torch.empty(40, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (8, 2, 2))
    edges = torch.empty(4, dtype=torch.int32, device="cuda")
    common = (edges, edges, 20, 20, 0.1, True)
    out, lse, *rng_state, _ = aten._flash_attention_forward(query, key, value, *common, False, scale=0.125)
    grads = aten._flash_attention_backward(out, query, key, value, out, lse, *common, *rng_state, scale=0.125)
    for grad, states in zip(grads, (query, key, value), strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (states.shape, states.dtype, states.device)
"""


def test_the_backward_pass_takes_what_the_forward_pass_returns_and_keeps_the_groups() -> None:
    subprocess.run([sys.executable, "-c", BACKWARD], check=True, timeout=120)
