"""What tests of W&B share: running in another environment, and what a run has there against what it has here."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.runs.runs import DEMO, qwlit, rows
from tests.wandb_stub import Run


def chat_rows(folder: Path) -> Path:
    """Write 60 rows of the demo corpus."""
    lines = (DEMO / "val.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    file = folder / "chat.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def here(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, in that environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        return qwlit(words, folder)


def sent(run: Run) -> list[dict]:
    """The rows that a run has on W&B, without the client's own columns."""
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in run.history]


def recorded(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, without what was not known yet."""
    return [{name: value for name, value in row.items() if value is not None} for row in rows(folder)]
