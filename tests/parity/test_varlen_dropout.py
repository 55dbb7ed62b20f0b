"""Varlen attention with dropout, without a GPU.

torch's own operator runs with kernels for CPU (`tests.parity.varlen`), which shows the call, its derivative, and that
activation checkpointing repeats the draws. Shapes and dtypes on CUDA are those of fake CUDA tensors. That CUDA's kernel
itself computes the same is left to tests/parity/test_cuda.py.
"""

import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import _as_fake, kept_by_forward, micro_batch
from qwlit.config.compose import compose
from qwlit.model import activation_checkpointing, attention
from qwlit.model.activation_checkpointing import apply_activation_checkpointing
from qwlit.model.attention import attend, register_attention
from qwlit.model.config import ActivationCheckpointing, DropoutConfig, Execution
from qwlit.model.dropout import apply_dropout
from qwlit.model.loss_model import LossModel, build_meta_model
from qwlit.planning.memory.activations import activation_bytes
from qwlit.planning.memory.state import ShardingAndPrecision
from qwlit.training.kernel_checks import Place
from qwlit.training.self_check import LIMITS, checks_for
from tests.parity.fake_cuda import bytes_moved, launches, layer_graph
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


def test_autograd_keeps_what_the_memory_plan_counts_and_no_mask() -> None:
    words = ["dropout=none", "dropout.attention=0.1", "model=qwen3_0_6b", "model.architecture.num_hidden_layers=2"]
    config = compose(["hardware=cpu", *words]).config
    subject = build_meta_model(config.model, config.adapter, config.dropout, config.freeze)
    micro, size = micro_batch(packing=True)
    execution = Execution("varlen", "none", torch.float32, torch.bfloat16)
    on_cuda = ShardingAndPrecision("cuda", 1, torch.bfloat16.itemsize)
    predicted = activation_bytes(subject, config.adapter, config.dropout, execution, on_cuda, size).after_forward
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LossModel(_as_fake(subject, execution.frozen_dtype), "varlen").train()
        with Calls() as calls:
            kept_bytes = kept_by_forward(model, micro)
    assert calls.dropouts == [0.1, 0.1]
    assert predicted == pytest.approx(kept_bytes, rel=0.01)


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


def test_a_decoder_layer_in_bf16_on_cuda_is_one_graph_with_the_flash_operator_in_it() -> None:
    T, H, K = 28, 4, 16
    layer = model_with(attention=0.1, feed_forward=0.1).causal_lm.model.layers[0].requires_grad_(False)
    graph = layer_graph(layer, tokens=T, width=32, head_width=K, longest=14)
    (flash,) = (node for node in graph.nodes if node.target is FLASH)
    inputs = [node.meta["val"] for node in flash.args[:4]]
    heads = [(tuple(value.shape), value.dtype) for value in inputs]
    assert heads[:3] == [((T, count, K), torch.bfloat16) for count in (H, 2, 2)] and heads[3][1] == torch.int32
    assert flash.args[6:] == (14, 0.1, True, False) and flash.kwargs == {"scale": K**-0.5}
    out, lse, rng_state, *_ = flash.meta["val"]
    assert (out.shape, out.dtype, out.device.type) == ((T, H, K), torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype) == ((H, T), torch.float32)
    assert (rng_state.shape, rng_state.dtype, rng_state.device.type) == ((2,), torch.uint64, "cuda")


def test_attention_dropout_costs_an_uncompiled_layer_no_launch_and_no_byte_but_the_random_state() -> None:
    """Bounds what the forward pass of a layer of Qwen3-0.6B launches, and moves for each token, without compiling."""
    shape = {"num_hidden_layers": 1, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    seen = []
    for dropout in (0.0, 0.1):
        model = tiny_causal_lm(**shape, **heads)
        model.set_attn_implementation(register_attention())
        apply_dropout(model, DropoutConfig(attention=dropout))
        layer = model.model.layers[0].train().requires_grad_(False)
        nodes = launches(layer_graph(layer, tokens=4096, width=1024, head_width=128, longest=512))
        seen.append((len(nodes), bytes_moved(nodes)))
    (plain_launches, plain_bytes), (dropped_launches, dropped_bytes) = seen
    assert dropped_launches == plain_launches <= 64
    assert dropped_bytes - plain_bytes < 100 and plain_bytes / 4096 < 490_000


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
