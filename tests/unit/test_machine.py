from functools import partial
from typing import Any

import pytest

from qwlit.config.compose import compose
from qwlit.core.devices import Devices
from qwlit.core.errors import ConfigError
from qwlit.job import assemble
from qwlit.model.cost import training_state_bytes
from qwlit.training import machine

H100 = Devices(1, "NVIDIA H100", True, 85.0)
RTX4090 = Devices(2, "NVIDIA GeForce RTX 4090", True, 25.4)
T4 = Devices(4, "Tesla T4", False, 15.8)
NONE = Devices(0, "CPU", False)


@pytest.mark.parametrize(
    ("profile", "here", "said"),
    [
        ("a100x4", NONE, "hardware=a100x4 needs 4 CUDA devices of 40 GB, here: none"),
        ("a100", NONE, "hardware=a100 needs a CUDA device of 40 GB, here: none"),
        ("h100x8", H100, "hardware=h100x8 needs 8 CUDA devices of 80 GB a node, here: 1 x NVIDIA H100, 85 GB"),
        (
            "a100",
            RTX4090,
            "hardware=a100 needs a CUDA device of 40 GB a node, here: 2 x NVIDIA GeForce RTX 4090, 25 GB",
        ),
        ("rtx4090", T4, "hardware=rtx4090 needs a CUDA device of 24 GB a node, here: 4 x Tesla T4, 16 GB"),
    ],
)
def test_a_profile_that_the_machine_does_not_have_says_what_it_needs_and_what_is_here(
    profile: str, here: Devices, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "detect_devices", lambda: here)
    hardware = compose([f"hardware={profile}"]).config.hardware
    with pytest.raises(ConfigError, match=f"^{said}") as raised:
        machine.resolve_machine(hardware, "fast", profile=profile)
    assert "experiment=demo" in str(raised.value)


@pytest.mark.parametrize(("profile", "here"), [("a100", H100), ("h100", H100), ("rtx4090", RTX4090), ("auto", T4)])
def test_a_card_as_large_or_larger_will_do(profile: str, here: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "detect_devices", lambda: here)
    hardware = compose([f"hardware={profile}"]).config.hardware
    devices = here.num_cuda if profile == "auto" else 1
    assert machine.resolve_machine(hardware, "fast", profile=profile).devices == devices


@pytest.mark.parametrize(
    ("words", "strategy"),
    [
        (["model=qwen3_0_6b"], "ddp"),  # 9.5 GB
        (["model=qwen3_1_7b"], "ddp"),  # 27.5 GB
        (["model=qwen3_4b"], "fsdp"),  # 64 GB
        (["model=qwen3_8b", "recipe=lora"], "ddp"),  # 16 GB, frozen in bf16
        (["model=qwen3_32b", "recipe=lora"], "fsdp"),  # 66 GB
        (["model=qwen3_8b", "hardware.strategy=ddp"], "ddp"),
        (["model=qwen3_0_6b", "hardware.strategy=fsdp"], "fsdp"),
    ],
)
def test_the_strategy_follows_from_what_the_model_needs_and_the_device_has(
    words: list[str], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(4, "NVIDIA A100-SXM4-40GB", True, 42.3))
    config = compose(["hardware=a100x4", *words]).config
    needs = partial(training_state_bytes, config.model, config.adapter, config.optim.amsgrad)
    assert machine.resolve_machine(config.hardware, "fast", profile="a100x4", state_bytes=needs).strategy == strategy


def test_bfloat16_is_refused_where_the_card_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(1, "Quadro RTX 6000", False, 25.4))
    hardware = compose(["hardware=rtx4090"]).config.hardware
    with pytest.raises(ConfigError, match=r"Quadro RTX 6000 has no bfloat16; set hardware\.precision=16-mixed"):
        machine.resolve_machine(hardware, "fast", profile="rtx4090")


@pytest.mark.parametrize("words", [["recipe=qlora", "model=qwen3_32b"], ["optim=paged_adamw_8bit", "model=qwen3_4b"]])
def test_what_cannot_be_sharded_is_not_sharded_by_itself(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(4, "NVIDIA A100-SXM4-40GB", True, 42.3))
    found = []
    resolve = machine.resolve_machine

    def spy(*args: Any, **kwargs: Any) -> Any:
        found.append(resolve(*args, **kwargs))
        raise StopIteration

    monkeypatch.setattr(assemble, "resolve_machine", spy)
    with pytest.raises(StopIteration):
        assemble.assemble(compose([*words, "hardware=a100x4"]))
    assert found[0].strategy == "ddp"
