"""Disk, folder, lock and clock: a fault is said in one line, and after the mend the run resumes to the same bits.

`QWLIT_LONG=1 pytest tests/faults/test_disk.py` tries every fault of `disk_faults.py`; else a sample of each kind. Full
and read-only disks are file systems of their own, which only root can mount.
"""

import contextlib
import os
import random
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from qwlit.core.files import read_json_lines
from qwlit.run import training_run
from qwlit.run.callbacks import Extensions
from qwlit.training.checkpointing.checkpoint import read_weights
from qwlit.training.checkpointing.folder import newest
from qwlit.training.tracking.run_folder import RunFolder
from tests.faults.disk_faults import DISK_MIB, FAULTS, At, Fault, Place, end_early
from tests.faults.test_checkpoints import chat, words  # noqa: F401 - a fixture
from tests.long import LONG
from tests.runs.runs import qwlit, summary, train

SEED, OF_EACH_KIND = 21, 2
ROOT = os.geteuid() == 0


def drawn() -> list[str]:
    dice = random.Random(SEED)
    kinds: dict[str, list[str]] = {}
    for name in sorted(FAULTS):
        kinds.setdefault(name.partition(":")[0], []).append(name)
    return sorted(FAULTS) if LONG else [name for names in kinds.values() for name in dice.sample(names, OF_EACH_KIND)]


@pytest.fixture(scope="module")
def whole(chat, tmp_path_factory):  # noqa: F811
    return train(words("whole", chat), tmp_path_factory.mktemp("whole"))


@pytest.fixture
def place(request, monkeypatch, tmp_path):
    fault = FAULTS[request.param]
    if (fault.mounted or fault.as_root) and not ROOT:
        pytest.skip("only root can mount a file system, or stop being root")
    with contextlib.ExitStack() as mended:
        # Other users cannot enter pytest's own folders.
        disk = Path(mended.enter_context(tempfile.TemporaryDirectory()))
        if fault.mounted:
            size = [f"size={DISK_MIB}m,nr_inodes=2000"]
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", *size, "tmpfs", str(disk)], capture_output=True, check=False
            )
            if done.returncode:
                pytest.skip("this root cannot mount a file system")
            # At once, also while this process has a file open there.
            mended.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        (disk / "chat.jsonl").write_bytes(request.getfixturevalue("chat").read_bytes())
        made = Place(disk, monkeypatch, contextlib.ExitStack())
        mended.callback(made.limit_files)
        mended.callback(monkeypatch.undo)
        mended.enter_context(made.mended)
        yield made


def launch(place: Place, at: dict) -> subprocess.CompletedProcess[str]:
    """Train; `at` acts before steps."""
    actions = {step: partial(action, place) for step, action in at.items()}
    with pytest.MonkeyPatch.context() as patch:
        extended = partial(training_run.train, extensions=Extensions([At(actions)]))
        patch.setattr(training_run, "train", extended)
        return qwlit(["train", *words("a", Path("chat.jsonl"))], place.disk)


def assert_same(whole: Path, run: Path, *, lost: bool) -> None:
    """Bit for bit: every logged number, or with `lost` those after the fault, and every weight."""

    def numbers(folder: Path) -> list[dict]:
        found = read_json_lines(folder / "metrics.jsonl")
        return [{k: v for k, v in row.items() if not k.startswith(("throughput", "memory"))} for row in found]

    expected, found = numbers(whole), numbers(run)
    assert found == (expected[-len(found) :] if lost else expected)
    if lost:
        assert 0 < len(found) < len(expected)
    weights, others = (dict(read_weights(newest(RunFolder(folder)))) for folder in (whole, run))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    name = "export/model.safetensors"
    assert (whole / name).read_bytes() == (run / name).read_bytes()


def said_by(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stdout + done.stderr).split())


def assert_says(done: subprocess.CompletedProcess[str], fault: Fault) -> None:
    assert done.returncode == fault.code, done.stdout + done.stderr
    said = said_by(done)
    assert all(text in said for text in fault.said), said
    assert "Traceback" not in said
    if fault.code:
        assert done.stderr.splitlines()[-1].startswith("qwlit train: ") and done.stderr.count("qwlit train: ") == 1


@pytest.mark.parametrize("place", drawn(), indirect=True)
def test_a_fault_is_said_in_a_line_and_the_run_ends_like_an_uninterrupted_one(place, whole, request):
    fault = FAULTS[request.node.callspec.params["place"]]
    if fault.cut:
        assert "cut here" in launch(place, {6: lambda place: end_early()}).stderr
    if fault.before:
        fault.before(place)
    done = launch(place, fault.at)
    assert_says(done, fault)
    if fault.check:
        fault.check(place)
    if fault.code:
        (fault.mend or (lambda place: None))(place)
        done = launch(place, {})
        assert done.returncode == 0, done.stdout + done.stderr
        assert summary(place.run)["resumed_from"] == fault.resumed_from
    place.mended.close()
    assert summary(place.run)["status"] == "done"
    assert_same(whole, place.run, lost=fault.lost)
