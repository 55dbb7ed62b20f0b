"""The tables of a part: written to its file after every row, so that a part that is cut off keeps its rows."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Cells = dict[str, Any]
"""Column → number, text or None; the unit is in the column's name."""
COMPARED = "compared"
"""The column that says what was compared with what, and whether the figures are those of the same work."""
INVALID = "**invalid**"
"""Begins a text in that column where they are not."""


@dataclass(frozen=True)
class Scale:
    """How large the work is, and where it is done."""

    device: str
    """cuda or cpu."""
    toy: bool
    """Seconds of work that show that a part runs; its figures say nothing."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def tolerance(self) -> float:
        """The largest relative error of a norm. bfloat16 keeps 8 bits of each number; rounded twice (assumption)."""
        return 1e-2 if self.device == "cuda" else 1e-4


class NotMeasured(Exception):
    """A row cannot be measured on this machine; the message says why, as it stands in the table."""


class Tables:
    """The rows of one part."""

    def __init__(self, place: Path, facts: dict[str, Any]) -> None:
        """Begin the file.

        Args:
            facts: command, machine and settings.
        """
        self._place = place
        self._began = time.perf_counter()
        self._record: dict[str, Any] = {**facts, "status": "running", "seconds": 0.0, "rows": []}
        self._write()

    @property
    def rows(self) -> list[Cells]:
        return list(self._record["rows"])

    def add(self, table: str, cells: Cells) -> None:
        """Add a row to a table and write the file."""
        self._record["rows"].append({"table": table, **cells})
        print(f"{table}: " + ", ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
        self._write()

    def measure(self, table: str, cells: Cells, measure: Callable[[], Cells]) -> Cells | None:
        """Add a row of `cells` and of what `measure` returns; if it fails, the row says why.

        Returns:
            What was measured; None if it failed.
        """
        try:
            found = measure()
        except NotMeasured as reason:
            self.add(table, cells | {COMPARED: str(reason)})
        except (ModuleNotFoundError, torch.OutOfMemoryError) as error:
            kind = "not installed" if isinstance(error, ModuleNotFoundError) else "out of memory"
            self.add(table, cells | {COMPARED: f"{kind}: {_first_line(error)}"})
        except Exception as error:  # one row that fails must not take the others with it
            self.add(table, cells | {COMPARED: f"failed: {type(error).__name__}: {_first_line(error)}"})
        else:
            self.add(table, cells | found)
            return found
        return None

    def finish(self) -> None:
        self._record["status"] = "done"
        self._write()

    def _write(self) -> None:
        self._record["seconds"] = round(time.perf_counter() - self._began, 1)
        write(self._place, self._record)


def write(place: Path, record: dict[str, Any]) -> None:
    """Write a part's file whole, or not at all: the part may be killed at any time."""
    new = place.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(place)


def agreement(errors: dict[str, float], tolerance: float) -> str:
    """Say how far results agree with a reference: relative errors by name, all of which must be below `tolerance`."""
    said = ", ".join(f"{name} to {error:.0e}" for name, error in errors.items())
    # A NaN is below nothing.
    if all(error < tolerance for error in errors.values()):
        return f"agree: {said}"
    return f"{INVALID}: {said}"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference, ÷ the norm of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def said_how(how: dict[str, Any]) -> str:
    """Return in words how a process computed."""
    words = [how["precision"], f"TF32 {'on' if how['TF32'] else 'off'}", f"attention {how['attention']}"]
    words += ["compiled"] if how["compiled"] else []
    if level := how.get("activation_checkpointing"):
        words.append(f"activation checkpointing {level}")
    words += ["optimizer on the host"] if how.get("on_host") else []
    for unit in ("size", "tokens"):
        if limit := how.get(f"micro_batch_{unit}"):
            words.append(f"micro-batches of at most {limit:,} {'samples' if unit == 'size' else unit}")
    return ", ".join([*words, f"threads {how['threads']}"])


def _first_line(error: Exception) -> str:
    """Return a message's last line if it is a process's output, else its first: where Python says what went wrong."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    return (lines[-1] if "failed:" in lines[0] else lines[0])[:200].replace("|", "/")
