"""Bytes counted by formula against bytes allocated."""

import pytest

from benchmarks.memory import SHAPES, WAYS, compare, compare_fake, compare_sharded


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


@pytest.mark.parametrize(
    ("level", "on_host", "reduce_once"),
    [
        ("none", False, False),
        ("full", False, False),
        ("full", False, True),
        ("none", True, True),
        ("full", True, False),
    ],
)
def test_fsdp2_allocates_at_the_width_of_a_7b_what_the_formulas_say(level, on_host, reduce_once):
    """Four of its 28 layers: the layers above and below repeat what these do."""
    words = ["model=qwen2_7b", "model.architecture.num_hidden_layers=4", f"hardware.activation_checkpointing={level}"]
    words += ["hardware.offload_optimizer=true"] * on_host
    predicted, measured = compare_sharded(words, reduce_once=reduce_once)
    assert predicted == pytest.approx(measured, rel=0.02)
