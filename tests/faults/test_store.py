"""A training on a damaged store: the losses are those of an undamaged one, after a line that names the file.

`QWLIT_LONG=1 pytest tests/faults/test_store.py` trains with all 36 damaged stores (twelve ways, three examples each),
else with a sample of them; tests/unit/test_store.py builds and reads them all.
"""

import random
import re
import shutil

import pytest

from qwlit.data.store import SampleStore
from tests.broken_stores import CASES, KINDS, WHILE_READ, rows
from tests.long import LONG
from tests.runs.runs import TINY, losses, qwlit, train
from tests.runs.runs import rows as records
from tests.stores import write

WHILE_READING = [("while it is read", number) for number in range(3)]
SAMPLE = random.Random(1).sample(CASES, 2) + WHILE_READING[:1]
WORDS = [*TINY, "data.path=0.jsonl", "data.val_fraction=0.1", "train.max_steps=6", "train.global_batch_size=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a training on undamaged data, its store, and a store of other data."""
    folder = tmp_path_factory.mktemp("place")
    for shift in (0, 1):
        write(folder / f"{shift}.jsonl", rows(shift))
    train([*WORDS, "run.name=good"], folder)
    done = qwlit(["inspect", *WORDS, "data.path=1.jsonl", "run.root=other"], folder)
    assert done.returncode == 0, done.stderr
    return folder


def store_of(root):
    (folder,) = (path for path in (root / ".store").iterdir() if path.is_dir())
    return folder


def begin(place, root):
    """Return a root for runs, with the undamaged store and no run."""
    (place / root).mkdir()
    shutil.copytree(place / "runs" / ".store", place / root / ".store")
    return store_of(place / root)


def assert_one_line(done, file):
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert "are damaged (" in line and file in line and "run the same command again" in line


@pytest.mark.parametrize(("kind", "number"), CASES + WHILE_READING if LONG else SAMPLE)
def test_a_training_on_a_damaged_store_is_that_on_the_source_and_says_so(kind, number, place, monkeypatch):
    root = re.sub(r"\W", "_", f"{kind}-{number}")
    words = ["train", *WORDS, f"run.root={root}", "run.name=again", f"hardware.num_workers={number % 2}"]
    store = begin(place, root)
    broken = KINDS[kind][number] if kind in KINDS else WHILE_READ[number]
    if kind in KINDS:
        broken.damage(store, store_of(place / "other"))
    else:
        damage_while_reading(broken, store, monkeypatch)
    done = qwlit(words, place)
    monkeypatch.undo()
    run = place / root / "again"
    said = done.stdout
    if done.returncode:
        assert_one_line(done, broken.file)
        done = qwlit(words, place)
        said += done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == losses(place / "runs" / "good")
    assert sum("are damaged (" in line and broken.file in line for line in said.splitlines()) == 1, said
    (event,) = (record for record in records(run, "events.jsonl") if "were damaged" in record.get("message", ""))
    assert broken.file in event["message"]


def damage_while_reading(broken, store, monkeypatch):
    """Damage the store before the third read of a process."""
    read = SampleStore.read

    def damaged_read(self, ids):
        self.num_reads = getattr(self, "num_reads", 0) + 1
        if self.num_reads == 3:
            for number in range(len(self._tokens._unverified)):
                self._tokens._unverified[number] = 1
            self._tokens._num_unverified = len(self._tokens._unverified)
            broken.damage(store, store)
        return read(self, ids)

    monkeypatch.setattr(SampleStore, "read", damaged_read)


def test_damage_that_the_plan_finds_is_repaired_by_the_same_command(place):
    store = begin(place, "planned")
    KINDS["another store's file"][2].damage(store, store_of(place / "other"))
    done = qwlit(["plan", *WORDS, "run.root=planned"], place)
    assert done.returncode == 0, done.stderr
    assert "row_digests.bin" in done.stderr and done.stderr.count("are damaged (") == 1
    assert not (store / "damaged.txt").exists()


def test_a_damaged_store_without_its_source_is_refused_in_one_line(place):
    store = begin(place, "refused")
    KINDS["truncated"][0].damage(store, store)
    (place / "0.jsonl").rename(place / "moved.jsonl")
    done = qwlit(["train", *WORDS, "run.root=refused", "run.name=again"], place)
    (place / "moved.jsonl").rename(place / "0.jsonl")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "'0.jsonl' does not exist" in done.stderr
