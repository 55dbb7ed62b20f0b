"""Which strategy and activation checkpointing are chosen."""

from typing import Any

import pytest

from qwlit.config.compose import compose
from qwlit.core.devices import Devices
from qwlit.planning.batch_statistics import assume_batches
from qwlit.planning.setup import resolve_setup
from qwlit.training import machine


def fitted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(4, "NVIDIA A100-SXM4-40GB", True, 42.3))
    setup = resolve_setup(compose(["hardware=a100x4", *words]))
    return setup.fit_memory(assume_batches(setup.config, 4).largest)


@pytest.mark.parametrize(
    ("words", "strategy", "memory"),
    [
        # 16 bytes a trained parameter: 9, 26 and 60 GiB before any activation.
        (["model=qwen3_0_6b"], "ddp", "none"),
        (["model=qwen3_1_7b"], "fsdp", "selective"),
        (["model=qwen3_4b"], "fsdp", "full"),
        (["model=qwen3_0_6b", "hardware.strategy=fsdp"], "fsdp", "none"),
        (["model=qwen3_0_6b", "hardware.activation_checkpointing=full"], "ddp", "full"),
        # Frozen in bfloat16: 15 and 61 GiB; in 4 bits 17.
        (["model=qwen3_8b", "recipe=lora"], "ddp", "full"),
        (["model=qwen3_32b", "recipe=lora"], "fsdp", "full"),
        (["model=qwen3_32b", "recipe=qlora"], "ddp", "full"),
    ],
)
def test_the_cheapest_strategy_and_policy_that_fit_are_taken(words, strategy, memory, monkeypatch):
    setup, estimate = fitted(words, monkeypatch)
    assert estimate.fits
    assert (
        setup.machine.strategy,
        setup.machine.activation_checkpointing,
        setup.execution.activation_checkpointing,
    ) == (strategy, memory, memory)


@pytest.mark.parametrize(
    "words",
    [["model=qwen3_8b", "hardware.strategy=ddp"], ["model=qwen3_4b", "optim=adamw_8bit"]],
)
def test_what_may_not_be_sharded_and_does_not_fit_is_counted_at_its_smallest(words, monkeypatch):
    setup, estimate = fitted(words, monkeypatch)
    assert estimate.fits is False
    assert (setup.machine.strategy, setup.machine.activation_checkpointing) == ("ddp", "offload")
    assert not setup.execution.compiled


def test_sharding_over_twice_the_devices_halves_weights_and_moments(monkeypatch):
    _, four = fitted(["model=qwen3_4b"], monkeypatch)
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(8, "NVIDIA A100-SXM4-40GB", True, 42.3))
    setup = resolve_setup(compose(["hardware=a100x8", "model=qwen3_4b", "hardware.strategy=fsdp"]))
    _, eight = setup.fit_memory(assume_batches(setup.config, 8).largest)
    for name in ("weights", "optimizer"):
        assert four.components[name] == pytest.approx(2 * eight.components[name], rel=1e-6)
