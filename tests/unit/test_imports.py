"""`train` imports its libraries without garbage collection, and trains with it."""

import gc

import pytest

from qwlit.commands import train
from qwlit.core.imports import without_collection


@pytest.fixture(autouse=True)
def unfreeze():
    yield
    gc.unfreeze()


def test_an_import_that_fails_leaves_garbage_collection_on():
    with pytest.raises(ImportError), without_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_train_collects_garbage_in_the_training_but_not_of_its_imports(monkeypatch):
    seen = []
    monkeypatch.setattr("qwlit.run.training_run.train", lambda _: seen.append((gc.isenabled(), gc.get_freeze_count())))
    train.main(["experiment=demo"])
    [(is_enabled, frozen)] = seen
    assert is_enabled
    assert frozen > 100_000
