"""Shells, launchers and clusters as people find them: the run starts, or one line names the variable and the remedy."""

import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from lightning.pytorch.plugins.environments import LightningEnvironment
from rich.progress import MofNCompleteColumn

import qwlit
from qwlit import __main__ as program
from qwlit.core import console, ranks, signals, streams
from qwlit.core.batch import MicroBatch, StepBatch
from qwlit.core.children import start_child
from qwlit.core.devices import Devices
from qwlit.core.disk import explaining_disk_errors
from qwlit.core.errors import ConfigError, Preempted, QwlitError, SignalExit, printable
from qwlit.core.files import locked
from qwlit.core.slurm import job_id, was_requeued
from qwlit.core.waiting import call_with_timeout
from qwlit.run import fit, training_run
from qwlit.run.finish import print_summary
from qwlit.run.resume import ResumePoint
from qwlit.training import machine, rank_launcher, strategies
from qwlit.training.config import HardwareConfig, LoggerConfig
from qwlit.training.tracking import run_lock
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.training.tracking.run_lock import BEGUN, ENDED, RunLock
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
        (TORCHRUN | {"RANK": "2"}, (2, 1), ["RANK=2 does not fit hardware.devices=2 x", "unset TORCHELASTIC_RUN_ID"]),
        (TORCHRUN | {"LOCAL_RANK": "2"}, (2, 1), ["LOCAL_RANK=2 does not fit", "unset TORCHELASTIC_RUN_ID"]),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2"}, (2, 1), ["RANK is not set", "unset TORCHELASTIC_RUN_ID"]),
        (TORCHRUN | ADDRESS | {"MASTER_PORT": "x"}, (2, 1), ["MASTER_PORT='x' is not a whole number"]),
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
        (STEP | {"SLURM_NTASKS": "2", "SLURM_PROCID": "2"}, (2, 1), ["SLURM_PROCID=2 does not fit", OVERLAP]),
        (STEP | {"SLURM_NTASKS": "2", "SLURM_LOCALID": "2"}, (2, 1), ["SLURM_LOCALID=2 does not fit", OVERLAP]),
        (
            STEP | {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"},
            (2, 1),
            ["4 processes were", "SLURM_NTASKS=4", OVERLAP],
        ),
        (JOB, (2, 2), ["only one process was started", "`srun --nodes=2 --ntasks-per-node=2 python -m qwlit train …`"]),
        (JOB | {"SLURM_NTASKS": ""}, (1, 1), ["SLURM_NTASKS='' is not a whole number; run: unset SLURM_NTASKS"]),
        (JOB | {"SLURM_NTASKS": "0"}, (1, 1), ["SLURM_NTASKS=0 is no number of tasks; run: unset SLURM_NTASKS"]),
        (JOB | {"SLURM_NTASKS": "-1"}, (1, 1), ["SLURM_NTASKS='-1' is not a whole number; run: unset SLURM_NTASKS"]),
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


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt(), SignalExit(Preempted("a signal"))])
def test_whatever_ends_a_call_in_a_thread_reaches_the_caller(end):
    def call():
        raise end

    with pytest.raises(type(end)) as caught:
        call_with_timeout(5.0, call)
    assert caught.value is end


RANK_ONE = {"RANK": "1", "LOCAL_RANK": "1"}
SRUN_RANK = STEP | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("rank", "signum", "end"),
    [
        ({}, signal.SIGTERM, Preempted),
        ({"NODE_RANK": "1"}, signal.SIGTERM, SystemExit),
        (BY_HAND | RANK_ONE, signal.SIGTERM, SystemExit),
        (TORCHRUN | RANK_ONE, signal.SIGTERM, SystemExit),
        (TORCHRUN | RANK_ONE, signal.SIGHUP, SystemExit),
        (TORCHRUN | RANK_ONE, signal.SIGINT, KeyboardInterrupt),
    ],
)
def test_a_process_that_waits_says_so_and_answers_its_first_signal(rank, signum, end, monkeypatch):
    """Also a rank that the user has started by hand, which no launcher ends, and one that torchrun ends."""
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    said = []

    def notice():
        said.append(True)
        os.kill(os.getpid(), signum)

    waits = subprocess.Popen(["sleep", "20"])
    try:
        with (
            signals.handling(signals.EXIT_SIGNALS, signal.SIG_DFL),
            pytest.raises(end),
            signals.answering_signals(),
        ):
            call_with_timeout(20.0, waits.wait, notice_after=0.05, notice=notice)
        assert said and waits.poll() is None
    finally:
        waits.kill()
        waits.wait()


@pytest.mark.parametrize(("rank", "records"), [(TORCHRUN, True), (TORCHRUN | RANK_ONE, False)])
def test_of_torchruns_ranks_only_rank_0_lives_on_after_a_signal_in_the_imports(rank, records, monkeypatch):
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    with signals.handling(signals.EXIT_SIGNALS, signal.SIG_DFL):
        signals.record_signals()
        assert [signal.getsignal(s) != signal.SIG_DFL for s in signals.EXIT_SIGNALS] == [records] * 3


DIE = "os.kill(os.getpid(), signal.SIGKILL)"
# Were the first signal not ignored, it would be the one that ends the rank.
TELL = "rank.terminate(); rank.kill(); sys.exit(rank.wait() != -signal.SIGKILL)"


@pytest.mark.parametrize(
    ("rank", "then", "code"),
    [
        (TORCHRUN | RANK_ONE, DIE, -signal.SIGKILL),
        ({"LOCAL_RANK": "1"}, DIE, -signal.SIGKILL),
        ({"LOCAL_RANK": "1"}, TELL, 0),
    ],
    ids=["torchrun", "rank 0", "a signal"],
)
def test_a_rank_that_imports_is_killed_with_its_launcher_and_leaves_signals_to_rank_0(rank, then, code, tmp_path):
    (tmp_path / "omegaconf.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    launcher = (
        "import os, signal, subprocess, sys\n"
        f"variables = os.environ | {rank!r} | {{{ranks.READY_VARIABLE!r}: f'{{os.getpid()}} a'}}\n"
        "rank = subprocess.Popen([sys.executable, '-m', 'qwlit', 'train'], env=variables, stdout=subprocess.PIPE)\n"
        f"assert rank.stdout.readline() == b'importing\\n'\n{then}\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(qwlit.__file__).parents[1]}"}
    # The rank holds the pipe of standard error: `run` returns when both have ended.
    done = subprocess.run(
        [sys.executable, "-c", launcher], env=environment, stderr=subprocess.PIPE, timeout=30, check=False
    )
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("raised", [SignalExit(Preempted("a signal")), KeyboardInterrupt(), RuntimeError("a fault")])
def test_no_rank_that_rank_0_has_started_outlives_the_training(raised, monkeypatch):
    def end(*arguments, **options):
        raise raised

    monkeypatch.setattr(fit, "mark_process_group_joined", lambda: None)
    launcher = rank_launcher.RankLauncher(LightningEnvironment(), 2, 1)
    launcher.children = [subprocess.Popen(["sleep", "20"])]
    two_ranks = SimpleNamespace(world_size=2, fit=end, strategy=SimpleNamespace(launcher=launcher))
    with pytest.raises(type(raised)):
        fit._run(SimpleNamespace(trainer=two_ranks), None, None, ResumePoint(None))
    assert launcher.children[0].wait(timeout=10) == -signal.SIGKILL


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_trial_asks_for_a_signal_that_it_answers_when_its_agent_is_killed(handler, monkeypatch):
    class Asked(Exception):
        pass

    def ask(*, signum):
        raise Asked(signum)

    for name, value in AGENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(training_run, "die_with_parent", ask)
    with signals.handling([signal.SIGINT], handler), pytest.raises(Asked) as asked:
        training_run.train(None)
    assert asked.value.args == (signal.SIGUSR2 if handler == signal.SIG_IGN else signal.SIGINT,)


@pytest.fixture
def no_threads_left():
    """A thread of torch that outlives the tests could abort the process at its end."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive(), thread


class OneOfTwo(strategies._Replicated):
    """Rank 0 of two, the other of which never comes."""

    root_device = torch.device("cpu")

    def __init__(self, seconds):
        super().__init__(cluster_environment=LightningEnvironment(), process_group_backend="gloo")
        # The second: until torch gives up, in a thread that the first does not end.
        self.meeting_seconds, self._timeout = seconds, timedelta(seconds=0.6)

    num_processes = 2


@pytest.mark.parametrize(
    ("taken", "seconds", "said"),
    [
        (True, 20.0, r"cannot meet at 127\.0\.0\.1:\d+ .*the port is taken; set another MASTER_PORT"),
        (False, 0.3, r"not all 2 ranks met .* within 0\.3 s \(hardware\.timeout_seconds\); .* unset LOCAL_RANK"),
    ],
)
@pytest.mark.usefixtures("no_threads_left")
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
        with pytest.raises(ConfigError, match=said):
            OneOfTwo(seconds).setup_environment()


@pytest.mark.parametrize("address", ["nosuch.invalid", "x" * 64])
@pytest.mark.usefixtures("no_threads_left")
def test_an_address_that_cannot_be_looked_up_is_named_at_once(address, monkeypatch):
    monkeypatch.setattr(strategies, "LOOK_UP_SECONDS", 0.1)
    for name, value in (BY_HAND | {"LOCAL_RANK": "0", "MASTER_ADDR": address}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"MASTER_ADDR={address}: .* cannot look up .*; set MASTER_ADDR"):
        OneOfTwo(20.0).setup_environment()


def test_an_address_may_be_known_only_after_some_time(monkeypatch):
    answers = iter([socket.gaierror(socket.EAI_AGAIN, "later"), socket.gaierror(socket.EAI_NONAME, "who?"), None])

    def look_up(*arguments):
        if answer := next(answers):
            raise answer

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    strategies._look_up("node1")
    assert next(answers, "all") == "all"


@pytest.mark.usefixtures("no_threads_left")
def test_a_rank_of_qwlits_own_launcher_is_not_told_to_unset_variables(monkeypatch):
    for name, value in (BY_HAND | {"LOCAL_RANK": "0", "MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    strategy = OneOfTwo(0.3)
    strategy._launcher = rank_launcher.RankLauncher(LightningEnvironment(), 2, 1)
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
    hint = "if nothing else starts the other ranks, run: unset NODE_RANK"
    assert capsys.readouterr().err == f"qwlit: node_rank 1 waits for rank 0 of the run {tmp_path / 'a'}; {hint}\n"


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        ({}, r"in use by another process \({me}\); wait for it, or set another run\.name$"),
        ({"NODE_RANK": "0"}, r"in use by another process \({me}\); .* their own RANK, or NODE_RANK and LOCAL_RANK$"),
        ({"NODE_RANK": "1"}, r"did not come to .*, in use by another process \({me}\) of another launch within 0 s"),
    ],
)
def test_who_holds_the_lock_of_a_run_is_named(rank, said, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    folder = RunFolder(tmp_path / "a")
    with RunLock(folder):
        for name, value in rank.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", "1")
        named = said.format(me=f"{os.getpid()} on {socket.gethostname()}")
        with pytest.raises(ConfigError, match=named), RunLock(folder, 0):
            pass


def test_who_is_waited_for_is_named(tmp_path):
    """As for another process that is tokenizing the same data."""
    path, holders = tmp_path / "lock", []
    hold = (
        "import sys, pathlib; from qwlit.core.files import locked\n"
        f"with locked(pathlib.Path({str(path)!r})): print(flush=True), sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", hold]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holding:
        holding.stdout.readline()

        def waiting(holder):
            holders.append(holder)
            holding.stdin.close()

        with locked(path, waiting=waiting):
            pass
    assert holders == [f"another process ({holding.pid} on {socket.gethostname()})"]


@pytest.mark.parametrize("state", ["", ENDED, BEGUN])
def test_what_an_earlier_launch_with_the_same_token_left_behind_is_no_end_and_no_start(state, tmp_path, monkeypatch):
    """torchrun's default settings are the same in every launch."""
    for name, value in (TORCHRUN | RANK_ONE | ADDRESS).items():
        monkeypatch.setenv(name, value)
    folder = RunFolder(tmp_path / "a")
    folder.lock_file.parent.mkdir()
    folder.lock_file.write_text(f"process 1 on n1\n{ranks.launch_token()}{state}")
    lock = RunLock(folder, 0)
    with pytest.raises(ConfigError, match="rank 0 ended before the run started"), lock:
        pass
    # The file is older than this launch.
    monkeypatch.setattr(run_lock, "PROCESS_START", time.time() + 60)
    with pytest.raises(ConfigError, match="did not come"), lock:
        pass


@pytest.mark.parametrize(
    ("rank", "before", "recorded"),
    [
        ({}, signal.SIG_DFL, signals.HANDLED_SIGNALS),
        # nohup, or `&` in a script.
        ({}, signal.SIG_IGN, ()),
        # Rank 0 has started it, and gets what a terminal sends.
        ({"LOCAL_RANK": "1"}, signal.SIG_IGN, (signal.SIGTERM, signal.SIGUSR2)),
    ],
)
def test_an_ignored_signal_stays_ignored_in_the_steps_unless_rank_0_answered_it_before_them(
    rank, before, recorded, monkeypatch
):
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    with signals.handling(signals.HANDLED_SIGNALS, before):
        signals.record_signals()
        with signals.answering_signals(), signals.recording_signals():
            for signum in signals.HANDLED_SIGNALS:
                signal.raise_signal(signum)
            assert signals.received_signals == list(recorded)


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_child_answers_the_ctrl_c_that_its_parent_sends_whatever_the_parent_ignores(handler, tmp_path):
    code = "import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)"
    with signals.handling([signal.SIGINT], handler):
        child = start_child(["-c", code], tmp_path / "log", dict(os.environ), parent_death_signal=signal.SIGTERM)
        assert child.wait(timeout=30) == 0


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


@pytest.mark.parametrize("width", [40, 60, 80])
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
    assert "eta -" not in line and "eta " in line and "loss 1.2345" in line
    assert len(line.removeprefix("\x1b[2K").rstrip()) <= width
    # The elapsed time.
    assert line.count(":") == (4 if width == 80 else 2)


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
    print_summary(SimpleNamespace(results=lambda: later, guard=SimpleNamespace(rollbacks=[])), records, folder)
    shown = capsys.readouterr().out
    assert "0.2500" in shown and "0.75" not in shown
    assert ("best by val/loss" in shown) is (best is not None) and ("val_loss_best" in shown) is (best is not None)
    assert "p\\x1b[2Ja0\n\n" in shown and "not as expected\np\\x1b[2Ja1\nexpected: a0" in shown and "a2" not in shown


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


@pytest.mark.parametrize(
    ("variable", "value"), [("WANDB_MODE", "junk"), ("WANDB_INIT_TIMEOUT", "soon"), ("WANDB_BASE_URL", "junk")]
)
def test_a_variable_that_wandb_does_not_take_is_named(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=rf"^logger=wandb: {variable}: .*{value}'; set or unset the environment"):
        find_access()


def test_a_removed_current_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    said = r"^the current folder was removed; change to one that exists \(cd\) and run"
    with pytest.raises(ConfigError, match=said), explaining_disk_errors():
        Path.cwd()


def test_python_without_docstrings_is_refused_in_one_line():
    command = [sys.executable, "-OO", "-m", "qwlit", "train", "experiment=demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "qwlit train: transformers needs Python with docstrings; unset PYTHONOPTIMIZE, or leave out -OO\n"
    )
