from pathlib import Path

import pytest

from qwlit.config.compose import compose
from qwlit.core.devices import Devices
from qwlit.core.errors import ConfigError
from qwlit.planning import setup
from qwlit.run import training_run
from qwlit.training import machine

H100 = Devices(1, "NVIDIA H100", True, 85.0)
RTX4090 = Devices(2, "NVIDIA GeForce RTX 4090", True, 25.4)
T4 = Devices(4, "Tesla T4", False, 15.8)
NONE = Devices(0, "CPU", False)


@pytest.mark.parametrize(
    ("profile", "here", "said"),
    [
        ("a100x4", NONE, "hardware=a100x4 needs 4 CUDA devices of 40 GB, but this machine has none"),
        ("a100", NONE, "hardware=a100 needs a CUDA device of 40 GB, but this machine has none"),
        (
            "h100x8",
            H100,
            "hardware=h100x8 needs 8 CUDA devices of 80 GB per node, but this machine has 1 x NVIDIA H100, 85 GB",
        ),
        (
            "a100",
            RTX4090,
            "hardware=a100 needs a CUDA device of 40 GB per node,"
            " but this machine has 2 x NVIDIA GeForce RTX 4090, 25 GB",
        ),
        (
            "rtx4090",
            T4,
            "hardware=rtx4090 needs a CUDA device of 24 GB per node, but this machine has 4 x Tesla T4, 16 GB",
        ),
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


def test_bfloat16_is_refused_where_the_card_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(1, "Quadro RTX 6000", False, 25.4))
    hardware = compose(["hardware=rtx4090"]).config.hardware
    with pytest.raises(ConfigError, match=r"Quadro RTX 6000 has no bfloat16; set hardware\.precision=16-mixed"):
        machine.resolve_machine(hardware, "fast", profile="rtx4090")


def test_a_training_resolves_its_machine_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    detected = []
    monkeypatch.setattr(machine, "detect_devices", lambda: detected.append(NONE) or NONE)
    # The plan needs the machine first; what follows takes long and resolves no machine.
    monkeypatch.setattr(setup, "why_not_sharded", lambda config, machine: (_ for _ in ()).throw(Reached))
    with pytest.raises(Reached):
        training_run.train(compose(["experiment=demo", f"run.root={tmp_path}"]))
    assert detected == [NONE]


@pytest.mark.parametrize("recipe", ["full_sft", "freeze", "lora", "qlora"])
def test_on_a_gpu_a_recipe_with_its_dropout_has_varlen_attention_and_compiled_layers(recipe: str) -> None:
    found = setup.resolve_setup(compose(["hardware=a100x4", f"recipe={recipe}"]), trust_profile=True)
    assert (found.attention, found.execution.compiled, found.compile_obstacle) == ("varlen (auto)", True, None)
