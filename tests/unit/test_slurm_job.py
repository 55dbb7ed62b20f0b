"""What is asked of Slurm when a run leaves, and what `submit` accepts. On a real one: tests/runs/test_slurm*.py."""

import contextlib
import signal
from pathlib import Path

import pytest

from qwlit.__main__ import _report
from qwlit.cluster.script import ASK_FOR_REQUEUE, NAME_JOB, SlurmJob, check_slurm, render
from qwlit.config.compose import compose
from qwlit.core import signals
from qwlit.core.errors import ConfigError, Preempted
from qwlit.core.files import locked
from qwlit.core.ranks import launch_token
from qwlit.core.signals import answering_signals
from qwlit.core.slurm import job_id, time_limit_seconds
from qwlit.training.resilience.requeue_limit import count_requeue
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.training.tracking.run_lock import RunLock

NAMES = ("SLURM_PROCID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "RANK", "LOCAL_RANK", "NODE_RANK")


@pytest.fixture(autouse=True)
def job(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("12:00:00", 43_200),
        ("1-6", 108_000),
        ("1-6:30", 109_800),
        ("2-0:0:5", 172_805),
        ("UNLIMITED", None),
        ("infinite", None),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text, seconds):
    assert time_limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1:", "1:2:3:4", "1-", "-1", "1-2-3", "1h"])
def test_what_is_no_time_limit_is_refused(text):
    with pytest.raises(ValueError, match="as Slurm writes it"):
        time_limit_seconds(text)
    with pytest.raises(ConfigError, match=r"slurm\.time"):
        compose([f"slurm.time='{text}'"])


@pytest.mark.parametrize(
    ("told", "state", "preempted", "requeues", "says"),
    [
        (True, "RUNNING", "None", True, "the job is requeued"),
        (True, "SIGNALING", "None", True, "the job is requeued"),
        (True, "COMPLETING", "None", False, "not requeued: Slurm reports the job as COMPLETING"),
        (True, "COMPLETING Reason=TimeLimit", "None", True, "the job is requeued"),
        (None, "COMPLETING Reason=TimeLimit", "None", True, "the job is requeued"),
        (None, "RUNNING", "None", False, ""),
        (None, "RUNNING", "2026-11-22T12:00:00", True, "the job is requeued"),
        (None, "COMPLETING", "2026-11-22T12:00:00", False, ""),
        (False, "RUNNING", "2026-11-22T12:00:00", False, ""),
    ],
)
def test_a_job_is_requeued_when_slurm_wants_its_place_and_not_when_somebody_cancelled_it(
    told, state, preempted, requeues, says, tmp_path, monkeypatch, capsys
):
    (tmp_path / "asked").touch()
    fake = tmp_path / "scontrol"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n'
        f'if [ "$1" = show ]; then echo "JobId=7 JobState={state} PreemptTime={preempted}"; fi\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert _report("train", Preempted("saved", requeue=told)) == 75
    assert ("requeue 7" in (tmp_path / "asked").read_text()) is requeues
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("told", [True, None, False])
def test_without_slurms_commands_the_batch_script_is_left_to_ask(told, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _report("train", Preempted("saved", requeue=told)) == 75
    assert ("not requeued: there is no scontrol here" in capsys.readouterr().err) is (told is True)
    monkeypatch.setenv("QWLIT_REQUEUE_FILE", str(tmp_path / "wish"))
    assert _report("train", Preempted("saved", requeue=told)) == 75
    assert (tmp_path / "wish").exists() is (told is True)


def test_a_task_of_an_array_is_called_by_both_numbers(monkeypatch):
    assert job_id() == "7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert job_id() == "5_2"
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert job_id() is None


def test_requeues_without_progress_are_counted_for_each_job_by_itself(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "a")
    for step in (0, 0, 5, 5):
        count_requeue(folder, step, 2)
    with pytest.raises(Exception, match="requeued 2 times at step 5"):
        count_requeue(folder, 5, 2)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    count_requeue(folder, 5, 2)


def test_a_run_is_the_jobs_own_only_if_an_earlier_life_of_it_began_it(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_summary(status="done", job="7")
    assert not folder.belongs_to_this_job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert folder.belongs_to_this_job
    folder.write_summary(job="6")
    assert not folder.belongs_to_this_job


def test_of_several_signals_the_one_that_asks_for_the_requeue_counts():
    assert signals.most_urgent([]) == 0
    assert signals.most_urgent([0, signal.SIGINT]) == signal.SIGINT
    assert signals.most_urgent([signal.SIGTERM, signal.SIGINT]) == signal.SIGTERM
    assert signals.most_urgent([0, signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM]) == signal.SIGUSR2


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR2])
def test_another_rank_leaves_when_told_twice_while_starting(first, monkeypatch):
    """By Slurm as all are, and by srun when rank 0 has left."""
    for name, value in {"STEP_ID": "0", "NTASKS": "2", "PROCID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    reached = []
    with pytest.raises(SystemExit, match="75"), answering_signals():
        signal.raise_signal(first)
        reached.append(1)
        signal.raise_signal(signal.SIGTERM)
        reached.append(2)
    assert reached == [1]
    # One that came before anything could be answered is the launcher's, or Slurm's that rank 0 has got as well.
    signals.received_signals.append(signal.SIGTERM)
    with pytest.raises(SystemExit, match="75"), answering_signals():
        reached.append(3)
    assert reached == [1]
    assert signals.received_signals == []


def test_what_follows_on_the_way_out_does_not_change_how_it_ends():
    ends = []
    with pytest.raises(Preempted) as caught, answering_signals():
        try:
            signal.raise_signal(signal.SIGUSR2)
        finally:
            signal.raise_signal(signal.SIGTERM)
            ends.append(1)
    assert caught.value.requeue is True
    assert ends == [1]


def test_a_rank_waits_for_rank_zero_while_this_jobs_last_life_still_holds_the_lock(tmp_path, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    folder, waited = RunFolder(tmp_path / "a"), []

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 1:
            held.close()  # the last life's
        if len(waited) == 2:
            held.enter_context(locked(folder.lock_file))
            folder.lock_file.write_text(launch_token())

    with contextlib.ExitStack() as held:
        held.enter_context(locked(folder.lock_file))
        monkeypatch.setattr("time.sleep", wait)
        with RunLock(folder):
            assert len(waited) == 2


@pytest.mark.parametrize("file", ["train", "train_gpu", "train_nodes"])
def test_files_to_be_edited_ask_for_the_requeue_as_submitted_ones_do(file):
    text = (Path(__file__).parents[2] / "slurm" / f"{file}.sbatch").read_text()
    assert text.endswith(f"\n{ASK_FOR_REQUEUE}")
    assert f"\n{NAME_JOB}\n" in text


def test_a_container_sees_the_working_folder_and_what_else_is_named():
    words = ["hardware=a100", "slurm.container=/images/a b.sqsh", "slurm.mounts=[/data:/data]"]
    text = render(compose(words).config, SlurmJob("n", "t", ["train"]), python="x", folder=Path("/home/me"))
    assert (
        " --container-image='/images/a b.sqsh' --container-mounts=/home/me:/home/me,/data:/data"
        " --container-workdir=/home/me python -m qwlit train"
    ) in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["slurm.options=[--nodes=2]"], "hardware.num_nodes"),
        (["slurm.options=[-N2]"], "hardware.num_nodes"),
        (["slurm.options=['-t 5']"], "slurm.time"),
        (["slurm.options=[-J,name]"], "run.name"),
        (["slurm.options=[--array=1-3]"], "seeds"),
        (["slurm.options=[--no-requeue]"], "cannot be changed"),
        (["slurm.options=[--gres=shm:1,x:2]"], "quote a value with a comma"),
        (["slurm.options=[--gres=gpu:1]"], "hardware.devices"),
        (["slurm.options=[--mem-per-cpu=1G]"], "hardware.host_memory_gb"),
        (["slurm.options=[mem=5]"], "write --name=value"),
        (["slurm.time=2", "slurm.signal_seconds=120"], "not less than slurm.time=2"),
    ],
)
def test_options_that_would_break_the_job_are_refused(words, says):
    with pytest.raises(ConfigError, match=says):
        check_slurm(compose(words).config.slurm)


def test_further_options_are_taken_as_they_are_written():
    slurm = compose(["slurm.options=[--mem=5G, --exclusive,--time-min=5,'--comment=a, b']"]).config.slurm
    assert slurm.options == ("--mem=5G", "--exclusive", "--time-min=5", "--comment=a, b")
    check_slurm(slurm)


def test_texts_that_look_like_numbers_stay_as_they_are_typed(tmp_path):
    slurm = compose(["slurm.time=30", "slurm.account=00123", "slurm.partition=2024_01"]).config.slurm
    assert (slurm.time, slurm.account, slurm.partition) == ("30", "00123", "2024_01")
    # YAML takes a clock time for a number to the base of sixty: twelve hours would become thirty days.
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "mine.yaml").write_text("defaults: [default]\ntime: 12:00:00\n")
    with pytest.raises(ConfigError, match=r"slurm\.time=43200: write it in quotes"):
        compose(["slurm=mine", f"hydra.searchpath=[file://{tmp_path}]"])


@pytest.mark.parametrize(
    "line",
    [
        *("export WANDB_API_KEY=ab", "export WANDB_API_KEY='a b'", "git clone https://me:ab@host/x"),
        *("wandb login --relogin ab@x", "hf auth login --token ab@x && true"),
    ],
)
def test_a_secret_that_config_yaml_and_the_jobs_file_would_keep_is_refused(line):
    with pytest.raises(ConfigError, match=r"slurm\.setup: .*\*\*\*.* only you can read") as refused:
        compose([f'slurm.setup=["{line}"]'])
    assert "ab@" not in str(refused.value) and "KEY=a" not in str(refused.value)
    compose(
        ["slurm.setup=['export HF_TOKEN=$MINE','source ~/secrets','wandb login; true','hf auth login --token $MINE']"]
    )
