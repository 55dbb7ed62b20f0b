"""Artefacts of somebody else execute nothing, end in one line or do nothing, and no secret leaves the environment.

`QWLIT_LONG=1 pytest tests/faults/test_hostile.py` tries all of them; else a sample.
"""

import json
import pickle
import random
import re
import shutil
import subprocess

import pytest
import yaml

from tests.faults.artefacts import CANARY, SMALL, TRAIN, Canary
from tests.faults.hostile_inputs import INPUTS
from tests.faults.hostile_models import MODELS
from tests.faults.hostile_runs import FOLDERS, MARKUP, OWN, RESUME
from tests.faults.watched import REPORT, SECRET
from tests.long import LONG
from tests.runs.runs import DEMO, ENVIRONMENT, interpreter, qwlit, summary

ARTEFACTS = MODELS | FOLDERS | INPUTS
SEED, DRAWN = 21, 12
CHOSEN = sorted(ARTEFACTS) if LONG else random.Random(SEED).sample(sorted(ARTEFACTS), DRAWN)
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal would obey."""
MODEL = [
    "model=demo",
    *(f"model.architecture.{key}" for key in ("num_hidden_layers=1", "hidden_size=64", "intermediate_size=96")),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a model, an adapter, a run that was killed, and a sweep, all good."""
    place = tmp_path_factory.mktemp("good")
    lines = (DEMO / "val.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    (place / "chat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _succeed(["train", *SMALL, *MODEL, "run.name=first"], place)
    (place / "runs/first/export").rename(place / "model")
    lora = ["recipe=lora", "adapter.rank=4", "adapter.alpha=8", "run.name=lora"]
    _succeed([*TRAIN[:-1], *lora], place)
    (place / "runs/lora/export").rename(place / "adapter")
    _succeed(RESUME, place)
    document = {
        "method": "grid",
        "metric": {"name": "train/loss", "goal": "minimize"},
        "parameters": {"optim.lr": {"values": [1e-4]}},
        "command": [*OWN[:-1], *TRAIN[:-1], "logging.every_steps=1", "${args_no_hyphens}"],
    }
    (place / "search.yaml").write_text(yaml.safe_dump(document))
    _succeed(["sweep", "sweep=search.yaml", "backend=optuna", "trials=1", "run.root=runs"], place)
    for name in ("first", "lora"):
        shutil.rmtree(place / "runs" / name)
    killed = place / "runs/a"
    shutil.rmtree(killed / "checkpoints/step-000004")
    for pointer in ("best", "last"):
        (killed / "checkpoints" / pointer).unlink(missing_ok=True)
        (killed / "checkpoints" / pointer).symlink_to("step-000002")
    (killed / "summary.json").write_text(json.dumps(summary(killed) | {"status": "running"}))
    return place


def _succeed(words, place):
    done = qwlit(words, place)
    assert done.returncode == 0, done.stdout + done.stderr


def watched(words, place, **environment):
    """Run qwlit in a process that refuses, and writes down, what an artefact would start."""
    launch = [interpreter(), "-m", "tests.faults.watched", *words]
    return subprocess.run(
        launch, cwd=place, env=ENVIRONMENT | environment, capture_output=True, timeout=120, check=False
    )


def assert_nothing_happened(done, place):
    """Nothing was executed, no secret was written, and no character was printed that a terminal obeys."""
    said = done.stdout.decode() + done.stderr.decode()
    assert "Traceback" not in said, said
    assert not list(place.rglob(CANARY))
    assert not (place / REPORT).exists(), (place / REPORT).read_text()
    assert not CONTROLS.search(said), repr(said)
    assert SECRET not in said
    for file in place.rglob("*"):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            assert SECRET.encode() not in content, file
            if file.suffix == ".html":
                assert not CONTROLS.search(content.decode()) and MARKUP[:4].encode() not in content


@pytest.mark.parametrize("name", CHOSEN)
def test_an_artefact_of_somebody_else_executes_nothing_and_is_refused_in_one_line(name, good, tmp_path):
    artefact = ARTEFACTS[name]
    place = tmp_path / "place"
    shutil.copytree(good, place, symlinks=True)
    artefact.make(place)
    done = watched(artefact.words, place, **dict([artefact.environment] if artefact.environment else []))
    assert_nothing_happened(done, place)
    said = done.stderr.decode()
    if artefact.says is None:
        assert done.returncode == 0, said
    else:
        assert done.returncode == 2, f"{done.stdout.decode()}\n{said}"
        assert said.count("\n") == 1 and artefact.says in said, said


def test_the_table_has_a_hundred_artefacts_and_more():
    assert len(ARTEFACTS) == len(MODELS) + len(FOLDERS) + len(INPUTS) >= 100


def test_the_watch_sees_and_refuses_a_program_that_qwlit_starts(tmp_path):
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\nmkdir {tmp_path}/{CANARY}\n")
    sbatch.chmod(0o755)
    place = tmp_path / "place"
    place.mkdir()
    words = ["submit", "model=demo", "hardware=cpu", "hardware.devices=1", "data.path=rows.jsonl"]
    watched(words, place, PATH=f"{sbatch.parent}:{ENVIRONMENT['PATH']}")
    assert "sbatch" in (place / REPORT).read_text()
    assert not (tmp_path / CANARY).exists()


def test_the_canary_is_made_where_it_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Canary()))
    assert (tmp_path / CANARY).exists()
