"""Going back to the start: nothing is deleted before the decision is on the disk, and the next start follows it."""

from types import SimpleNamespace

import pytest

from qwlit.core.files import read_json_lines
from qwlit.run.go_back import _record
from qwlit.run.resume import prepare_folder
from qwlit.training.checkpointing.folder import list_checkpoints
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


def needed(*stable):
    return RollbackNeeded(25, "it diverges", "divergence", is_stable=stable.__contains__, skipped_steps=0)


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
