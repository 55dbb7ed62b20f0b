"""Data to train on, trained runs, a Slurm, and W&B's server: with its client, or with nobody who answers."""

import json
from pathlib import Path

import pytest

from tests.runs.runs import DEMO, ENVIRONMENT, TINY, qwlit, train
from tests.slurm_cluster import Cluster
from tests.wandb_stub import WandbStub


@pytest.fixture
def place(tmp_path):
    """A folder with chat.jsonl, forty sums in two languages."""
    turns = [
        {"messages": [{"role": "user", "content": f"{n} plus {n}?"}, {"role": "assistant", "content": f"{2 * n}. 好"}]}
        for n in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with the runs `full` and `lora` (on top of full's export), and the validation rows as prompts."""
    folder = tmp_path_factory.mktemp("generate")
    lines = (DEMO / "val.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (folder / "asked.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    steps = ["train.max_steps=16", "train.max_epochs=null", "data.exact_match=0", "checkpoint.every_steps=8"]
    train([*TINY, "recipe=pretrain", "dropout=none", *steps, "run.name=full"], folder)
    model = [f"model.path={folder / 'runs/full/export'}", "data.path=asked.jsonl", "hardware=cpu"]
    lora = ["recipe=lora", "scheduler.warmup_steps=2", "optim.lr=2e-3"]
    done = qwlit(["train", *model, *lora, *steps, "run.name=lora"], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def stub():
    with WandbStub() as stub:
        yield stub
        assert not stub.unknown


@pytest.fixture
def nobody(tmp_path):
    """An environment without an API key, whatever the developer's home folder has."""
    clean = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("WANDB_")}
    places = {name: str(tmp_path / "home") for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    return clean | places | {"NETRC": str(tmp_path / "netrc"), "WANDB_ERROR_REPORTING": "false"}


@pytest.fixture
def online(stub, nobody):
    return nobody | stub.environment()
