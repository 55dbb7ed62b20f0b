"""Presets: every YAML composes and counts to the published number of parameters."""

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from qwlit.core.errors import ConfigError
from qwlit.model.config import Architecture, DropoutConfig, ModelConfig
from qwlit.model.load import vocabulary_size
from qwlit.model.presets import meta_causal_lm, to_hf_config
from tests.tiny import TINY, tiny_architecture, tiny_causal_lm

CONF = Path(__file__).parents[2] / "conf"

PUBLISHED = {
    "qwen3_0_6b": ("Qwen/Qwen3-0.6B", 596_049_920),
    "qwen3_1_7b": ("Qwen/Qwen3-1.7B", 1_720_574_976),
    "qwen3_4b": ("Qwen/Qwen3-4B", 4_022_468_096),
    "qwen3_8b": ("Qwen/Qwen3-8B", 8_190_735_360),
    "qwen3_14b": ("Qwen/Qwen3-14B", 14_768_307_200),
    "qwen3_32b": ("Qwen/Qwen3-32B", 32_762_123_264),
    "qwen2_5_0_5b": ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
    "qwen2_5_1_5b": ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
    "qwen2_5_3b": ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
    "qwen2_5_7b": ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
    "qwen2_0_5b": ("Qwen/Qwen2-0.5B-Instruct", 494_032_768),
    "qwen2_1_5b": ("Qwen/Qwen2-1.5B-Instruct", 1_543_714_304),
    "qwen2_7b": ("Qwen/Qwen2-7B-Instruct", 7_615_616_512),
}


def composed(group: str, name: str, kind: type) -> object:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = compose(overrides=[f"+{group}={name}"])
    return TypeAdapter(kind).validate_python(OmegaConf.to_container(tree[group], resolve=True))


def count_parameters(architecture: Architecture) -> int:
    """Count a tied head once."""
    return sum(parameter.numel() for parameter in meta_causal_lm(to_hf_config(architecture)).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_count(name: str) -> None:
    hub_id, parameters = PUBLISHED[name]
    config = composed("model", name, ModelConfig)
    assert isinstance(config, ModelConfig) and config.architecture
    assert config.hub_id == hub_id
    assert count_parameters(config.architecture) == parameters
    assert vocabulary_size(config) == config.architecture.vocab_size


def test_every_model_file_is_published_or_the_demo_and_short() -> None:
    files = {file.stem: file for file in (CONF / "model").glob("*.yaml")}
    assert files.keys() == {*PUBLISHED, "demo"}
    assert all(len(file.read_text().splitlines()) <= 20 for file in (CONF / "model").rglob("*.yaml"))


def test_the_demo_needs_no_hub_and_has_a_million_parameters() -> None:
    demo = composed("model", "demo", ModelConfig)
    assert isinstance(demo, ModelConfig) and demo.architecture
    assert (demo.hub_id, demo.init) == (None, "random")
    assert 1e6 < count_parameters(demo.architecture) < 2e6


@pytest.mark.parametrize(
    ("name", "attention", "feed_forward"),
    [("none", 0, 0), ("pretrain", 0.1, 0.1), ("full_sft", 0.05, 0.05), ("lora", 0, 0)],
)
def test_dropout_of_each_stage(name: str, attention: float, feed_forward: float) -> None:
    expected = DropoutConfig(attention=attention, feed_forward=feed_forward)
    assert composed("dropout", name, DropoutConfig) == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_that_of_a_real_model(family: str, tied: bool) -> None:
    real = sum(p.numel() for p in tiny_causal_lm(family, tied=tied).parameters())
    assert count_parameters(tiny_architecture(family, tied=tied)) == real


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "must divide num_attention_heads=4"),
        ({"head_dim": 15}, "must be even"),
        ({"head_dim": None, "hidden_size": 33}, "no multiple of num_attention_heads=4"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(change: dict[str, int | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_hf_config(replace(TINY, **change))
