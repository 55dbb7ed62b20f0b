"""Jobs on a real Slurm (tests/slurm_cluster.py) that are preempted and requeued: in the end one continuous run.

QWLIT_LONG=1 adds what takes long: fifty preemptions instead of four, and real time limits.
"""

import os
import random
import signal
import time

import pytest

from tests.long import LONG
from tests.runs.runs import assert_same_run, losses, qwlit, qwlit_process, rows, steps_logged, summary
from tests.runs.slurm_jobs import WORDS, finished, said, submit, tasks
from tests.slurm_cluster import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
PREEMPTIONS = 50 if LONG else 4


def test_a_run_preempted_at_random_moments_is_the_uninterrupted_run(cluster, place):
    steps = 60 * PREEMPTIONS
    words = [*WORDS, f"train.max_steps={steps}", "validation.every_steps=50", "hardware.devices=2"]
    # In CI a start takes most of the time, and a signal in it costs a start: many of them in a row are no fault.
    job = submit(cluster, [*words, "run.name=job", "slurm.time=60", "slurm.max_requeues_in_place=50"], place)
    run = place / "runs" / "job"
    dice = random.Random(1)
    sent = {"count": 0, "restarts": -1, "at": 0.0}

    def preempt(state):
        """Once in each life of the job: at once, while it starts, or some steps on; all ranks, or one of them."""
        life = int(state["Restarts"])
        if sent["count"] == PREEMPTIONS or state["JobState"] != "RUNNING" or life != sent["count"]:
            return
        if life != sent["restarts"]:
            sent["restarts"] = life
            # Two of three while it trains, wherever it then is; the others while it starts.
            sent["steps"] = dice.randrange(1, 40) if dice.random() < 0.67 else None
            sent["at"] = time.monotonic() + dice.uniform(0.3, 6.0)
            sent["from"] = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
        trained = (len(losses(run)) if (run / "metrics.jsonl").exists() else 0) - sent["from"]
        if trained < sent["steps"] if sent["steps"] else time.monotonic() < sent["at"]:
            return
        ranks = tasks(place)
        if not ranks:  # Slurm signals steps, and there is none yet
            return
        if sent["steps"] and sent["count"] % 3 == 0 and len(ranks) == 2:
            os.kill(ranks[dice.randrange(2)], signal.SIGUSR2)
        else:
            cluster.ask("scancel", "--signal=USR2", str(job), check=False)
        sent["count"] += 1

    state = finished(cluster, job, seconds=60 + 45 * PREEMPTIONS, meanwhile=preempt)
    assert state["JobState"] == "COMPLETED", said(place)[-3000:]
    assert int(state["Restarts"]) == PREEMPTIONS == sent["count"]
    assert [step for step, _ in losses(run)] == list(range(1, steps + 1))
    # Saved at the boundary where it was told: no step was made twice.
    events = rows(run, "events.jsonl")
    left = [event["step"] for event in events if event["event"] == "preempted"]
    assert len(left) >= PREEMPTIONS // 2
    assert [event["step"] for event in events if event["event"] == "resumed"][-1] == left[-1]
    reference = qwlit_process(["train", *words, "run.name=whole"], place)
    assert reference.returncode == 0, reference.stderr
    assert_same_run(run, place / "runs" / "whole")


def test_a_job_that_makes_room_within_its_grace_is_requeued(cluster, place):
    """Slurm requeues by itself only those that are still there when the grace is over."""
    words = [*WORDS, "train.max_steps=600", "hardware.devices=1", "run.name=grace", "slurm.time=10"]
    job = submit(cluster, words, place)
    run = place / "runs" / "grace"
    urgent = []

    def displace(state):
        if not urgent and steps_logged(run) > 5:
            asked = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 2"]
            urgent.append(cluster.ask(*asked, "--output=/dev/null"))

    state = finished(cluster, job, meanwhile=displace)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), said(place)[-2000:]
    assert "the job is requeued" in said(place)
    left = [event["step"] for event in rows(run, "events.jsonl") if event["event"] == "preempted"]
    assert [event["step"] for event in rows(run, "events.jsonl") if event["event"] == "resumed"] == left
    assert [step for step, _ in losses(run)] == list(range(1, 601))


def test_a_requeued_job_goes_on_with_its_own_run_alone_and_not_with_an_older_one(cluster, place):
    """Told to overwrite, it does so once: in its second life if it never came to that in the first, in no later one."""
    words = [*WORDS, "hardware.devices=1", "run.name=again"]
    assert qwlit(["train", *words, "train.max_steps=3"], place).returncode == 0
    run = place / "runs" / "again"
    longer = [*words, "train.max_steps=300", "run.overwrite=true", "slurm.time=10", "slurm.signal_seconds=20"]
    job = submit(cluster, longer, place)
    told = []

    def tell(state):
        lives = int(state["Restarts"])
        moment = len(tasks(place)) == 1 if lives == 0 else steps_logged(run) > 20
        if lives == len(told) < 2 and state["JobState"] == "RUNNING" and moment:
            told.append(lives)
            cluster.ask("scancel", "--signal=USR2", str(job), check=False)

    state = finished(cluster, job, meanwhile=tell)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), said(place)[-2000:]
    assert [step for step, _ in losses(run)] == list(range(1, 301))
    assert len([event for event in rows(run, "events.jsonl") if event["event"] == "resumed"]) == 1


def test_where_slurms_commands_are_missing_the_batch_script_asks_for_the_requeue(cluster, place):
    """As in a container."""
    hidden = 'srun() { first="$1 $2 $3"; shift 3; command srun $first env PATH=/nowhere "$@"; }'
    words = [*WORDS, "train.max_steps=300", "hardware.devices=2", "run.name=box", f"slurm.setup=['{hidden}']"]
    job = submit(cluster, words, place)
    run = place / "runs" / "box"
    told = []

    def tell(state):
        """While the two start, and some steps on."""
        lives = int(state["Restarts"])
        if lives == len(told) < 2 and (steps_logged(run) > 20 if lives else len(tasks(place)) == 2):
            told.append(lives)
            cluster.ask("scancel", "--signal=USR2", str(job), check=False)

    state = finished(cluster, job, meanwhile=tell)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), said(place)[-2000:]
    assert [step for step, _ in losses(run)] == list(range(1, 301))


def test_a_job_that_makes_room_before_python_listens_is_requeued(cluster, place):
    """As when an image is being imported."""
    late = 'srun() { if [ "$SLURM_RESTART_COUNT" ]; then command srun "$@"; else command srun sleep 60; fi; }'
    words = [*WORDS, "train.max_steps=3", "hardware.devices=1", "run.name=late", f"slurm.setup=['{late}']"]
    job = submit(cluster, words, place)
    urgent = []

    def displace(state):
        if not urgent and state["JobState"] == "RUNNING":
            time.sleep(1)
            asked = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1"]
            urgent.append(cluster.ask(*asked, "--output=/dev/null"))

    state = finished(cluster, job, meanwhile=displace)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), said(place)[-2000:]


def test_a_cancelled_job_is_saved_and_not_requeued(cluster, place):
    job = submit(cluster, [*WORDS, "train.max_steps=4000", "hardware.devices=2", "run.name=c", "slurm.time=9"], place)
    run = place / "runs" / "c"

    def cancel(state):
        if (run / "metrics.jsonl").exists() and len(losses(run)) > 5:
            cluster.ask("scancel", str(job))

    state = finished(cluster, job, meanwhile=cancel)
    assert state["JobState"] == "CANCELLED"
    assert state["Restarts"] == "0"
    deadline = time.monotonic() + 20
    while summary(run)["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert summary(run)["status"] == "preempted"
    assert (run / "checkpoints" / "last").exists()


def test_a_job_that_only_starts_and_stops_is_left_in_the_end(cluster, place):
    words = [*WORDS, "train.max_steps=50", "hardware.devices=1", "run.name=loop", "slurm.max_requeues_in_place=1"]
    job = submit(cluster, words, place, warm=False)
    seen = set()

    def tell(state):
        if state["JobState"] == "RUNNING" and state["Restarts"] not in seen and tasks(place):
            time.sleep(1.5)
            seen.add(state["Restarts"])
            cluster.ask("scancel", "--signal=USR2", str(job), check=False)

    state = finished(cluster, job, meanwhile=tell)
    assert state["JobState"] == "FAILED", said(place)[-2000:]
    assert state["Restarts"] == "1"
    assert "requeued 1 times at step 0 without a new step" in said(place)


@pytest.mark.skipif(not LONG, reason="takes minutes; QWLIT_LONG=1")
def test_a_run_longer_than_its_time_limit_is_requeued_until_it_is_done(cluster, place):
    words = [*WORDS, "train.max_steps=20000", "checkpoint.every_steps=100000", "logging.every_steps=100"]
    job = submit(
        cluster, [*words, "hardware.devices=2", "run.name=limit", "slurm.time=1", "slurm.signal_seconds=30"], place
    )
    state = finished(cluster, job, seconds=1500)
    assert state["JobState"] == "COMPLETED", said(place)[-3000:]
    assert int(state["Restarts"]) >= 2
    steps = [step for step, _ in losses(place / "runs" / "limit")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20000
