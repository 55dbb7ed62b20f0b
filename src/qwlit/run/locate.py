"""Where in a step two runs part: both replay it from their checkpoints, in processes and folders of their own."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwlit.core.errors import QwlitError
from qwlit.core.files import read_json, write_text_atomic
from qwlit.run.kept_tensors import Size, compare_kept
from qwlit.run.verify import differing_entries, first_difference, read_steps
from qwlit.training.checkpointing.folder import list_checkpoints
from qwlit.training.checkpointing.manifest import find_damage, step_of
from qwlit.training.observed_step import OBSERVE, Key, Order, read_records
from qwlit.training.step_boundary import STOP_AFTER
from qwlit.training.tracking.manifest import VARIABLES
from qwlit.training.tracking.run_folder import RunFolder

PARTS = {
    "weights": ("the weights before the step", "{name}"),
    "data": ("the data", "{name} of the micro-batch"),
    "input": ("the forward pass", "the input of {name}, which {parent} computes"),
    "forward": ("the forward pass", "the output of {name}"),
    "backward": ("the backward pass", "the gradient of the output of {name}"),
    "input gradient": ("the backward pass", "the gradient of the input of {name}"),
    "gradient": ("the backward pass", "the gradient of {name}"),
    "updated": ("the optimizer step", "{name} after the step; its gradient is the same"),
}
"""What is recorded, in the order of a step: its phase, and how it is named."""


@dataclass(frozen=True)
class Place:
    """The first thing in a step that differs."""

    step: int
    what: str
    """A key of PARTS."""
    phase: str
    text: str
    """What it is, in words."""
    module: str
    """Name of the module, the parameter or the part of the data; "loss" for the head with the loss."""
    rank: int
    micro_batch: int | None
    """On this rank, counted from 0; None for weights and their gradients."""
    size: Size | str
    """A text where the tensors cannot be compared."""


@dataclass(frozen=True)
class Replay:
    """One run's replay: where it starts, and what it leaves behind."""

    run: Path
    root: Path
    """The replay's run.root, in which it has the run's name."""
    checkpoint: Path | None

    @property
    def start(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.root / self.run.name)

    @property
    def trace(self) -> list[dict[str, Any]]:
        return read_steps(self.folder.path / "trace.jsonl")

    @property
    def overrides(self) -> list[str]:
        return [
            f"config={self.run / 'config.yaml'}",
            *(f"run.root={self.root}", f"run.name={self.run.name}", "run.overwrite=false", "resume=auto"),
            *("trace.every_steps=1", "trace.weights_every_steps=1", "logging.every_steps=1", "logger.use=[]"),
            *("validation.each_epoch=false", "validation.every_steps=null", "guard.probe_every_steps=null"),
            *("checkpoint.each_epoch=false", "checkpoint.every_steps=null", "profile.steps=null"),
        ]

    def environment(self, steps: tuple[int, int], reference: "Replay | None") -> dict[str, str]:
        """Return the variables of the child that observes these steps, the first and the last one."""
        order = Order(*steps, str(self.root), None if reference is None else str(reference.root))
        found = {STOP_AFTER: str(steps[1]), OBSERVE: json.dumps(asdict(order))}
        manifest = read_json(self.run / "manifest.json")
        threads, variables = manifest.get("num_threads"), manifest.get("variables")
        if isinstance(variables, dict):
            # Somebody else may have written the manifest.
            found |= {name: str(variables[name]) for name in VARIABLES if name in variables}
        return found | ({"OMP_NUM_THREADS": str(threads)} if isinstance(threads, int) else {})


def prepare_replay(run: Path, root: Path, before: int) -> Replay:
    """Make a folder in which the run resumes at its newest good checkpoint before a step; its own is only read."""
    good = (path for path in reversed(list_checkpoints(RunFolder(run))) if step_of(path) < before)
    replay = Replay(run, root, next((path for path in good if find_damage(path) is None), None))
    folder = replay.folder.path
    (folder / "checkpoints").mkdir(parents=True)
    if replay.checkpoint:
        (folder / "checkpoints" / replay.checkpoint.name).symlink_to(replay.checkpoint.resolve())
    for name in ("config.yaml", "manifest.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    events = [event for event in read_steps(run / "events.jsonl") if event["step"] <= replay.start]
    write_text_atomic(folder / "events.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    if (store := run.parent / ".store").is_dir():
        # Else the data would be tokenized again.
        (root / ".store").symlink_to(store.resolve())
    return replay


Train = Callable[[Replay, tuple[int, int], Replay | None], None]
"""Trains a replay up to the last of two steps and observes these, beside the records of another one."""


def locate(runs: Sequence[Path], step: int, scratch: Path, train: Train) -> tuple[Place | None, list[str]]:
    """Replay the step under the settings of both runs.

    Args:
        step: the first one in which their traces differ. The difference may have come from an earlier one.

    Returns:
        The first thing that differs, None where the replays are equal; and remarks.

    Raises:
        QwlitError: a run cannot be replayed, or the two compute different things.
    """
    if reason := _why_not(*(read_json(run / "manifest.json") for run in runs)):
        raise QwlitError(f"not replayed: {reason}")
    before = observed = step
    number = 0
    while True:
        number += 1
        one, other = (
            prepare_replay(run, scratch / f"{number}{name}", before) for run, name in zip(runs, "ab", strict=True)
        )
        earliest = max(one.start, other.start) + 1
        steps = (max(observed - 1, earliest), observed)
        train(one, steps, None)
        train(other, steps, one)
        found = _first_kept(other)
        if found is None or found[1].what != "weights":
            break
        if found[1].step > earliest:
            _, difference = first_difference([one.trace, other.trace])
            if difference is None or difference.step >= observed:
                break
            observed = difference.step
        elif before > 1 and max(one.start, other.start):
            before = observed = max(one.start, other.start)
        else:
            break
    remarks = [remark for replay in (one, other) if (remark := unlike_itself(replay, step))]
    if found is None:
        return None, remarks
    again = prepare_replay(runs[0], scratch / "again", before)
    train(again, steps, other)
    rank, key = found
    size = compare_kept([replay.root / f"kept-{rank}.pt" for replay in (again, other)])
    micro = None if key.what in ("weights", "gradient", "updated") else key.micro
    name = key.name.replace("loss_model.", "").replace("causal_lm.", "")
    phase, text = PARTS[key.what]
    # A list of layers computes nothing.
    parent = name.rpartition(".")[0].removesuffix(".layers") or "the model"
    place = Place(key.step, key.what, phase, text.format(name=name, parent=parent), name, rank, micro, size)
    return place, remarks


def _why_not(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return why the modules of two runs cannot be compared, from their manifests; None if they can."""
    ranks = [(manifest.get("devices", 1), manifest.get("num_nodes", 1)) for manifest in (one, other)]
    if ranks[0] != ranks[1]:
        return "other numbers of ranks divide a step's samples otherwise, so their modules are given other inputs"
    parameters = [manifest.get("parameters") for manifest in (one, other)]
    if None not in parameters and parameters[0] != parameters[1]:
        return "the models differ in the number of parameters or of trained ones, so in modules or gradients"
    return None


def unlike_itself(replay: Replay, step: int) -> str | None:
    """Return where a replay differs from its run's own trace up to a step, and what may explain it; None if nowhere."""
    own = [record for record in read_steps(replay.run / "trace.jsonl") if record["step"] <= step]
    _, difference = first_difference([own, replay.trace])
    if difference is None:
        return None
    then, now = (read_json(folder / "manifest.json") for folder in (replay.run, replay.folder.path))
    # A replay sets this variable to the run's own number of threads.
    reasons = [entry for entry in differing_entries(then, now) if not entry.startswith("OMP_NUM_THREADS")]
    if then.get("compiled"):
        reasons.append("a replay runs compiled layers uncompiled")
    where = f"step {difference.step}, {difference.quantity}"
    return f"the replay of {replay.run} does not repeat its own trace: {'; '.join([where, *reasons])}"


def _first_kept(replay: Replay) -> tuple[int, Key] | None:
    """Return rank and key of what differs first; the ranks go through a step in the same order."""
    found = []
    for file in sorted(replay.root.glob("kept-*.pt")):
        key = Key(*torch.load(file, weights_only=True, map_location="cpu")["key"])
        rank = int(file.stem.rpartition("-")[2])
        found.append(([*read_records(replay.root, rank)].index(key), rank, key))
    return min(found)[1:] if found else None
