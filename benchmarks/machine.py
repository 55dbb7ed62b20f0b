"""What a figure was measured on, and where it is kept."""

import json
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qwlit.core.allocator import expand_segments
from qwlit.core.threads import bound_spinning


def command_line_environment() -> dict[str, str]:
    """Return the environment that qwlit's command line gives itself before it imports torch."""
    environment = dict(os.environ)
    bound_spinning(environment)
    expand_segments(environment)
    return environment


def describe(*packages: str) -> dict[str, object]:
    """Return processor, cores and versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **(_gpu() if torch.cuda.is_available() else {}),
        **{package: installed_version(package) for package in packages},
    }


def settings() -> dict[str, object]:
    """Return what else decides how fast this process computes: TF32, threads, the allocator's environment."""
    variables = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
    return {
        "TF32": torch.backends.cuda.matmul.allow_tf32,
        "threads": torch.get_num_threads(),
        **{name: os.environ[name] for name in variables if name in os.environ},
    }


def _gpu() -> dict[str, object]:
    """Return name and memory of the first GPU, CUDA's version, and if nvidia-smi says them driver and power limit."""
    found: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "gpu_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        found |= zip(("driver", "power_limit"), lines[0].split(", "), strict=True)
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def keep(name: str, result: dict[str, Any]) -> None:
    """Print the figures, and write them to benchmarks/results/NAME.json."""
    text = json.dumps(result, indent=1)
    print(text)
    (Path(__file__).parent / "results" / f"{name}.json").write_text(text + "\n")
