"""Which strategy and activation checkpointing are chosen."""

from typing import Any

import pytest

from qwlit.config.compose import compose
from qwlit.core.devices import Devices
from qwlit.core.errors import ConfigError
from qwlit.planning.batch_statistics import assume_batches
from qwlit.planning.memory.estimate import CONTEXT_BYTES, FRAGMENTED_SHARE
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
        (["model=qwen2_7b"], "fsdp", "full"),
        (["model=qwen2_5_7b"], "fsdp", "full"),
        (["model=qwen3_8b"], "fsdp", "full"),
        (["model=qwen3_8b", "optim=adamw_8bit"], "fsdp", "full"),
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
    [["model=qwen3_8b", "hardware.strategy=ddp"], ["model=qwen3_4b", "optim=adamw_8bit", "hardware.strategy=ddp"]],
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


def placed(words, monkeypatch, **devices):
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(**{"num_cuda": 4, **A100, **devices}))
    monkeypatch.setattr(machine, "host_memory", lambda: 480e9)
    setup = resolve_setup(compose(words))
    return setup.fit_memory(assume_batches(setup.config, setup.machine.world_size).largest)


A100 = {"name": "NVIDIA A100-SXM4-40GB", "has_bf16": True, "memory_gb": 42.3}


def test_the_optimizer_goes_to_the_host_only_where_no_level_of_activation_checkpointing_fits(monkeypatch):
    setup, estimate = placed(["hardware=a100x4", "model=qwen3_14b", "dropout=none"], monkeypatch)
    assert estimate.fits and setup.machine.offload_optimizer and setup.machine.strategy == "fsdp"
    # 16 bytes of each parameter are shared by four devices; what is page-locked takes a power of two.
    assert 14.7e9 * 16 / 4 < estimate.host < 1.5 * 14.7e9 * 16 / 4
    assert "optimizer" not in estimate.components
    smaller, _ = placed(["hardware=a100x4", "model=qwen3_8b"], monkeypatch)
    assert not smaller.machine.offload_optimizer


@pytest.mark.parametrize("reason", ["false", "muon", "the host's memory"])
def test_what_cannot_step_on_the_host_does_not(reason, monkeypatch):
    words = {"false": ["hardware.offload_optimizer=false"], "muon": ["optim=muon"]}.get(reason, [])
    if reason == "the host's memory":
        monkeypatch.setattr(machine, "host_memory", lambda: 200e9)
        monkeypatch.setattr(machine, "detect_devices", lambda: Devices(num_cuda=4, **A100))
        setup = resolve_setup(compose(["hardware=a100x4", "model=qwen3_14b"]))
        setup, estimate = setup.fit_memory(assume_batches(setup.config, 4).largest)
    else:
        setup, estimate = placed(["hardware=a100x4", "model=qwen3_14b", *words], monkeypatch)
    assert estimate.fits is False and not setup.machine.offload_optimizer


def test_a_typed_optimizer_on_the_host_shards_and_needs_the_hosts_memory(monkeypatch):
    words = ["hardware=a100x4", "model=qwen3_0_6b", "hardware.offload_optimizer=true"]
    setup, _ = placed(words, monkeypatch)
    assert (setup.machine.strategy, setup.machine.activation_checkpointing) == ("fsdp", "none")
    with pytest.raises(ConfigError, match="with ddp the host would step the whole model once per device"):
        placed([*words, "hardware.strategy=ddp"], monkeypatch)
    remedy = "nf4 cannot be sharded; set hardware.strategy=ddp and hardware.offload_optimizer=false"
    with pytest.raises(ConfigError, match=remedy):
        placed([*words, "recipe=qlora"], monkeypatch)
    with pytest.raises(ConfigError, match=r"offload_optimizer=true needs fsdp: .* has no loss scale"):
        placed([*words, "hardware.precision=16-mixed"], monkeypatch)


@pytest.mark.parametrize(("rank", "is_refused"), [(4, True), (5, False)])
def test_8_bit_moments_need_rows_of_an_adapter_on_each_device(rank, is_refused):
    # Three devices get 2, 2 and no rows of 4, and 2, 2 and 1 of 5.
    words = ["hardware=a100x4", "hardware.devices=3", "hardware.strategy=fsdp", "recipe=lora", "optim=adamw_8bit"]
    composed = compose(["model.init=random", *words, f"adapter.rank={rank}"])
    if is_refused:
        with pytest.raises(ConfigError, match="cannot shard adapters of rank 4 over 3 devices"):
            resolve_setup(composed, trust_profile=True)
    else:
        assert resolve_setup(composed, trust_profile=True).machine.strategy == "fsdp"


def test_gradients_are_reduced_once_per_step_where_there_is_room_for_them(monkeypatch):
    words = ["hardware=a100x4", "hardware.strategy=fsdp", "train.global_batch_size=64", "dropout=none"]
    small, _ = placed([*words, "model=qwen3_0_6b"], monkeypatch)
    large, _ = placed([*words, "model=qwen3_8b"], monkeypatch)
    assert small.machine.reduce_once and not large.machine.reduce_once


@pytest.mark.parametrize(("profile", "communicators"), [("a100", 0), ("a100x4", 1)])
def test_several_devices_reserve_memory_for_the_communicator(profile, communicators, monkeypatch):
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(4, "NVIDIA A100-SXM4-40GB", True, 42.3))
    setup = resolve_setup(compose([f"hardware={profile}", "model=qwen3_0_6b", "recipe=lora"]))
    _, estimate = setup.fit_memory(assume_batches(setup.config, setup.machine.world_size).largest)
    counted = sum(size for name, size in estimate.components.items() if name != "reserve")
    beyond = estimate.components["reserve"] - CONTEXT_BYTES - FRAGMENTED_SHARE * counted
    assert beyond == pytest.approx(communicators * 288 * 2**20)
