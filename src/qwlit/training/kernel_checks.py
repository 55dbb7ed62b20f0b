"""Compare each way of computing that is qwlit's own with plain torch in float64, on small tensors.

Each check returns the largest relative deviation of results and gradients; infinity where a path does something else
than it should. Shapes: B sequences, T positions, H query heads, G key/value heads, K width of a head, L length of a
document, N label positions, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwlit.core.batch import MicroBatch
from qwlit.model.attention import attend, register_attention
from qwlit.model.config import Architecture, AttentionKernel
from qwlit.model.families import FAMILIES
from qwlit.model.head import CHUNK_BYTES, linear_cross_entropy
from qwlit.model.loss_model import LossModel
from qwlit.model.presets import to_hf_config
from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import plan_groups
from qwlit.optim.optimizers import build_optimizer, set_clip_and_skip

# No document is longer than a head is wide, see `attention_dropout`.
LENGTHS, WIDTH = (3, 64, 1, 40), 64
HEADS = (4, 2, 2)
DROPOUT = 0.25
SEED = 1


@dataclass(frozen=True)
class Place:
    """Where and how a training computes."""

    device: torch.device
    dtype: torch.dtype
    """That of matrix products."""
    attention: AttentionKernel
    model_type: str

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Seed the generators in the block, and leave them as they were."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(SEED)
            yield

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return normal numbers, the same on every device, that require a gradient."""
        return torch.randn(*shape).to(self.device, dtype).requires_grad_()


def attention(place: Place) -> float:
    """Check attention over packed documents with grouped heads."""
    with place.seeded():
        states = [place.random(1, heads, sum(LENGTHS), WIDTH, dtype=place.dtype) for heads in HEADS]
    return _attention_deviation(place, states, dropout=0.0, factors=None)


def attention_dropout(place: Place) -> float:
    """Check dropout on the attention weights: the share that is dropped, the scale of the rest, and the gradients."""
    with place.seeded():
        states = [place.random(1, heads, sum(LENGTHS), WIDTH, dtype=place.dtype) for heads in HEADS]
    # Where the value of a document's position is a unit vector, the result is the attention weights themselves.
    units = torch.cat([torch.eye(length, WIDTH) for length in LENGTHS]).to(states[2])
    with place.seeded(), torch.no_grad():
        weights = _attend(place, [*states[:2], units.expand_as(states[2])], DROPOUT)[0].cpu()  # (T, H, K)
    kept = [each[..., : len(each)].transpose(0, 1) != 0 for each in weights.split(LENGTHS)]  # (H, L, L)
    pairs = HEADS[0] * sum(length * (length + 1) // 2 for length in LENGTHS)
    dropped = 1 - sum(int(each.sum()) for each in kept) / pairs
    if abs(dropped - DROPOUT) > 0.05:
        return inf
    return _attention_deviation(place, states, DROPOUT, [each / (1 - DROPOUT) for each in kept])


def _attention_deviation(place: Place, states: list[Tensor], dropout: float, factors: list[Tensor] | None) -> float:
    """Compare `attend` with the definition; `factors` (H, L, L) multiply the weights of each document."""
    exact = [each.detach().cpu().double().requires_grad_() for each in states]
    with place.seeded():
        found = _attend(place, states, dropout)
    expected = _attend_by_definition(exact, factors)
    with place.seeded():
        upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(found, states, upstream.to(found))
    theirs = torch.autograd.grad(expected, exact, upstream)
    return _largest_deviation([found, *ours], [expected, *theirs])


def _attend(place: Place, states: list[Tensor], dropout: float) -> Tensor:
    """Attend as a training does: (1, T, H, K)."""
    edges, (query, key, value) = torch.tensor([0, *LENGTHS]).cumsum(0).int(), states
    out, _ = attend(
        nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=WIDTH**-0.5,
        dropout=dropout,
        attention_kernel=place.attention,
        cu_seqlens=edges.to(place.device),
        document_lengths=LENGTHS,
        max_seqlen=max(LENGTHS),
    )
    return out


def _attend_by_definition(states: list[Tensor], factors: list[Tensor] | None) -> Tensor:
    query, key, value = states
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    outs = []
    for number, (q, k, v) in enumerate(
        zip(*(each[0].split(LENGTHS, dim=1) for each in (query, key, value)), strict=True)
    ):
        future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        weights = (q @ k.mT * WIDTH**-0.5).masked_fill(future, -inf).softmax(-1)
        weights = weights if factors is None else weights * factors[number]
        outs.append((weights @ v).transpose(0, 1))
    return torch.cat(outs).unsqueeze(0)


def head(place: Place) -> float:
    """Check the head's loss and gradients over several chunks."""
    with place.seeded():
        hidden, weight = place.random(40, 64), place.random(512, 64)  # (N, D), (V, D)
        targets = torch.randint(len(weight), (len(hidden),))
    with _chunk_bytes(place.device.type, 4 * len(weight) * 16), place.autocast():
        loss_sum, _ = linear_cross_entropy(hidden, weight, targets.to(place.device))
    exact = [each.detach().cpu().double().requires_grad_() for each in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    ours, theirs = torch.autograd.grad(loss_sum, (hidden, weight)), torch.autograd.grad(expected, exact)
    return _largest_deviation([loss_sum, *ours], [expected, *theirs])


@contextmanager
def _chunk_bytes(device: str, size: int) -> Iterator[None]:
    """Let the head compute in chunks of `size` bytes: as many as it usually takes are too many for a check."""
    before, CHUNK_BYTES[device] = CHUNK_BYTES[device], size
    try:
        yield
    finally:
        CHUNK_BYTES[device] = before


def optimizer(place: Place) -> float:
    """Check that AdamW's fused kernel clips by `grad_scale`, and leaves everything as it is where `found_inf` is 1."""
    config = OptimConfig(lr=0.01, weight_decay=0.1)
    with place.seeded():
        weight = nn.Parameter(place.random(33, 17).detach())
        gradients = [torch.randn(33, 17) * size for size in (1.0, torch.nan, 10.0)]
    fused = build_optimizer(plan_groups([("weight", weight)], config), config)
    start = weight.detach().cpu().double()
    for gradient in gradients:
        weight.grad = gradient.to(place.device)
        norm = gradient.norm().to(place.device)
        set_clip_and_skip(fused, norm, 1.0, (~norm.isfinite()).float())
        fused.step()
    expected = _adamw(start, [each.double() for each in gradients if each.isfinite().all()], config)
    return _largest_deviation([weight.detach().cpu().double() - start], [expected - start])


def _adamw(weight: Tensor, gradients: Sequence[Tensor], config: OptimConfig) -> Tensor:
    """Return the weight after AdamW's steps with gradients clipped to norm 1 (Loshchilov and Hutter 2019)."""
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    beta1, beta2 = config.betas
    for step, gradient in enumerate(gradients, start=1):
        clipped = gradient / gradient.norm().clamp(min=1.0)
        first = beta1 * first + (1 - beta1) * clipped
        second = beta2 * second + (1 - beta2) * clipped.square()
        update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + config.eps)
        weight = weight - config.lr * (config.weight_decay * weight + update)
    return weight


def last_layer(place: Place) -> float:
    """Check a small model, whose last layer computes the label positions only, against transformers' whole one."""
    with place.seeded():
        model = _small_model(place.model_type)
        ids = [torch.randint(model.config.vocab_size, (length,)) for length in LENGTHS]
        labels = torch.randperm(sum(LENGTHS) - 1)[:20].sort().values
    exact = deepcopy(model).double()
    tokens = torch.cat(ids)
    micro = MicroBatch(
        input_ids=tokens[None],
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        label_positions=labels,
        targets=tokens[labels + 1],
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        document_lengths=LENGTHS,
        sample_lengths=torch.tensor(LENGTHS),
        sample_ids=tuple(range(len(LENGTHS))),
    ).to(place.device)
    states = torch.cat([exact(document[None]).logits[0] for document in ids])
    expected = F.cross_entropy(states[labels], tokens[labels + 1], reduction="sum")
    expected.backward()
    model.set_attn_implementation(register_attention())
    with place.autocast():
        loss_sum = LossModel(model.to(place.device), place.attention).train()(micro).loss_sum
    loss_sum.backward()
    ours, theirs = (torch.cat([p.grad.cpu().double().flatten() for p in each.parameters()]) for each in (model, exact))
    return _largest_deviation([loss_sum, ours], [expected, theirs])


def _small_model(model_type: str) -> Any:
    """Return a model of two layers with random weights, on the CPU, with transformers' own attention."""
    shape = Architecture(
        model_type=model_type,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=HEADS[0],
        num_key_value_heads=HEADS[1],
        head_dim=32,
        max_position_embeddings=max(LENGTHS),
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
    )
    config = to_hf_config(shape)
    config._attn_implementation = "eager"
    _, model_class = FAMILIES[model_type].classes()
    return model_class(config)


def _largest_deviation(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the largest of |ours - theirs| / |theirs|; infinity if a number is not finite."""
    deviations = [
        ((our.detach().cpu().double() - their.detach()).norm() / their.detach().norm()).item()
        for our, their in zip(ours, theirs, strict=True)
    ]
    return max(deviation if isfinite(deviation) else inf for deviation in deviations)
