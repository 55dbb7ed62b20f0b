"""Which process is rank 0, who launched it, and that the others wait for it."""

import threading
import time

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from qwlit.core import ranks
from qwlit.core.devices import Devices
from qwlit.core.errors import ConfigError
from qwlit.core.files import locked
from qwlit.training import machine
from qwlit.training.config import HardwareConfig
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.training.tracking.run_lock import RunLock

NAMES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT", "QWLIT_RUN_READY")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_ID", "SLURM_JOB_ID")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
AGENT = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES + SLURM:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize(
    ("values", "zero"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "0"}, True),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),
        (AGENT | {"SLURM_PROCID": "3"}, True),
    ],
)
def test_one_process_of_a_launch_is_rank_zero(values, zero, environment):
    environment(**values)
    assert ranks.is_rank_zero() is zero


@pytest.mark.parametrize(
    ("values", "devices", "said"),
    [
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2"}, 1, "2 processes were launched"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "4"},
            2,
            "4 processes were launched",
        ),
        (TASK | {"SLURM_NTASKS": "2"}, 2, "use --ntasks-per-node=2"),
        # A trial starts its own ranks, whichever task its agent is.
        (AGENT | {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}, 2, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, 4, "start it with srun"),
        (TORCHRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, 2, None),
        (TASK | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, 2, None),
    ],
)
def test_a_launch_must_agree_with_the_settings(values, devices, said, environment, monkeypatch):
    environment(**values)
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(0, "CPU", False))
    hardware = HardwareConfig(accelerator="cpu", devices=devices)
    if said is None:
        assert machine.resolve_machine(hardware, "fast", profile="cpu").world_size == devices
    else:
        with pytest.raises(ConfigError, match=said):
            machine.resolve_machine(hardware, "fast", profile="cpu")


def enter_as_rank_one(folder, entered):
    with RunLock(folder):
        entered.append(time.monotonic())


def test_other_ranks_wait_for_rank_zeros_word_of_this_launch(environment, tmp_path):
    folder = RunFolder(tmp_path / "a")
    path = tmp_path / ".locks" / "a"
    environment(RANK="1", TORCHELASTIC_RUN_ID="now", MASTER_PORT="1")
    entered = []
    with locked(path) as handle:
        handle.write("now - 1 - - -")  # written by an earlier launch that was killed: rank 0 cuts it when it begins
        handle.truncate(0)
        waiting = threading.Thread(target=enter_as_rank_one, args=(folder, entered), daemon=True)
        waiting.start()
        time.sleep(0.6)
        assert not entered
        path.write_text(ranks.launch_token())
        waiting.join(timeout=5)
        assert entered


def test_other_ranks_give_up_when_rank_zero_ends_before_its_word(environment, tmp_path):
    folder = RunFolder(tmp_path / "a")
    environment(RANK="1", TORCHELASTIC_RUN_ID="now")
    with locked(tmp_path / ".locks" / "a") as lock:
        lock.write(f"{ranks.launch_token()} begun")
        lock.flush()
        failed = []

        def enter():
            try:
                enter_as_rank_one(folder, [])
            except ConfigError as error:
                failed.append(str(error))

        waiting = threading.Thread(target=enter, daemon=True)
        waiting.start()
        time.sleep(0.6)
    waiting.join(timeout=5)
    assert failed and "rank 0 ended" in failed[0]


def test_lightning_still_has_the_signal_handling_that_is_replaced():
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert callable(_SignalConnector.register_signal_handlers)
