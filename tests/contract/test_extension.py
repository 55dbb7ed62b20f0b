"""What docs/architecture.md says one writes to add something is enough."""

import importlib
import math
from pathlib import Path
from typing import get_args

import pytest
import torch

from qwlit.__main__ import SUBCOMMANDS
from qwlit.commands.help import INTROS
from qwlit.config.compose import compose
from qwlit.core.errors import ConfigError
from qwlit.data.config import RowFormat
from qwlit.data.formats import PARSERS, READ_KEYS, REQUIRED_KEYS
from qwlit.model.config import AdapterConfig, DropoutConfig, FreezeConfig
from qwlit.model.families import FAMILIES, decoder
from qwlit.model.families.decoder import ModelFamily
from qwlit.model.loss_model import build_loss_model
from qwlit.optim.groups import plan_groups
from qwlit.optim.kinds import OPTIMIZERS, OptimizerKind, torch_group
from qwlit.optim.optimizers import build_optimizer, set_clip_and_skip
from qwlit.optim.schedules import DECAYS, Schedule
from qwlit.planning.batch_statistics import assume_batches
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.planning.memory.optimizer import step_bytes
from qwlit.planning.setup import Setup, resolve_setup
from tests.tiny import packed, random_samples

FAKE = OptimizerKind(
    build=lambda groups, config: torch.optim.Adagrad([torch_group(group) for group in groups]),
    state_bytes=lambda name, parameter, config: 7,
    step_bytes=lambda groups, share: 2 * 2**30,
    sharding="none",
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
    set_clip_and_skip(optimizer, torch.tensor(float("nan")), 1.0, torch.tensor(1.0))
    optimizer.step()
    assert torch.equal(layer.weight, before)
    set_clip_and_skip(optimizer, torch.tensor(1.0), 1.0, torch.tensor(0.0))
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_a_name_outside_the_table_is_refused_with_all_names():
    with pytest.raises(ConfigError, match=r"optim.name=adamv: .*'adamw', 'muon', 'sgd', .* Did you mean 'adamw'"):
        compose(["optim.name=adamv"])


def test_a_schedule_is_one_function_in_the_table_and_one_yaml_file(monkeypatch, tmp_path):
    monkeypatch.setitem(DECAYS, "fake", lambda progress, floor: 1 - progress**2)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "fake.yaml").write_text("name: fake\nwarmup_steps: 2\n")
    config = compose([f"hydra.searchpath=[file://{tmp_path}]", "scheduler=fake", "scheduler.warmup_steps=2"]).config
    schedule = Schedule(config.scheduler, total_steps=12)
    assert [schedule.lr_multiplier(step) for step in (0, 1, 7)] == [0.5, 1.0, 0.75]


def test_an_architecture_is_one_family_and_its_presets(monkeypatch, tmp_path):
    """Llama's decoder has the modules that `ModelFamily` names, so it needs no other code."""
    monkeypatch.setitem(FAMILIES, "llama", ModelFamily("llama", "Llama"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "defaults: [family/qwen3@_here_, _self_]\nhub_id: me/mine\narchitecture: {model_type: llama, vocab_size: 97, "
        "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
        "head_dim: 8, tie_word_embeddings: true}\n"
    )
    words = [f"hydra.searchpath=[file://{tmp_path}]", "model=mine", "model.init=random", "hardware=cpu"]
    setup, estimate = planned([*words, "recipe=pretrain"])
    assert type(setup.model).__name__ == "LlamaForCausalLM"
    assert estimate.components["weights"] == 4 * setup.num_parameters
    loss_model = build_loss_model(
        setup.config.model, AdapterConfig(), DropoutConfig(), FreezeConfig(), setup.execution, seed=0
    )
    micro = packed(random_samples([9, 14]))
    loss = loss_model(micro).loss_sum / len(micro.targets)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(97), rel=0.05)
    assert all(parameter.grad is not None for parameter in loss_model.parameters())


def test_every_file_beside_the_decoder_is_a_family():
    files = {file.stem for file in Path(decoder.__file__).parent.glob("*.py")} - {"__init__", "decoder"}
    assert files == FAMILIES.keys()


def test_every_data_format_has_its_keys_and_every_one_but_tokenized_a_parser():
    names = set(get_args(RowFormat)) - {"auto"}
    assert names == REQUIRED_KEYS.keys() == READ_KEYS.keys() == PARSERS.keys() | {"tokenized"}


def test_every_subcommand_has_a_module_and_a_help_text():
    for name in SUBCOMMANDS:
        assert callable(importlib.import_module(f"qwlit.commands.{name}").main)
    assert SUBCOMMANDS.keys() == INTROS.keys()
