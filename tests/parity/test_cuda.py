"""On a GPU: the varlen kernel against sdpa document by document, and the head in half precision."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwlit.model import head
from qwlit.model.attention import attend, register_attention
from qwlit.model.head import linear_cross_entropy
from qwlit.model.loss_model import LossModel
from tests.tiny import packed, random_samples, tiny_causal_lm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = (7, 130, 64, 1, 300)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def attention(kernel: Any, states: list[Tensor]) -> Tensor:
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    out, _ = attend(
        torch.nn.Identity(),
        *states,
        None,
        scaling=0.125,
        attention_kernel=kernel,
        cu_seqlens=edges,
        document_lengths=LENGTHS,
        max_seqlen=max(LENGTHS),
    )
    return out


def test_varlen_in_bf16_equals_sdpa_per_document_with_grouped_heads() -> None:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 64) for heads in (8, 2, 2)]
    states = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    weight = torch.randn(1, sum(LENGTHS), 8, 64, device="cuda")
    ours, theirs = (attention(kernel, states) for kernel in ("varlen", "sdpa"))
    exact = attention("eager", [s.detach().float() for s in states])
    assert relative(ours, exact) < 1.5 * relative(theirs, exact) + 1e-3
    gradients = [torch.autograd.grad((out.float() * weight).sum(), states) for out in (ours, theirs)]
    assert all(relative(a, b) < 2e-2 for a, b in zip(*gradients, strict=True))


def test_in_float32_sdpa_with_grouped_heads_equals_eager() -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, heads, sum(LENGTHS), 64, device="cuda") for heads in (8, 2, 2)]
    assert relative(attention("sdpa", states), attention("eager", states)) < 1e-3


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_model_under_bf16_autocast_has_the_loss_of_sdpa_with_varlen(family: str) -> None:
    causal_lm = tiny_causal_lm(family).cuda()
    causal_lm.set_attn_implementation(register_attention())
    micro = packed(random_samples([20, 5, 33])).to("cuda")
    losses = []
    for kernel in ("varlen", "sdpa"):
        with torch.autocast("cuda", torch.bfloat16):
            losses.append(LossModel(causal_lm, kernel).train()(micro).loss_sum)  # type: ignore[arg-type]
        losses[-1].backward()
    assert abs(losses[0] / losses[1] - 1) < 5e-3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in causal_lm.parameters())


def test_the_head_in_bf16_equals_cross_entropy_and_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cuda", 4 * 5003 * 100)  # several chunks
    torch.manual_seed(0)
    hidden = torch.randn(512, 128, device="cuda").requires_grad_()
    weight = torch.randn(5003, 128, device="cuda").mul_(0.1).requires_grad_()
    targets = torch.randint(0, 5003, (512,), device="cuda")
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    theirs = torch.autograd.grad(expected, (hidden, weight))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            loss_sum, _ = linear_cross_entropy(hidden, weight, targets, count_correct=True)
        ours = torch.autograd.grad(loss_sum, (hidden, weight))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative(loss_sum, expected) < 1e-2
    assert all(relative(a, b) < 2e-2 for a, b in zip(ours, theirs, strict=True))
