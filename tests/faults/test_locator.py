"""`diff` finds the step and the module of a planted operation that computes one element otherwise.

`QWLIT_LONG=1 pytest tests/faults/test_locator.py` plants 30 alone, 10 on two ranks, and 3 in each of the harder
settings.
"""

import json
import random
import subprocess
from pathlib import Path

import pytest

from qwlit.core.children import start_child
from tests.long import LONG
from tests.runs.runs import ENVIRONMENT, TINY, interpreter, qwlit

RUN = [
    *TINY,
    *("data=demo", "data.exact_match=0", "recipe=pretrain", "dropout=pretrain", "train.global_batch_size=8"),
    *("train.max_steps=8", "train.max_epochs=null", "checkpoint.every_steps=3", "checkpoint.each_epoch=false"),
    *("validation.each_epoch=false", "trace.every_steps=1", "hardware.micro_batch_size=4"),
]
DDP, FSDP = (("hardware.devices=2", f"hardware.strategy={strategy}") for strategy in ("ddp", "fsdp"))
SETTINGS = {
    "alone": (),
    "ddp": DDP,
    "fsdp": FSDP,
    "lora": ("recipe=lora", "dropout=lora"),
    "bf16, activation checkpointing": ("hardware.precision=bf16-mixed", "hardware.activation_checkpointing=full"),
    "selective, qwen2": ("model.architecture.model_type=qwen2", "hardware.activation_checkpointing=selective"),
}
SAMPLE = [("alone", 1), ("ddp", 30)]
EVERY = [
    *(("alone", seed) for seed in range(30)),
    *(("ddp", seed) for seed in range(30, 40)),
    *((name, seed) for name in list(SETTINGS)[2:] for seed in range(40, 43)),
]
INNER = [
    *("", ".input_layernorm", ".post_attention_layernorm", ".self_attn", ".mlp"),
    *(f".self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")),
    *(f".mlp.{part}" for part in ("gate_proj", "act_fn", "up_proj", "down_proj")),
]
MODULES = ["model.embed_tokens", "model.norm", *(f"model.layers.{layer}{part}" for layer in (0, 1) for part in INNER)]


def faulty(name: str, faults: list, folder: Path, *more: str) -> Path:
    """Train with the faults that belong to this run."""
    command = [interpreter(), "-m", "tests.faults.faulty", "train", *RUN, *more, f"run.name={name}"]
    environment = ENVIRONMENT | {"QWLIT_FAULTS": json.dumps(faults)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / name


def locate(folder: Path, a: str, b: str, faults: list, monkeypatch) -> tuple[int, dict]:
    """`diff` them; the replays have the same faults as the runs."""

    def start(arguments, *more, **named):
        return start_child(["-m", "tests.faults.faulty", *arguments[2:]], *more, **named)

    monkeypatch.setattr("qwlit.tuning.trial.start_child", start)
    for name, value in (ENVIRONMENT | {"QWLIT_FAULTS": json.dumps(faults)}).items():
        monkeypatch.setenv(name, value)
    done = qwlit(["diff", f"a={a}", f"b={b}", "output=json"], folder)
    assert done.returncode in (0, 4), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


def drawn(draw: random.Random) -> dict:
    return {
        "kind": draw.choice(("forward", "backward")),
        "module": draw.choice(MODULES),
        "steps": [draw.randint(1, 8)],
        "at": draw.random(),
        "value": 1e-3,
        "run": "b",
        "again": True,
    }


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[tuple[str, ...], Path]:
    """Settings → a folder with a run `a` without a fault; made when it is asked for."""
    return {}


def planted(settings: tuple[str, ...], seed: int, places, tmp_path_factory, monkeypatch) -> tuple[dict, dict]:
    """Plant a fault that changes something; return it and what `diff` says. `a` is trained once for these settings."""
    if settings not in places:
        places[settings] = tmp_path_factory.mktemp("locator")
        faulty("a", [], places[settings], *settings)
    draw = random.Random(seed)
    while True:
        fault = drawn(draw)
        faulty("b", [fault], places[settings], *settings, "run.overwrite=true")
        before = content(places[settings] / "runs/a")
        code, found = locate(places[settings], "a", "b", [fault], monkeypatch)
        assert content(places[settings] / "runs/a") == before
        # The last token of a text is in no loss, so a fault in it changes nothing.
        if code == 4:
            return fault, found


def content(run: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of a run, with its time of change."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("settings", "seed"), EVERY if LONG else SAMPLE)
def test_a_planted_operation_is_located_to_its_step_and_module(settings, seed, places, tmp_path_factory, monkeypatch):
    fault, found = planted(SETTINGS[settings], seed, places, tmp_path_factory, monkeypatch)
    place = found["place"]
    assert place and not found["remarks"], found
    assert (place["step"], place["module"], place["what"]) == (*fault["steps"], fault["module"], fault["kind"]), place
    if fault["kind"] == "forward":
        assert place["size"]["elements"] == 1


@pytest.mark.skipif(not LONG, reason="QWLIT_LONG is not set")
def test_a_planted_loss_is_located_to_the_head_with_the_loss(tmp_path, monkeypatch):
    fault = {"kind": "loss", "steps": [5], "value": 1.0, "run": "b", "again": True}
    for name in "ab":
        faulty(name, [fault], tmp_path)
    place = locate(tmp_path, "a", "b", [fault], monkeypatch)[1]["place"]
    assert (place["step"], place["module"], place["what"]) == (5, "loss", "forward")
    assert place["size"]["largest"] == pytest.approx(1.0, rel=1e-3)
