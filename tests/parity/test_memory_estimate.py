"""Bytes counted by formula against bytes allocated."""

import pytest

from benchmarks.memory import SHAPES, WAYS, compare, compare_fake


@pytest.mark.parametrize("shape", SHAPES.values(), ids=["qwen3", "qwen2"])
@pytest.mark.parametrize(
    ("way", "policy"),
    [
        ("full", "none"),
        ("full", "selective"),
        ("LoRA", "none"),
        ("LoRA", "full"),
        ("QLoRA", "none"),
        ("freeze", "offload"),
        ("full, dropout", "none"),
        ("full, padded", "none"),
    ],
)
def test_a_training_step_allocates_what_the_formulas_say(shape, way, policy):
    predicted, measured = compare(shape, WAYS[way], policy)
    assert predicted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("words", [["model=qwen3_0_6b"], ["model=qwen2_5_7b", "recipe=lora"]])
def test_at_full_size_autograd_keeps_what_the_formulas_say(words):
    predicted, kept = compare_fake(words)
    assert predicted == pytest.approx(kept, rel=0.01)
