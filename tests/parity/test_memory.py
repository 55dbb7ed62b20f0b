"""The memory levels: the same gradients on every level, and less kept on each."""

import itertools

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType

from qwlit.core.batch import MicroBatch
from qwlit.model.activation_checkpointing import apply_activation_checkpointing
from qwlit.model.adapters import apply_adapter
from qwlit.model.attention import register_attention
from qwlit.model.config import ActivationCheckpointing, AdapterConfig, DropoutConfig
from qwlit.model.cpu import WORKSPACES
from qwlit.model.dropout import apply_dropout
from qwlit.model.loss_model import LossModel
from tests.tiny import packed, padded, random_samples, tiny_causal_lm

LEVELS: list[ActivationCheckpointing] = ["none", "selective", "full", "offload"]
SAMPLES = random_samples([40, 7, 23])


def gradients(
    family: str, policy: ActivationCheckpointing, micro: MicroBatch, *, lora: bool, dropout: float = 0.1
) -> dict[str, torch.Tensor]:
    causal_lm = tiny_causal_lm(family)
    causal_lm.set_attn_implementation(register_attention())
    if lora:
        causal_lm.requires_grad_(False)
        apply_adapter(causal_lm, AdapterConfig(kind="lora", rank=4), dropout=dropout, seed=1)
    apply_dropout(causal_lm, DropoutConfig(attention=dropout, feed_forward=dropout, lora=dropout))
    apply_activation_checkpointing(causal_lm, policy)
    model = LossModel(causal_lm, "sdpa").train()
    torch.manual_seed(5)
    for _ in range(2):  # two micro-batches, as in accumulation
        model(micro).loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "lora", "layout"), itertools.product(["qwen2", "qwen3"], [False, True], [packed, padded])
)
def test_every_rung_gives_the_same_gradients_to_the_bit_with_dropout_on(family, lora, layout):
    expected = gradients(family, "none", layout(SAMPLES), lora=lora)
    assert expected
    for policy in LEVELS[1:]:
        found = gradients(family, policy, layout(SAMPLES), lora=lora)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), policy


def kept_bytes(policy: ActivationCheckpointing) -> int:
    """Return the bytes of activations alive between the forward and the backward pass."""
    causal_lm = tiny_causal_lm("qwen3")
    causal_lm.set_attn_implementation(register_attention())
    apply_activation_checkpointing(causal_lm, policy)
    model = LossModel(causal_lm, "sdpa").train()
    WORKSPACES.clear()
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        loss = model(packed(random_samples([100, 90]))).loss_sum
        WORKSPACES.clear()  # the head's, which is no activation
        (snapshot,) = tracker.get_tracker_snapshot("current").values()
    del loss
    return snapshot[_MemRefType.ACT]


def test_each_rung_keeps_less():
    none, selective, full = (kept_bytes(policy) for policy in LEVELS[:3])
    assert full < 0.5 * selective < 0.5 * none, (none, selective, full)
