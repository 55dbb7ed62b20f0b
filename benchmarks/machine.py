"""What a figure was measured on, and where it is kept."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe(*packages: str) -> dict[str, object]:
    """Return processor, cores and versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        **{package: _version(package) for package in packages},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def keep(name: str, result: dict[str, Any]) -> None:
    """Print the figures, and write them to benchmarks/results/NAME.json."""
    text = json.dumps(result, indent=1)
    print(text)
    (Path(__file__).parent / "results" / f"{name}.json").write_text(text + "\n")
