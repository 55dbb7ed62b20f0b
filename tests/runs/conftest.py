"""W&B's server for tests, and environments in which its client talks to it, or to nobody."""

import pytest

from tests.runs.runs import ENVIRONMENT
from tests.wandb_stub import WandbStub


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
