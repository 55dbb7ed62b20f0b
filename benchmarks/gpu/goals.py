"""What is hoped for on one H100, beside what was measured. Rows of other work count for nothing."""

from typing import Any

from benchmarks.gpu.head import TIMES_FLOOR
from benchmarks.gpu.memory import ERROR, GOAL
from benchmarks.gpu.tables import COMPARED, INVALID, Cells
from benchmarks.gpu.trainers import FASTER, SHARE

Goal = tuple[str, str, str | None]
"""What, how much, and what was measured; None: nothing."""


def goals(found: dict[str, Any]) -> list[Goal]:
    """Return the goals.

    Args:
        found: part → its file.
    """
    lines: list[Goal] = []
    for part, name, wanted in (("full", "full", "≥ 120,000"), ("lora", "LoRA", "≥ 150,000")):
        rows = _valid(found, part)
        ours = next((row for row in rows if row["trainer"] == "qwlit" and "tokens/s" in row), None)
        lines.append((f"Qwen3-0.6B, {name}: tokens/s", wanted, ours and f"{ours['tokens/s']:,.0f}"))
        theirs = [row for row in rows if row["trainer"].startswith("trl") and row.get(FASTER)]
        best = min(theirs, key=lambda row: float(row[FASTER]), default=None)
        said = best and f"{best[FASTER]:.2f} × ({best['trainer']})"
        lines.append((f"{name}, against TRL at its best: faster by", "≥ 1.25 ×", said))
        lines.append((f"{name}, its share of that memory", "≤ 0.85", best and f"{best[SHARE]:.2f}"))
    heads = [row[TIMES_FLOOR] for row in _valid(found, "head") if row["head"] == "ours" and TIMES_FLOOR in row]
    lines.append(("the head against its matrix products", "≤ 1.6 ×", f"{max(heads):.2f} × at most" if heads else None))
    errors = [abs(row[ERROR]) for row in _valid(found, "memory") if row.get(ERROR) is not None]
    said = f"{max(errors):.1%} at most, of {len(errors)}" if errors else None
    lines.append(("planned against allocated memory", f"within {GOAL:.0%}", said))
    return lines


def _valid(found: dict[str, Any], part: str) -> list[Cells]:
    """Return the rows of a part that are of the same work; a toy's count for nothing."""
    if part not in found or found[part]["size"] == "toy":
        return []
    return [row for row in found[part]["rows"] if not str(row.get(COMPARED, "")).startswith(INVALID)]
