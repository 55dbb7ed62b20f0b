"""Train the first steps several times in fresh processes, and compare the traces bit by bit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwlit.core.errors import ConfigError, nearest
from qwlit.core.files import read_json, read_json_lines, resolve_path

QUANTITIES = ("samples", "loss_sum", "grad_norm", "parameters")
"""Of a record of trace.jsonl, in the order in which a step computes them."""
MACHINE = (
    *("qwlit", "python", "platform", "packages", "git", "cpu", "libraries", "variables", "device", "accelerator"),
    *("devices", "num_nodes", "strategy", "precision", "attention", "compiled", "activation_checkpointing"),
    *("offload_optimizer", "reduce_once"),
    *("determinism", "torch_flags", "num_threads", "seed", "data_files", "data", "template", "tokenizer", "base"),
)
"""Entries of manifest.json that a certificate repeats: what the numbers depend on."""
COUNTED = {"num_threads": "thread", "devices": "device", "num_nodes": "node"}
CONTENT = {"data": "tokenized data", "tokenizer": "tokenizer", "base": "base weights"}
"""Entries that are hashes of a content."""
PREFIXES = {"cpu": "processor ", "data_files": "data file "}
"""What a message calls an entry of these dictionaries, before its own name."""
NAMES = {"dirty": "uncommitted changes", "changes": "hash of the uncommitted changes"}
"""What a message calls an entry of `git`."""


@dataclass(frozen=True)
class Difference:
    """The first place at which traces differ."""

    step: int
    quantity: str
    values: tuple[Any, ...]
    """One for each run."""


@dataclass(frozen=True)
class Certificate:
    """Whether the runs are equal, and under which circumstances."""

    equal: bool
    compared_steps: int
    """The number of steps whose records every run has."""
    difference: Difference | None
    runs: tuple[str, ...]
    circumstances: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Return the certificate as lines for a reader."""
        runs = f"{len(self.runs)} runs in processes of their own"
        steps = f"{self.compared_steps} step{'s' * (self.compared_steps != 1)}"
        lines = [f"{runs}, {steps}: {'equal to the bit' if self.equal else 'NOT equal'}"]
        if self.difference:
            lines.append(f"first difference: step {self.difference.step}, {self.difference.quantity}")
            for run, value in zip(self.runs, self.difference.values, strict=True):
                lines.append(f"  {run}: {value}")
        lines += [f"{name}: {_in_words(value)}" for name, value in self.circumstances.items()]
        return "\n".join(lines) + "\n"


def _in_words(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def find_run(name: str, root: str, *, option: str) -> Path:
    """Return the folder of a run: a path, or a name under run.root.

    Args:
        option: the subcommand's, for the message.

    Raises:
        ConfigError: it is no run.
    """
    if not name:
        raise ConfigError(f"{option} is empty; is a shell variable unset?")
    for path in (resolve_path(name), resolve_path(root) / name):
        if (path / "config.yaml").is_file():
            return path
    folder = resolve_path(root)
    runs = [run.name for run in folder.iterdir() if (run / "config.yaml").is_file()] if folder.is_dir() else []
    hint = f" Several are written {option}=[{name}]." if "," in name else nearest(name, runs)
    raise ConfigError(f"{option}={name}: neither {name} nor {Path(root) / name} is the folder of a run.{hint}")


def read_steps(file: Path) -> list[dict[str, Any]]:
    """Return the records of a .jsonl file that name their step; a damaged file has others too."""
    return [record for record in read_json_lines(file) if isinstance(record.get("step"), int)]


def first_difference(
    traces: Sequence[Sequence[dict[str, Any]]], quantities: Sequence[str] | None = None
) -> tuple[int, Difference | None]:
    """Return the number of steps that all traces have, and the first difference among these.

    Args:
        quantities: keys of the records; None: those of trace.jsonl.
    """
    by_step = [{record["step"]: record for record in trace} for trace in traces]
    common = sorted(set.intersection(*(set(records) for records in by_step)))
    for step in common:
        for quantity in quantities or QUANTITIES:
            # Only some records have a hash of the weights.
            if all(quantity in records[step] for records in by_step):
                values = tuple(records[step][quantity] for records in by_step)
                if any(value != values[0] for value in values):
                    return len(common), Difference(step, quantity, values)
    return len(common), None


def certify(runs: Sequence[Path]) -> Certificate:
    """Compare the traces of these run folders.

    Raises:
        ConfigError: they have no step in common.
    """
    steps, difference = first_difference([read_steps(run / "trace.jsonl") for run in runs])
    if not steps:
        raise ConfigError(
            f"{', '.join(map(str, runs))}: no step is in every trace.jsonl; train with trace.every_steps=1"
        )
    manifest = read_json(runs[-1] / "manifest.json")
    circumstances = {name: manifest[name] for name in MACHINE if name in manifest}
    return Certificate(difference is None, steps, difference, tuple(map(str, runs)), circumstances)


def differing_entries(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return in words which of the circumstances two manifests do not share.

    What only one of them has recorded is left out: the other may be of an earlier version of qwlit. A variable of the
    environment that is not recorded is not set.
    """
    found: list[str] = []
    for name in MACHINE:
        if name not in first or name not in second or first[name] == second[name]:
            continue
        before, now = first[name], second[name]
        if not (isinstance(before, dict) and isinstance(now, dict)):
            found.append(_difference(name, before, now))
            continue
        names = before.keys() | now.keys() if name in ("variables", "data_files") else before.keys() & now.keys()
        prefix = PREFIXES.get(name, "")
        found += [
            _entry(f"{prefix}{NAMES.get(key, key)}", key, before.get(key), now.get(key), is_hash=name == "data_files")
            for key in sorted(names)
            if before.get(key) != now.get(key)
        ]
    return found


def _entry(called: str, key: str, before: Any, now: Any, *, is_hash: bool) -> str:
    if is_hash or key in ("commit", "changes"):
        return _content_of(called, before, now)
    if key == "flags":
        # A list of 20 instruction sets twice hides the one that matters.
        one, other = set(str(before).split()), set(str(now).split())
        return f"{called} {' '.join(sorted(one - other)) or 'none'} against {' '.join(sorted(other - one)) or 'none'}"
    return f"{called} {_value(before)} against {_value(now)}"


def _difference(name: str, before: Any, now: Any) -> str:
    if name in CONTENT:
        return _content_of(CONTENT[name], before, now)
    if name in COUNTED:
        return f"{before} {COUNTED[name]}{'s' * (before != 1)} against {now}"
    return f"{name.replace('_', ' ')} {_value(before)} against {_value(now)}"


def _content_of(name: str, before: Any, now: Any) -> str:
    """Name a content by the beginning of its hash."""
    return f"{name} {_value(before)[:8]} against {_value(now)[:8]}"


def _value(value: Any) -> str:
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))
