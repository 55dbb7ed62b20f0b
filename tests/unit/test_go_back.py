"""Going back to the start: nothing is deleted before the decision is on the disk, and the next start follows it."""

from contextlib import suppress
from types import SimpleNamespace

import pytest

from qwlit.core.files import read_json_lines
from qwlit.run.go_back import _record
from qwlit.run.resume import prepare_folder
from qwlit.training.checkpointing.checkpoint import write_checkpoint
from qwlit.training.checkpointing.folder import list_checkpoints
from qwlit.training.checkpointing.manifest import step_of
from qwlit.training.resilience.rollback import RollbackNeeded
from qwlit.training.tracking.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints, none of them stable, and one that an earlier launch found damaged."""
    folder = RunFolder(tmp_path / "runs" / "a")
    for name in ("damaged-step-000020", "step-000010", "step-000020"):
        (folder.checkpoints / name).mkdir(parents=True)
    folder.write_summary(status="running")
    for step in (10, 20):
        folder.append_event(step, "checkpoint")
    return SimpleNamespace(folder=folder, rollbacks=(), config=SimpleNamespace(optim=SimpleNamespace(lr=0.1)))


def needed(*stable, trouble=1):
    facts = {"is_stable": stable.__contains__, "first_unhealthy": trouble, "skipped_steps": 0}
    return RollbackNeeded(25, "it diverges", "divergence", **facts)


def save(folder, step):
    """Write a good checkpoint in place of the empty folder."""
    path = folder.checkpoints / f"step-{step:06d}"
    if path.exists():
        path.rmdir()
    state = {"state_dict": {}, "optimizer_states": [{"state": {}, "param_groups": []}], "optimizer_parameters": []}
    write_checkpoint(state | {"global_step": step}, path)


def test_the_next_start_begins_anew_though_a_checkpoint_of_the_abandoned_path_was_damaged(run):
    assert _record(run, needed()).to_step == 0
    assert prepare_folder(run.folder, resume="auto", overwrite=False).checkpoint is None


def test_a_full_disk_deletes_no_checkpoint(run):
    events = run.folder.path / "events.jsonl"
    events.rename(events.with_name("held"))
    events.symlink_to("/dev/full")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            _record(run, needed())
        assert [path.name for path in list_checkpoints(run.folder)] == ["step-000010", "step-000020"]


def test_a_damaged_checkpoint_that_is_passed_over_is_named(run):
    assert _record(run, needed(10, 20)).to_step == 0
    said = [event["message"] for event in read_json_lines(run.folder.path / "events.jsonl") if "message" in event]
    assert said == [f"step-0000{step} is damaged (MANIFEST.json is missing)" for step in (20, 10)]


@pytest.mark.parametrize(("good", "stable", "target"), [(20, (10,), 20), (10, (20,), 10), (20, (), 0)])
def test_where_the_stable_checkpoint_is_damaged_the_newest_good_one_before_the_trouble_will_do(
    run, good, stable, target
):
    save(run.folder, good)
    assert _record(run, needed(*stable, trouble=21)).to_step == target
    said = [event.get("message", "") for event in read_json_lines(run.folder.path / "events.jsonl")]
    assert any("no stable checkpoint is good" in message for message in said) == bool(target)
    assert any(step_of(path) == good for path in list_checkpoints(run.folder)) == bool(target)


def test_a_checkpoint_from_within_the_trouble_is_not_gone_back_to(run):
    save(run.folder, 20)
    assert _record(run, needed(10, trouble=20)).to_step == 0


class Killed(BaseException):
    pass


def until_killed(real, calls, last):
    def write(*arguments):
        calls.append(arguments)
        if len(calls) > last:
            raise Killed
        return real(*arguments)

    return write


WRITES = ("_append", "_drop_records", "write_kept_records")


@pytest.mark.parametrize("good", [10, None], ids=["to a checkpoint", "to the start"])
@pytest.mark.parametrize("last", range(18))
def test_a_kill_while_the_run_goes_back_loses_no_record_and_doubles_none(run, good, last, monkeypatch):
    def train(folder, after):
        for step in range(after + 5, 26, 5):
            folder.append_metrics(step, {"train/loss": 1.0})

    run.folder.append_event(10, "note")
    train(run.folder, 0)
    if good:
        save(run.folder, good)
    target, calls = good or 0, []
    with monkeypatch.context() as patch:
        for name in WRITES:
            patch.setattr(RunFolder, name, until_killed(getattr(RunFolder, name), calls, last))
        with suppress(Killed):
            _record(run, needed(*([good] if good else [])))
    again = RunFolder(run.folder.path)
    start = SimpleNamespace(checkpoint=None, step=target)
    steps = sorted(map(step_of, list_checkpoints(again)))
    is_decided = any(event["event"] == "rollback" for event in read_json_lines(again.path / "events.jsonl"))
    if not is_decided:
        # The next start resumes at its newest checkpoint, and comes to the same decision.
        start.step = max(steps)
        again.drop_records_after(start.step)
        again.drop_set_aside(0)
        train(again, start.step)
        run.folder = again
        assert _record(run, needed(*([good] if good else []))).to_step == target
    else:
        again.drop_records_after(target)
        again.drop_set_aside(1)
    rows = read_json_lines(again.path / "rolled_back.jsonl")
    aside = [row["step"] for row in rows if row["file"] == "metrics.jsonl"]
    assert aside == list(range(target + 5, 26, 5))
    assert [row["step"] for row in read_json_lines(again.path / "metrics.jsonl")] == list(range(5, target + 1, 5))
