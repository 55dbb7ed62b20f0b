"""On a GPU: the varlen kernel, also with dropout, against the definition; the head in half precision."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwlit.model import head
from qwlit.model.activation_checkpointing import _full, _selective, apply_activation_checkpointing
from qwlit.model.attention import attend, register_attention
from qwlit.model.compile import configure_compiler
from qwlit.model.config import DropoutConfig
from qwlit.model.dropout import apply_dropout
from qwlit.model.head import linear_cross_entropy
from qwlit.model.loss_model import LossModel
from qwlit.training.kernel_checks import Place
from qwlit.training.self_check import LIMITS, checks_for
from tests.tiny import packed, random_samples, tiny_causal_lm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = (7, 130, 64, 1, 300)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def edges() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()


def attention(kernel: Any, states: list[Tensor], dropout: float = 0.0) -> Tensor:
    out, _ = attend(
        torch.nn.Identity(),
        *states,
        None,
        scaling=0.125,
        dropout=dropout,
        attention_kernel=kernel,
        cu_seqlens=edges(),
        document_lengths=LENGTHS,
        max_seqlen=max(LENGTHS),
    )
    return out


def random_states(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Return queries, keys and values with grouped heads."""
    torch.manual_seed(0)
    return [
        torch.randn(1, heads, sum(LENGTHS), 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (8, 2, 2)
    ]


def test_varlen_in_bf16_equals_sdpa_per_document_with_grouped_heads() -> None:
    states = random_states()
    weight = torch.randn(1, sum(LENGTHS), 8, 64, device="cuda")
    ours, theirs = (attention(kernel, states) for kernel in ("varlen", "sdpa"))
    exact = attention("eager", [s.detach().float() for s in states])
    assert relative(ours, exact) < 1.5 * relative(theirs, exact) + 1e-3
    gradients = [torch.autograd.grad((out.float() * weight).sum(), states) for out in (ours, theirs)]
    assert all(relative(a, b) < 2e-2 for a, b in zip(*gradients, strict=True))


def flash(states: list[Tensor], dropout: float, *, returns_mask: bool = False) -> Any:
    """Call torch's operator: the result (T, H, K) first, the dropped softmax last if it is asked for."""
    q, k, v = (each[0].transpose(0, 1) for each in states)
    longest = max(LENGTHS)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, edges(), edges(), longest, longest, dropout, True, returns_mask, scale=0.125
    )


def test_the_flash_operator_without_dropout_is_varlen_attention_to_the_bit() -> None:
    states = random_states()
    ours, theirs = flash(states, 0.0)[0], attention("varlen", states)[0]
    assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(out.float().square().sum(), states) for out in (ours, theirs)]
    # The backward kernel adds to the gradient of the queries in an order that is not fixed.
    assert all(relative(a, b) < 1e-3 for a, b in zip(*gradients, strict=True))


def by_definition(states: list[Tensor], dropped: Tensor, dropout: float) -> Tensor:
    """Attend in float32 with the mask (documents, H, L, L) of what is dropped: (1, T, H, K)."""
    query, key, value = (each.float() for each in states)
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    outs = []
    for number, (start, end) in enumerate(pairwise(edges().tolist())):
        q, k, v = (each[0, :, start:end] for each in (query, key, value))
        future = torch.ones(end - start, end - start, dtype=torch.bool, device="cuda").triu(1)
        weights = (q @ k.mT * 0.125).masked_fill(future, float("-inf")).softmax(-1)
        kept = ~dropped[number, :, : end - start, : end - start] / (1 - dropout)
        outs.append((weights * kept @ v).transpose(0, 1))
    return torch.cat(outs).unsqueeze(0)


def test_varlen_with_dropout_and_its_gradients_are_those_of_the_definition_with_the_same_mask() -> None:
    states, dropout = random_states(), 0.25
    torch.manual_seed(4)
    # The kernel marks what it drops by the sign of the weight that it returns.
    dropped = flash(states, dropout, returns_mask=True)[4].signbit()
    torch.manual_seed(4)
    ours = attention("varlen", states, dropout)
    expected = by_definition(states, dropped, dropout)
    assert relative(ours, attention("varlen", states)) > 0.1
    assert relative(ours, expected) < 2e-2
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out.float() * weight).sum(), states) for out in (ours, expected)]
    assert all(relative(a, b) < 2e-2 for a, b in zip(*gradients, strict=True))


def test_varlen_with_dropout_repeats_with_the_seed_and_its_mean_is_the_result_without() -> None:
    states, draws = [each.detach() for each in random_states()], []
    for seed in range(400):
        torch.manual_seed(seed)
        draws.append(attention("varlen", states, 0.1).float())
    torch.manual_seed(0)
    assert torch.equal(attention("varlen", states, 0.1).float(), draws[0])
    plain = attention("varlen", states).float()
    # One draw deviates by about sqrt(0.1 / 0.9) = 0.33 of the norm, the mean of 400 by a twentieth of that.
    assert relative(draws[0], plain) > 0.1
    assert relative(torch.stack(draws).mean(0), plain) < 0.05


@pytest.mark.parametrize("level", ["selective", "full"])
def test_layers_computed_again_drop_the_same_elements_again(level: Any) -> None:
    gradients = []
    for chosen in ("none", level):
        causal_lm = tiny_causal_lm().cuda()
        causal_lm.set_attn_implementation(register_attention())
        apply_dropout(causal_lm, DropoutConfig(attention=0.1, feed_forward=0.1, residual=0.1))
        apply_activation_checkpointing(causal_lm, chosen)
        torch.manual_seed(5)
        with torch.autocast("cuda", torch.bfloat16):
            loss_sum = LossModel(causal_lm, "varlen").train()(packed(random_samples([20, 5, 33])).to("cuda")).loss_sum
        loss_sum.backward()
        gradients.append([p.grad for p in causal_lm.parameters() if p.grad is not None])
    # Other draws differ by far more; the rest is the order in which the backward kernel adds.
    assert all(relative(a, b) < 5e-2 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("level", [None, _selective, _full])
def test_compiled_attention_drops_what_the_seed_says_and_the_same_in_the_backward_pass(level: Any) -> None:
    """The result is linear in the values, so its product with any tensor is that of the values with their gradient."""
    query, key, value = random_states()

    def run(value: Tensor) -> Tensor:
        return attention("varlen", [query, key, value], 0.5)

    torch._dynamo.reset()
    configure_compiler()
    compiled = torch.compile(run if level is None else lambda value: level(run, value), fullgraph=True)
    torch.manual_seed(4)
    out = compiled(value)
    weight = out.detach()
    (gradient,) = torch.autograd.grad((out.float() * weight).sum(), value)
    product = (out.double() * weight).sum()
    assert abs((gradient.double() * value).sum() / product - 1) < 1e-2
    # A mask of its own in the backward pass would show.
    assert abs((run(value).double() * weight).sum() / product - 1) > 0.1
    torch.manual_seed(4)
    assert torch.equal(compiled(value), out)


def test_in_float32_sdpa_with_grouped_heads_equals_eager() -> None:
    states = random_states(torch.float32)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_self_check_of_a_run_passes_with_a_margin(dtype: torch.dtype) -> None:
    place = Place(torch.device("cuda", 0), dtype, "varlen" if dtype == torch.bfloat16 else "sdpa", "qwen3")
    deviations = {
        check.subject: check.deviation(place) for check in checks_for(place, attention_dropout=True, fused_adamw=True)
    }
    assert all(deviation < LIMITS[dtype] / 2 for deviation in deviations.values()), deviations
