"""Fresh processes compute the same bits, and what is not the same is found. With QWLIT_LONG=1 only:

    QWLIT_LONG=1 QWLIT_REPEATS=10 pytest tests/runs/test_repeatability.py

Each run has dropout, packing, two workers, a validation and a checkpoint.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from qwlit.core.errors import Interrupted
from qwlit.training.step_boundary import STOP_AFTER
from tests.long import LONG
from tests.runs.runs import DEMO, ENVIRONMENT, TINY, assert_same_run, command, rows

pytestmark = pytest.mark.skipif(not LONG, reason="QWLIT_LONG is not set")
REPEATS = int(os.environ.get("QWLIT_REPEATS", "3"))
STEPS = 20
WORDS = [
    *(*TINY, "model.architecture.intermediate_size=128", "recipe=pretrain", "dropout=pretrain", "data.path=chat.jsonl"),
    *("data.val_fraction=0.2", "data.exact_match=0", f"train.max_steps={STEPS}", "train.max_epochs=null"),
    *(
        "train.global_batch_size=8",
        "hardware.micro_batch_size=2",
        "hardware.num_workers=2",
        "validation.every_steps=10",
    ),
    *("checkpoint.every_steps=10", "determinism=reproducible", "trace.weights_every_steps=1"),
]
RANKS = {"single": [], "ddp": ["hardware.devices=2"], "fsdp": ["hardware.devices=2", "hardware.strategy=fsdp"]}
CELLS = [
    (attention, precision, ranks)
    for attention in ("eager", "sdpa")
    for precision in ("32-true", "bf16-mixed")
    for ranks in RANKS
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repeatability")
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def start(words: list[str], place: Path, *, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh interpreter and expect this exit code."""
    done = subprocess.run(
        command(words), cwd=place, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def assert_repeats(words: list[str], name: str, place: Path) -> Path:
    """Train in fresh processes, and expect the same bits in every step, in the validations and in the weights."""
    runs = [place / "runs" / f"{name}-{number}" for number in range(REPEATS)]
    for run in runs:
        start(["train", *WORDS, *words, f"run.name={run.name}"], place)
        trace = rows(run, "trace.jsonl")
        assert len(trace) == STEPS and all("parameters" in row for row in trace)
        assert trace == rows(runs[0], "trace.jsonl")
        assert_same_run(run, runs[0])
    return runs[0]


@pytest.mark.parametrize(("attention", "precision", "ranks"), CELLS)
def test_every_fresh_process_computes_the_same_bits(attention, precision, ranks, place):
    words = [f"model.attention={attention}", f"hardware.precision={precision}", *RANKS[ranks]]
    run = assert_repeats(words, f"{attention}-{precision}-{ranks}", place)
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["attention"], manifest["precision"], manifest["strategy"]) == (attention, precision, ranks)


@pytest.mark.parametrize("recipe", ["lora", "qlora"])
def test_adapters_are_the_same_bits(recipe, place):
    assert_repeats([f"recipe={recipe}", "dropout.lora=0.1"], recipe, place)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(ranks, place):
    words = ["train", *WORDS, *RANKS[ranks]]
    start([*words, f"run.name=whole-{ranks}"], place)
    start([*words, f"run.name=cut-{ranks}"], place, code=Interrupted.exit_code, **{STOP_AFTER: "13"})
    start([*words, f"run.name=cut-{ranks}"], place)
    whole, cut = (place / "runs" / f"{kind}-{ranks}" for kind in ("whole", "cut"))
    # An epoch ends with step 13, too: its checkpoint may be saved before the process ends.
    assert json.loads((cut / "summary.json").read_text())["resumed_from"] in (10, 13)
    assert rows(whole, "trace.jsonl") == rows(cut, "trace.jsonl")
    assert_same_run(whole, cut)


def test_a_planted_operation_that_is_not_deterministic_is_no_certificate(place, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "import torch\n"
        "silu = torch.nn.functional.silu\n"
        "torch.nn.functional.silu = lambda *a, **k: silu(*a, **k) * (1 + os.urandom(1)[0] / 2**20)\n"
    )
    words = ["verify", *WORDS, "run.name=planted", "steps=3", "repeats=2"]
    path = os.pathsep.join(filter(None, [str(tmp_path), ENVIRONMENT.get("PYTHONPATH")]))
    done = start(words, place, code=4, PYTHONPATH=path)
    # Random weights make so small activations that the loss of the first step can round to the same number.
    assert re.search("not equal: step 1 differs in (loss_sum|grad_norm)", done.stderr), done.stderr
    assert "equal to the bit" in start(words, place).stdout


def test_another_number_of_threads_is_named(place):
    start(["train", *WORDS, "run.name=threads", "model.architecture.hidden_size=256"], place)
    done = subprocess.run(
        command(["verify", "run=threads", "steps=5"]),
        cwd=place,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 thread against 2" in " ".join(done.stdout.split())
    # On some machines the number of threads changes no sum.
    assert done.returncode in (0, 4)
