"""Damaged checkpoints: each kind is detected, named and passed over, and no damaged weight is exported.

`QWLIT_LONG=1 pytest tests/faults/test_checkpoints.py` trains with every kind; else a sample of the kinds trains, and
`find_damage` alone is tried with the others.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwlit.run import finish
from qwlit.training.checkpointing.folder import list_checkpoints
from qwlit.training.checkpointing.manifest import MANIFEST, SAVED, find_damage
from qwlit.training.tracking.run_folder import RunFolder
from tests.long import LONG
from tests.runs.runs import DEMO, TINY, assert_same_run, qwlit, rows, summary, train

MODEL, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "training_state.pt"
SEED = 20
Damage = Callable[[Path, Path], object]
"""A function of a checkpoint and of another run's checkpoint of the same step."""


def flip(name: str) -> Damage:
    def damage(checkpoint: Path, other: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) * 2 // 3] ^= 4
        (checkpoint / name).write_bytes(content)

    return damage


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda checkpoint, other: (checkpoint / name).write_bytes(change((checkpoint / name).read_bytes()))


def edit(change: Callable[[dict], object]) -> Damage:
    def damage(checkpoint: Path, other: Path) -> None:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        change(manifest)
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))

    return damage


def replace_by_link(name: str, target: str) -> Damage:
    def damage(checkpoint: Path, other: Path) -> None:
        (checkpoint / name).unlink()
        (checkpoint / name).symlink_to(target)

    return damage


def replace_by_folder(checkpoint: Path, other: Path) -> None:
    (checkpoint / MODEL).unlink()
    (checkpoint / MODEL).mkdir()


def replace_whole(checkpoint: Path, source: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(source, checkpoint)


def link_whole(checkpoint: Path, source: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to(source)


def swap_files(checkpoint: Path, other: Path) -> None:
    (checkpoint / MODEL).rename(checkpoint / "held")
    (checkpoint / MOMENTS).rename(checkpoint / MODEL)
    (checkpoint / "held").rename(checkpoint / MOMENTS)


def use_weights_of(checkpoint: Path, other: Path) -> None:
    """Another run's weights, and a manifest that lists them."""
    shutil.copy(other / MODEL, checkpoint / MODEL)
    describe_again(checkpoint)


def describe_again(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def zero_page(content: bytes) -> bytes:
    middle = len(content) // 2 & ~4095
    return content[:middle] + bytes(4096) + content[middle + 4096 :]


KINDS: dict[str, Damage] = {
    **{f"bit of {name}": flip(name) for name in (MODEL, MOMENTS, STATE, MANIFEST)},
    **{f"{name} missing": lambda c, o, name=name: (c / name).unlink() for name in (MODEL, MOMENTS, STATE, MANIFEST)},
    "weights cut off": rewrite(MODEL, lambda content: content[:-4096]),
    "weights longer": rewrite(MODEL, lambda content: content + b"\0"),
    "weights empty": rewrite(MODEL, lambda content: b""),
    "moments with a zero page": rewrite(MOMENTS, zero_page),
    "weights and moments swapped": swap_files,
    "weights a folder": replace_by_folder,
    "weights a device": replace_by_link(MODEL, "/dev/zero"),
    "manifest a device": replace_by_link(MANIFEST, "/dev/zero"),
    "manifest no JSON": rewrite(MANIFEST, lambda content: b"\xff\xfe{"),
    "manifest deep": rewrite(MANIFEST, lambda content: b"[" * 100_000),
    "manifest a list": rewrite(MANIFEST, lambda content: b"[]"),
    "manifest lists nothing": edit(lambda manifest: manifest["files"].clear()),
    "manifest lists less": edit(lambda manifest: manifest["files"].pop(MOMENTS)),
    "manifest lists a path": edit(lambda m: m["files"].update({"../../config.yaml": {"bytes": 1, "sha256": ""}})),
    "manifest lists a device": edit(lambda m: m["files"].update({"/dev/zero": {"bytes": 0, "sha256": ""}})),
    "manifest of another world size": edit(lambda manifest: manifest.update(world_size=8)),
    "one more shard": lambda c, o: shutil.copy(c / MODEL, c / "model-00002-of-00002.safetensors"),
    "another step's folder": lambda c, o: replace_whole(c, min(c.parent.glob("step-*"))),
    "another run's folder": replace_whole,
    "another run's folder, linked": link_whole,
    "another run's weights, listed": use_weights_of,
}
DRAWN = sorted(KINDS) if LONG else random.Random(SEED).sample(sorted(KINDS), 3)


def words(name: str, chat: Path, *more: str) -> list[str]:
    every = ["validation.every_steps=2", "validation.each_epoch=false", "validation.early_stopping_patience=null"]
    every += ["checkpoint.every_steps=2", "checkpoint.each_epoch=false", "checkpoint.keep_last=9"]
    return [*TINY, f"data.path={chat}", "data.val_fraction=0.2", "train.max_steps=8", *every, f"run.name={name}", *more]


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    lines = (DEMO / "val.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def made(chat, tmp_path_factory) -> Path:
    """A run of 8 steps, with all its checkpoints. The rate is high enough for the best one not to be the last."""
    folder = tmp_path_factory.mktemp("made")
    run = train(words("a", chat, "optim.lr=3e-2", "scheduler.warmup_steps=1", "preflight.allow=[full_lr]"), folder)
    assert (run / "checkpoints/best").resolve().name != "step-000008"
    return run


@pytest.fixture(scope="module")
def other(chat, tmp_path_factory) -> Path:
    return train(words("a", chat, "seed=5"), tmp_path_factory.mktemp("other"))


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of `made` that was killed after its last checkpoint."""
    copied = tmp_path / "runs" / "a"
    shutil.copytree(made, copied, symlinks=True)
    shutil.rmtree(copied / "export")
    (copied / "summary.json").write_text(json.dumps(summary(copied) | {"status": "running"}))
    return copied


def resume(run: Path, chat: Path):
    again = ["optim.lr=3e-2", "scheduler.warmup_steps=1", "preflight.allow=[full_lr]"]
    return qwlit(["train", *words("a", chat, *again)], run.parents[1])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_damage_is_found(kind, run, other):
    checkpoint = run / "checkpoints/step-000006"
    assert find_damage(checkpoint) is None
    KINDS[kind](checkpoint, other / "checkpoints/step-000006")
    assert find_damage(checkpoint)


@pytest.mark.parametrize("steps", [(8,), (8, 6)] if LONG else [(8,)], ids=lambda steps: f"{len(steps)} damaged")
@pytest.mark.parametrize("kind", DRAWN)
def test_damaged_newest_checkpoints_are_named_and_the_run_resumes_from_the_one_before(
    kind, steps, run, made, other, chat
):
    names = [f"step-{step:06d}" for step in steps]
    for name in names:
        KINDS[kind](run / "checkpoints" / name, other / "checkpoints" / name)
    done = resume(run, chat)
    assert done.returncode == 0, done.stderr
    assert summary(run)["resumed_from"] == min(steps) - 2
    for name in names:
        assert f"{name} is damaged" in done.stdout
        assert any(row["event"] == "damaged" and name in row["message"] for row in rows(run, "events.jsonl"))
        assert (run / "checkpoints" / f"damaged-{name}").exists()
    assert_same_run(made, run)
    assert load_file(run / "export" / MODEL).keys() == load_file(made / "export" / MODEL).keys()
    assert (run / "export" / MODEL).read_bytes() == (made / "export" / MODEL).read_bytes()


@pytest.mark.parametrize("kind", [*DRAWN, "the whole folder missing", "weight of another shape", "weight NaN"])
def test_a_damaged_best_checkpoint_is_not_exported_but_the_next_best_one(kind, run, other, chat):
    losses = {row["step"]: row["val/loss"] for row in rows(run) if "val/loss" in row}
    best, second = sorted((s for s in losses if s % 2 == 0), key=losses.__getitem__)[:2]
    checkpoint = run / "checkpoints" / f"step-{best:06d}"
    if kind in KINDS:
        KINDS[kind](checkpoint, other / "checkpoints" / checkpoint.name)
    elif kind in WRONG_INSIDE:
        WRONG_INSIDE[kind](checkpoint, other)
        seal_again(run, checkpoint)
    else:
        shutil.rmtree(checkpoint)
    done = resume(run, chat)
    assert done.returncode == 0, done.stderr
    said = f"exported is step {second}, val/loss {losses[second]:.4f}"
    assert checkpoint.name in done.stdout and said in " ".join(done.stdout.split())
    assert any(row["event"] == "damaged" and said in row["message"] for row in rows(run, "events.jsonl"))
    assert summary(run)["val_loss_best"] == losses[second]
    exported = load_file(run / "export" / MODEL)
    saved = load_file(run / "checkpoints" / f"step-{second:06d}" / MODEL)
    assert all(torch.equal(exported[name], weight) for name, weight in saved.items())
    assert (run / "checkpoints/best").resolve().name == f"step-{second:06d}"


@pytest.mark.parametrize(("held", "exported"), [(6, 4), (4, 4)])
def test_the_next_best_checkpoint_may_have_a_loss_of_0(run, held, exported, monkeypatch):
    (run / "metrics.jsonl").write_text('{"step": 4, "val/loss": 0.0}\n{"step": 6, "val/loss": 0.5}\n')
    best = run / "checkpoints/step-000008"
    flip(MODEL)(best, best)
    made, folder = [], RunFolder(run)
    real = finish.fill_from_checkpoint
    model = SimpleNamespace(causal_lm=SimpleNamespace(named_parameters=dict))
    fill = lambda model, path: real(model, path) if path == best else made.append(path)  # noqa: E731
    monkeypatch.setattr(finish, "fill_from_checkpoint", fill)
    checkpointing = SimpleNamespace(
        best_step=8, path=lambda step: run / f"checkpoints/step-{step:06d}", replace_best=lambda step, row: None
    )
    training = SimpleNamespace(checkpointing=checkpointing, trainer=SimpleNamespace(global_step=held), results=dict)
    finish._load_best_weights(model, training, folder, always=False)
    assert [path.name for path in made] == ([f"step-{exported:06d}"] if held != exported else [])
    assert rows(run, "events.jsonl")[-1]["message"].endswith(f"exported is step {exported}, val/loss 0.0000")


@pytest.mark.parametrize("kind", [*(DRAWN if LONG else DRAWN[:2]), "all folders missing"])
def test_a_run_whose_checkpoints_are_all_bad_never_starts_from_step_0_by_itself(kind, run, other, chat):
    for checkpoint in sorted(list_checkpoints(RunFolder(run)), reverse=True):
        if kind in KINDS and (checkpoint.name != "step-000002" or kind != "another step's folder"):
            KINDS[kind](checkpoint, other / "checkpoints" / checkpoint.name)
        else:
            shutil.rmtree(checkpoint)
    metrics = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        done = resume(run, chat)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "has no good checkpoint left" in done.stderr and "resume=never" in done.stderr
        assert (run / "metrics.jsonl").read_bytes() == metrics
    again = qwlit(["train", *words("a", chat, "resume=never", "train.max_steps=2")], run.parents[1])
    assert again.returncode == 0 and (run.with_name("a.before-1") / "metrics.jsonl").read_bytes() == metrics


class Canary:
    """Writes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


def change_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(checkpoint: Path, other: Path) -> None:
        tensors = load_file(checkpoint / name)
        change(tensors)
        save_file(tensors, checkpoint / name, {"format": "pt"})

    return damage


def change_state(change: Callable[[dict], object]) -> Damage:
    def damage(checkpoint: Path, other: Path) -> None:
        state = torch.load(checkpoint / STATE, weights_only=True)
        change(state)
        torch.save(state, checkpoint / STATE)

    return damage


def first(tensors: dict[str, torch.Tensor], prefix: str = "") -> str:
    return min(name for name in tensors if name.startswith(prefix) and tensors[name].ndim)


def set_value(tensors: dict[str, torch.Tensor], value: float, prefix: str = "") -> None:
    tensors[first(tensors, prefix)].view(-1)[0] = value


WRONG_INSIDE: dict[str, Damage] = {
    "weight of another shape": change_tensors(MODEL, lambda t: t.update({first(t): t[first(t)][:1].clone()})),
    "weight missing": change_tensors(MODEL, lambda t: t.pop(first(t))),
    "weight too much": change_tensors(MODEL, lambda t: t.update(more=torch.ones(2))),
    "weight NaN": change_tensors(MODEL, lambda t: set_value(t, torch.nan)),
    "weight infinite": change_tensors(MODEL, lambda t: set_value(t, torch.inf)),
    "moment NaN": change_tensors(MOMENTS, lambda t: set_value(t, torch.nan, "exp_avg.")),
    "moment of another shape": change_tensors(MOMENTS, lambda t: t.update({first(t): torch.ones(3, 3)})),
    "moment of no weight": change_tensors(MOMENTS, lambda t: t.update({"exp_avg.nothing": torch.ones(3)})),
    "weights no safetensors": rewrite(MODEL, lambda content: b"nothing" * 100),
    "header of 100 GB": rewrite(MODEL, lambda content: (10**11).to_bytes(8, "little") + content[8:]),
    "state no torch file": rewrite(STATE, lambda content: b"nothing"),
    "state an older pickle": rewrite(STATE, lambda content: pickle.dumps({"a": 1})),
    "state a list": lambda c, o: torch.save([1, 2], c / STATE),
    "state empty": lambda c, o: torch.save({}, c / STATE),
    "state without callbacks": change_state(lambda state: state.pop("callbacks")),
    "state without loops": change_state(lambda state: state.pop("loops")),
    "callbacks of another kind": change_state(lambda s: s["callbacks"].update({k: [] for k in s["callbacks"]})),
    "groups of another optimizer": change_state(lambda state: state["optimizer_groups"].pop()),
    "groups of another kind": change_state(lambda state: state.update(optimizer_groups=7)),
    "parameters of another kind": change_state(lambda state: state.update(optimizer_parameters={"a": 1})),
}
DRAWN_INSIDE = sorted(WRONG_INSIDE) if LONG else random.Random(SEED).sample(sorted(WRONG_INSIDE), 6)


def seal_again(run: Path, checkpoint: Path) -> None:
    """Make manifest and events.jsonl agree with the files, as if qwlit had written them."""
    describe_again(checkpoint)
    seal = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    step = int(checkpoint.name[-6:])
    events = rows(run, "events.jsonl")
    for event in events:
        if (event["event"], event["step"]) == (SAVED, step):
            event["manifest"] = seal
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.parametrize("kind", [*DRAWN_INSIDE, "state with code"])
def test_a_sealed_checkpoint_with_wrong_content_ends_in_one_line(kind, run, other, chat, tmp_path):
    checkpoint, canary = run / "checkpoints/step-000008", tmp_path / "executed"
    if kind in WRONG_INSIDE:
        WRONG_INSIDE[kind](checkpoint, other)
    else:
        torch.save({"optimizer_parameters": Canary(canary)}, checkpoint / STATE)
    seal_again(run, checkpoint)
    assert find_damage(checkpoint) is None
    done = resume(run, chat)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "step-000008 cannot be loaded" in done.stderr and "move it away" in done.stderr
    assert not canary.exists()
    shutil.rmtree(checkpoint)
    assert resume(run, chat).returncode == 0 and summary(run)["resumed_from"] == 6
