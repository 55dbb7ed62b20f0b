"""Shells, launchers and clusters as people find them: the run starts, or one line names the variable and the remedy."""

import io
import os
import pickle
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch
import wandb
from lightning.pytorch.plugins.environments import LightningEnvironment
from rich.progress import MofNCompleteColumn

from qwlit import __main__ as program
from qwlit.core import console, ranks, signals, streams
from qwlit.core.batch import MicroBatch, StepBatch
from qwlit.core.devices import Devices
from qwlit.core.errors import ConfigError, Preempted, QwlitError, printable
from qwlit.core.slurm import job_id, was_requeued
from qwlit.core.waiting import call_with_timeout
from qwlit.run.finish import print_summary
from qwlit.training import machine, trainer
from qwlit.training.config import HardwareConfig, LoggerConfig
from qwlit.training.tracking.run_folder import RunFolder, RunLock
from qwlit.training.tracking.wandb_access import Access, find_access
from qwlit.training.tracking.wandb_run import WandbRun
from tests.runs.runs import free_port

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
BY_HAND = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", **ADDRESS}
SALLOC = {**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}
AGENT = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}
SRUN = "`srun --nodes=1 --ntasks-per-node=2 python -m qwlit train …`"
OVERLAP = "`srun --overlap --nodes=1 --ntasks-per-node=2 python -m qwlit train …`"
PTY = OVERLAP.replace("srun", "env -u SLURM_PTY_PORT srun", 1)
ALONE = "`env -u SLURM_NTASKS python -m qwlit train …`"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_", "WANDB_")) or name in ranks.RANK_VARIABLES:
            monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(0, "CPU", False))


@pytest.mark.parametrize(
    ("environment", "shape", "said"),
    [
        # Left behind by another tool, one device.
        ({}, (1, 1), []),
        ({"RANK": "1"}, (1, 1), ["RANK=1", "unset RANK;"]),
        ({"LOCAL_RANK": "3"}, (1, 1), ["LOCAL_RANK=3", "unset LOCAL_RANK;"]),
        ({"NODE_RANK": "1"}, (1, 1), ["NODE_RANK=1", "unset NODE_RANK;"]),
        ({"GROUP_RANK": "1"}, (1, 1), ["GROUP_RANK=1", "unset GROUP_RANK;"]),
        ({"WORLD_SIZE": "4", "RANK": "0"}, (1, 1), ["WORLD_SIZE=4", "unset RANK WORLD_SIZE;"]),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | ADDRESS, (1, 1), []),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "x"}, (1, 1), []),
        # Two devices.
        ({}, (2, 1), []),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, (2, 1), []),
        ({"NODE_RANK": "0", "WORLD_SIZE": "2"}, (2, 1), []),
        ({"RANK": "0"}, (2, 1), ["RANK=0 names a rank of 2, but LOCAL_RANK is not set", "unset RANK;"]),
        ({"LOCAL_RANK": "0"}, (2, 1), ["LOCAL_RANK=0 names a rank of 2", "unset LOCAL_RANK;"]),
        ({"WORLD_SIZE": "4"}, (2, 1), ["WORLD_SIZE=4", "unset WORLD_SIZE;"]),
        (BY_HAND, (2, 1), []),
        (BY_HAND | {"RANK": "1"}, (2, 1), []),
        (BY_HAND | {"RANK": "0"}, (2, 1), ["RANK=0 does not fit", "unset RANK LOCAL_RANK WORLD_SIZE;"]),
        (BY_HAND | {"MASTER_PORT": "x"}, (2, 1), ["MASTER_PORT='x' is not a whole number"]),
        (BY_HAND | {"MASTER_PORT": "99999"}, (2, 1), ["MASTER_PORT=99999 is no port; it must be below 65,536"]),
        # Two nodes.
        ({}, (1, 2), ["start every rank with torchrun or srun, or set NODE_RANK, MASTER_ADDR, MASTER_PORT on"]),
        ({"NODE_RANK": "1"}, (1, 2), ["NODE_RANK=1 names a rank of 2, but MASTER_ADDR is not set"]),
        ({"NODE_RANK": "1"} | ADDRESS, (1, 2), []),
        ({"NODE_RANK": "2"} | ADDRESS, (1, 2), ["NODE_RANK=2", "unset NODE_RANK;"]),
        # torchrun.
        (TORCHRUN | ADDRESS, (2, 1), []),
        (TORCHRUN | ADDRESS, (1, 1), ["2 processes were launched", "unset TORCHELASTIC_RUN_ID WORLD_SIZE"]),
        ({"TORCHELASTIC_RUN_ID": "a"}, (1, 1), ["WORLD_SIZE is not set", "unset TORCHELASTIC_RUN_ID"]),
        (TORCHRUN | {"WORLD_SIZE": ""}, (2, 1), ["WORLD_SIZE='' is not a whole number; run: unset WORLD_SIZE"]),
        # Slurm: batch script, salloc, srun --pty, Jupyter, steps of one and of several tasks.
        (JOB, (2, 1), []),
        (JOB | {"SLURM_NTASKS": "1"}, (2, 1), []),
        (JOB | {"SLURM_NTASKS": "2"}, (2, 1), ["2 tasks (SLURM_NTASKS)", SRUN, ALONE]),
        (SALLOC | {"SLURM_NTASKS": "2"}, (2, 1), ["2 tasks (SLURM_NTASKS)", OVERLAP, ALONE]),
        (STEP | {"SLURM_NTASKS": "2", "SLURM_PTY_PORT": "5"}, (2, 1), ["2 tasks (SLURM_NTASKS)", PTY, ALONE]),
        (STEP | {"SLURM_NTASKS": "1", "SLURM_PTY_PORT": "5"}, (2, 1), []),
        (STEP | {"SLURM_NTASKS": "1"}, (2, 1), []),
        (STEP | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, (2, 1), []),
        (STEP | {"SLURM_NTASKS": "2"}, (2, 1), ["--ntasks=2 does not say", OVERLAP]),
        (
            STEP | {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"},
            (2, 1),
            ["4 processes were", "SLURM_NTASKS=4", OVERLAP],
        ),
        (JOB, (2, 2), ["only one process was started", "`srun --nodes=2 --ntasks-per-node=2 python -m qwlit train …`"]),
        (JOB | {"SLURM_NTASKS": ""}, (1, 1), ["SLURM_NTASKS='' is not a whole number; run: unset SLURM_NTASKS"]),
        (STEP | {"SLURM_NTASKS": "2", "SLURM_LOCALID": "?"}, (2, 1), ["SLURM_LOCALID='?' is not a whole number"]),
        (JOB | AGENT | {"SLURM_NTASKS": "4"}, (2, 1), []),
        # SLURM_ variables outside a job.
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}, (1, 1), []),
        ({"SLURM_NTASKS": ""}, (1, 1), []),
        ({"SLURM_JOB_ID": "", "SLURM_NTASKS": "4"}, (1, 1), []),
        # Read as numbers when Lightning is imported.
        ({"LOCAL_RANK": ""}, (1, 1), ["LOCAL_RANK='' is not a whole number; run: unset LOCAL_RANK"]),
        ({"RANK": "one"}, (1, 1), ["RANK='one' is not a whole number; run: unset RANK"]),
        ({"SLURM_PROCID": ""}, (1, 1), ["SLURM_PROCID='' is not a whole number; run: unset SLURM_PROCID"]),
    ],
)
def test_a_run_starts_or_one_line_names_the_variable_and_the_command(environment, shape, said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def start():
        ranks.check_rank_numbers()
        hardware = HardwareConfig(accelerator="cpu", devices=shape[0], num_nodes=shape[1])
        return machine.resolve_machine(hardware, "fast", profile="cpu").world_size

    if not said:
        assert start() == shape[0] * shape[1]
        return
    with pytest.raises(ConfigError) as caught:
        start()
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert "\n" not in str(caught.value)


def test_slurms_variables_outside_a_job_are_no_job(monkeypatch):
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert (job_id(), was_requeued(), ranks.is_rank_zero()) == (None, False, True)


def test_commands_without_ranks_show_their_output_whatever_rank_is_left_behind(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(sys, "argv", ["qwlit", "inspect", "nonsense"])
    assert program.main() == 2
    assert capsys.readouterr().err.startswith("qwlit inspect: 'nonsense'")
    assert "RANK" not in os.environ


@pytest.mark.parametrize("rank", [{}, {"NODE_RANK": "1"}])
def test_a_process_that_waits_says_so_and_answers_signals(rank, monkeypatch):
    """Also a rank that the user has started by hand: no launcher ends it."""
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    said = []

    def notice():
        said.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    waits = subprocess.Popen(["sleep", "20"])
    try:
        with pytest.raises(SystemExit if rank else Preempted), signals.answering_signals():
            call_with_timeout(20.0, waits.wait, notice_after=0.05, notice=notice)
        assert said and waits.poll() is None
    finally:
        waits.kill()
        waits.wait()


class OneOfTwo(trainer._Replicated):
    """Rank 0 of two, the other of which never comes."""

    root_device = torch.device("cpu")

    def __init__(self, seconds):
        super().__init__(cluster_environment=LightningEnvironment(), process_group_backend="gloo")
        self.meeting_seconds, self._timeout = seconds, timedelta(seconds=2)

    num_processes = 2


@pytest.mark.parametrize(
    ("taken", "seconds", "said"),
    [
        (True, 20.0, r"cannot meet at 127\.0\.0\.1:\d+ .*the port is taken; set another MASTER_PORT"),
        (False, 0.3, r"not all 2 ranks met .* within 0\.3 s \(hardware\.timeout_seconds\); .* unset LOCAL_RANK"),
    ],
)
def test_ranks_that_cannot_meet_end_in_one_line(taken, seconds, said, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
        if taken:
            listener.listen()
        else:
            listener.close()
        for name, value in (BY_HAND | {"LOCAL_RANK": "0", "MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(QwlitError, match=said):
            OneOfTwo(seconds).setup_environment()


def test_a_rank_of_qwlits_own_launcher_is_not_told_to_unset_variables(monkeypatch):
    for name, value in (BY_HAND | {"LOCAL_RANK": "0", "MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    strategy = OneOfTwo(0.3)
    strategy._launcher = trainer._Launcher(LightningEnvironment(), 2, 1)
    with pytest.raises(QwlitError, match=r"not all 2 ranks met .* within 0\.3 s \(hardware\.timeout_seconds\)$"):
        strategy.setup_environment()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (JOB | {"SLURM_PROCID": "1"}, True),
        (STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, True),
        (STEP | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, False),
        (STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
    ],
)
def test_only_among_several_tasks_slurm_numbers_the_ranks(environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.is_rank_zero() is expected


def test_a_rank_that_waits_for_rank_zero_says_so_and_gives_up(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 1000, 15))
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with (
        pytest.raises(ConfigError, match=r"within 60 s \(hardware\.timeout_seconds\)"),
        RunLock(RunFolder(tmp_path / "a"), 60),
    ):
        pass
    assert capsys.readouterr().err == f"qwlit: node_rank 1 waits for rank 0 of the run {tmp_path / 'a'}\n"


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_hangup_is_recorded_in_the_steps_unless_nohup_ignores_it(before):
    with signals.handling([signal.SIGHUP], before):
        signals.record_signals()
        with signals.answering_signals(), signals.recording_signals():
            signal.raise_signal(signal.SIGHUP)
            assert signals.received_signals == ([signal.SIGHUP] if before == signal.SIG_DFL else [])


def test_control_characters_of_the_users_text_never_reach_the_terminal():
    text = "a\x1b[31mb\x07\x9b2J\x7f\r\tc\nd"
    assert printable(text) == "a\\x1b[31mb\\x07\\x9b2J\\x7f\\x0d\tc\nd"
    assert "\x1b" not in str(ConfigError(f"data.path={text}: no such file"))
    shown = io.StringIO()
    screen = console.Screen(file=shown, force_terminal=True, color_system="truecolor", width=80, highlight=False)
    screen.print("[bold]name[/] \x1b]0;title\x07", "\x9b2J")
    assert "\\x1b]0;title" in shown.getvalue() and "\x9b" not in shown.getvalue()
    # The console's own sequences remain.
    assert shown.getvalue().startswith("\x1b[1mname\x1b[0m")


@pytest.mark.parametrize("width", [60, 80])
def test_the_bar_moves_at_every_step_and_keeps_the_time_left_however_slow_the_steps_are(width):
    shown = io.StringIO()
    screen = console.Screen(file=shown, force_terminal=True, color_system=None, width=width)
    clock = iter(range(0, 100_000, 60))
    with console.progress_bar("step", MofNCompleteColumn(), screen, auto_refresh=False, get_time=clock.__next__) as bar:
        task = bar.add_task("", total=50_000)
        for step in range(1, 4):
            bar.update(task, completed=step, description="loss 1.2345  val 1.2345  tok/s 123,456")
            bar.refresh()
            line = shown.getvalue().split("\r")[-1]
            assert f"{step}/50000" in line.replace(" ", "")
    assert "eta -" not in line and "eta " in line and "loss 1.2" in line


FULL = "import sys; from qwlit.core.console import console; console().print('x'); console().print('y'); print('z')"


def test_a_training_goes_on_where_standard_output_is_full_or_closed(tmp_path):
    start = "from qwlit.core import streams; streams.open_closed_streams(); import os; f = open('left', 'w');"
    code = f"{start} {FULL}; assert f.fileno() > 2; print('end', file=sys.stderr)"
    for redirection in (">/dev/full", ">&-", ">&- <&-"):
        done = subprocess.run(
            f"exec '{sys.executable}' -c \"{code}\" {redirection}",
            shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        *said, end = done.stderr.splitlines()[:2]
        assert end == "end" and len(said) == 1 and "standard output" in said[0], done.stderr
        assert (tmp_path / "left").read_text() == ""


def test_a_command_for_programs_says_that_its_output_is_lost(monkeypatch):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(QwlitError, match="standard output cannot be written: No space left"):
            streams.write_json("x" * 100_000)
        monkeypatch.undo()


def test_wandb_gets_the_part_of_a_long_name_that_its_server_takes(tmp_path, monkeypatch):
    settings = {}
    monkeypatch.setattr(wandb, "init", lambda **given: settings.update(given))
    WandbRun(LoggerConfig(), RunFolder(tmp_path / ("n" * 200)), {})._init(Access("online"), None)
    assert settings["name"] == "n" * 128


@pytest.mark.parametrize("best", [None, 1.5])
def test_the_end_screen_shows_the_numbers_of_summary_json_and_the_best_only_where_there_is_one(best, tmp_path, capsys):
    folder = RunFolder(tmp_path)
    (tmp_path / "export").mkdir()
    folder.write_summary(steps=4, peak_memory_gib=0.25, val_loss_best=best, status="done")
    later = {"steps": 4, "peak_memory_gib": 0.75, "val_loss_best": best}
    records = [{"prompt": "p\x1b[2J", "answer": f"a{n}", "expected": "a0", "exact": n == 0} for n in range(3)]
    console.console.cache_clear()
    print_summary(SimpleNamespace(results=lambda: later), records, folder)
    shown = capsys.readouterr().out
    assert "0.2500" in shown and "0.75" not in shown
    assert ("best by val/loss" in shown) is (best is not None) and ("val_loss_best" in shown) is (best is not None)
    assert "p\\x1b[2Ja0" in shown and "not as expected\np\\x1b[2Ja1" in shown and "a2" not in shown


def test_a_batch_comes_from_a_worker_without_shared_memory(monkeypatch):
    """As a DataLoader sends it, where /dev/shm is full."""
    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, lambda *_: pytest.fail("shared memory"))
    numbers = torch.arange(6).reshape(1, 6)
    none = numbers[0, :0]
    micro = MicroBatch(numbers, numbers, none, none, None, (6,), torch.tensor([6]), (3,))
    sent = StepBatch(0, (micro, micro), 0, 6, 18.0, (3, 4))
    came = pickle.loads(ForkingPickler.dumps(sent))
    assert torch.equal(came.micro_batches[1].input_ids, numbers) and came.micro_batches[0].targets.dtype == torch.int64
    assert came.micro_batches[0].cu_seqlens is None and (came.num_tokens, came.sample_ids) == (6, (3, 4))


def test_a_user_without_a_home_folder_is_told_so_by_the_logger(monkeypatch):
    def setup(settings):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(wandb, "setup", setup)
    with pytest.raises(ConfigError, match=r"logger=wandb: Could not determine home directory\. Set HOME"):
        find_access()
