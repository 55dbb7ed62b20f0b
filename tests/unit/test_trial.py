"""Overrides and names of a W&B sweep's trials."""

import pytest

from qwlit.config.compose import compose


@pytest.fixture
def agent(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")


def test_each_trial_has_a_folder_of_its_own_unless_a_name_is_typed(agent, tmp_path):
    assert compose(["recipe=lora"]).config.run.name == "qwen3_0_6b-lora-demo-abc123"
    assert compose(["run.name=mine"]).config.run.name == "mine"
    long = compose([f"data.path={'x' * 300}.jsonl"]).config
    assert long.run.name.endswith("-abc123") and len(long.run.name) <= 200


def test_without_an_agent_names_stay_what_they_are(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert compose(["recipe=lora"]).config.run.name == "qwen3_0_6b-lora-demo"


def test_a_whole_wandb_config_as_arguments_is_read_like_the_sweeps_own_values(agent):
    values = ["optim.lr=0.0002", "train.max_grad_norm=None", "validation.early_stopping_patience=3"]
    typed = ["optim.lr=0.0002", "train.max_grad_norm=null", "validation.early_stopping_patience=3"]
    whole = [
        "_wandb={'python_version': '3.11.7', 't': {'5': '0.31.0', '3': [2, 5]}}",
        "qwlit={'run': {'name': 'a', 'root': 'runs'}, 'optim': {'lr': 1, 'groups': []}, 'seed': 0}",
        "wandb_version=1",
    ]
    assert compose([*values, *whole]).config == compose(typed).config
    listed = compose(["freeze.layers=None", "data.val_path=None.jsonl", "data.path=[None.jsonl, x.jsonl]"]).config
    assert (listed.freeze.layers, listed.data.val_path) == (None, "None.jsonl")
