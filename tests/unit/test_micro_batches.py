"""hardware.micro_batch_tokens=auto and micro_batch_size=auto."""

from dataclasses import replace

import pytest

from qwlit.config.compose import compose
from qwlit.planning.micro_batches import MOST_TOKENS, plan_batches
from qwlit.planning.setup import Setup, resolve_setup


def setup_of(*words: str) -> Setup:
    return resolve_setup(compose(["model.init=random", *words]), trust_profile=True)


def limited(setup: Setup, tokens: int) -> Setup:
    hardware = replace(setup.config.hardware, micro_batch_tokens=tokens)
    return replace(setup, composed=replace(setup.composed, config=replace(setup.config, hardware=hardware)))


@pytest.mark.parametrize(
    ("words", "is_limited_by_memory"),
    [
        (["hardware=h100", "model=qwen3_0_6b", "recipe=lora"], False),
        (["hardware=a100_80", "model=qwen3_1_7b", "recipe=full_sft"], True),
    ],
)
def test_auto_takes_the_most_tokens_that_fit_without_keeping_less_of_the_forward_pass(words, is_limited_by_memory):
    setup = setup_of(*words, "dropout=none", "train.global_batch_size=256", "data.max_seq_len=1024")
    smallest, _, batches = plan_batches(limited(setup, 1024), None)
    level, memory = smallest.fit_memory(batches.largest)
    assert memory.fits
    found, _, batches = plan_batches(setup, None)
    tokens = found.config.hardware.micro_batch_tokens
    assert isinstance(tokens, int) and tokens >= 1024 and batches.largest.tokens <= tokens
    fitted, memory = found.fit_memory(batches.largest)
    assert memory.fits and fitted.machine == level.machine
    assert (tokens < MOST_TOKENS) == is_limited_by_memory
    if is_limited_by_memory:
        _, _, batches = plan_batches(limited(setup, 2 * tokens), None)
        larger, memory = found.fit_memory(batches.largest)
        assert memory.fits is False or larger.machine != level.machine


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        # 8,192 tokens would still be two micro-batches, 16,384 are one: then no gradients are kept beside it.
        (["hardware=h100x8", "model=qwen3_14b"], 16_384),
        # Reducing the gradients in each micro-batch is no reason for small ones.
        (["hardware=a100_80x4", "model=qwen3_8b", "train.global_batch_size=64"], 4096),
    ],
)
def test_auto_does_not_shrink_micro_batches_so_that_gradients_are_reduced_once(words, tokens):
    words = ["recipe=full_sft", "dropout=none", "data.max_seq_len=1024", *words]
    found, _, _ = plan_batches(setup_of(*words), None)
    assert found.config.hardware.micro_batch_tokens == tokens


def test_a_model_that_does_not_fit_gets_micro_batches_of_its_longest_sample():
    found, _, _ = plan_batches(
        setup_of("hardware=a100_80", "model=qwen3_4b", "recipe=full_sft", "hardware.gpu_memory_gb=40"), None
    )
    assert found.config.hardware.micro_batch_tokens == found.config.data.max_seq_len


def test_on_cpu_auto_is_four_samples():
    found, _, batches = plan_batches(setup_of("hardware=auto", "hardware.accelerator=cpu"), None)
    assert found.config.hardware.micro_batch_limits == (4, None)
    assert batches.accumulation[0] == 4


def test_typed_limits_stay():
    found, _, _ = plan_batches(setup_of("hardware=h100", "hardware.micro_batch_tokens=3000"), None)
    assert found.config.hardware.micro_batch_limits == (None, 3000)
