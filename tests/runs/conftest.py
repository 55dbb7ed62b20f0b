"""Data to train on, a Slurm, and W&B's server: environments in which its client talks to it, or to nobody."""

import json

import pytest

from tests.runs.runs import ENVIRONMENT
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
