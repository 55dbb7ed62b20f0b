"""What docs/architecture.md says one writes to add something is enough."""

import pytest
import torch

from qwlit.config.compose import compose
from qwlit.core.errors import ConfigError
from qwlit.optim.groups import plan_groups
from qwlit.optim.kinds import OPTIMIZERS, OptimizerKind, torch_group
from qwlit.optim.optimizers import build_optimizer, set_clip_and_skip
from qwlit.planning.batch_statistics import assume_batches
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.planning.memory.optimizer import step_bytes
from qwlit.planning.setup import Setup, resolve_setup

FAKE = OptimizerKind(
    build=lambda groups, config: torch.optim.Adagrad([torch_group(group) for group in groups]),
    state_bytes=lambda name, parameter, config: 7,
    step_bytes=lambda groups, share: 2 * 2**30,
    can_be_sharded=False,
    allows_strict=False,
)


def planned(words: list[str]) -> tuple[Setup, MemoryEstimate]:
    setup = resolve_setup(compose(words), trust_profile=True)
    return setup.fit_memory(assume_batches(setup.config, setup.machine.world_size).largest)


@pytest.fixture
def fake_optimizer(monkeypatch, tmp_path):
    """Register an optimizer as its author would; return the override that finds its YAML file."""
    monkeypatch.setitem(OPTIMIZERS, "fake", FAKE)
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "fake.yaml").write_text("defaults: [adamw, _self_]\nname: fake\n")
    return f"hydra.searchpath=[file://{tmp_path}]"


def test_an_optimizer_is_one_entry_in_the_table_and_one_yaml_file(fake_optimizer):
    words = [fake_optimizer, "optim=fake", "hardware=a100x4"]
    setup, estimate = planned(words)
    assert setup.config.optim.name == "fake"
    assert estimate.components["optimizer"] == 7 * setup.num_trainable
    assert step_bytes(setup.groups, torch.Tensor.numel) == 2 * 2**30
    for refused, said in (
        ("hardware.strategy=fsdp", "optim.name=fake cannot be sharded"),
        ("determinism=strict", "optim.name=fake uses fewer bits"),
        ("optim.amsgrad=true", "works only with adamw, but optim.name=fake"),
    ):
        with pytest.raises(ConfigError, match=said):
            planned([*words, refused])


def test_an_optimizer_of_the_table_is_built_clips_and_skips(fake_optimizer):
    config = compose([fake_optimizer, "optim=fake", "hardware=cpu"]).config.optim
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(plan_groups(layer.named_parameters(), config), config)
    before = layer.weight.detach().clone()
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    set_clip_and_skip(optimizer, torch.tensor(float("nan")), 1.0)
    optimizer.step()
    assert torch.equal(layer.weight, before)
    set_clip_and_skip(optimizer, torch.tensor(1.0), 1.0)
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_a_name_outside_the_table_is_refused_with_all_names():
    with pytest.raises(ConfigError, match=r"optim.name=adamv: .*'adamw', 'muon', 'sgd', .* Did you mean 'adamw'"):
        compose(["optim.name=adamv"])
