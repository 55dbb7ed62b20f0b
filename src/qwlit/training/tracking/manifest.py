"""manifest.json: what a reader needs to judge or repeat a run. Only listed facts, so that no secret gets into it."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import qwlit
from qwlit.core.devices import GIB
from qwlit.training.machine import Machine

PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "hydra-core", "tokenizers", "numpy")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of qwlit's own checkout and whether it has changes; None when installed from a wheel."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) not in folder.parents:
            return None
        # Fails where qwlit is installed from a wheel inside the checkout of another project.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def build_manifest(machine: Machine, **facts: Any) -> dict[str, Any]:
    """Return versions and device together with the run's own facts (seed, attention, fingerprints, parameters…)."""
    return {
        "qwlit": qwlit.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_state(Path(qwlit.__file__).parent),
        "device": machine.device_name,
        "accelerator": machine.accelerator,
        "device_memory_gib": round(machine.device_memory / GIB, 2),
        "devices": machine.devices,
        "num_nodes": machine.num_nodes,
        "strategy": machine.strategy,
        "precision": machine.precision,
        "activation_checkpointing": machine.activation_checkpointing,
        "num_threads": torch.get_num_threads(),
        **facts,
    }
