"""Check that all ranks have the same code, packages, settings and data, before the first step."""

import hashlib
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

import qwlit
from qwlit.core.errors import ConfigError

PACKAGES = ("torch", "lightning", "transformers", "peft")


def code_fingerprint() -> str:
    """Hash qwlit's own source files."""
    root = Path(qwlit.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class RankConsistency(Callback):
    """Compares the facts of all ranks once, before the first step."""

    def __init__(self, settings: str, data: str) -> None:
        """`settings`: those that decide what is computed, as text. `data`: the fingerprint of the tokenized data."""
        self._facts = {
            "qwlit's code": code_fingerprint(),
            "settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
            "data": data,
            **{name: metadata.version(name) for name in PACKAGES},
        }

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        # A gloo group, so that the objects do not pass through the GPU. All ranks call `setup`, also one that differs.
        group = dist.new_group(backend="gloo")
        everywhere: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(everywhere, (socket.gethostname(), self._facts), group=group)
        (_, first), *others = everywhere
        for rank, (host, facts) in enumerate(others, start=1):
            for name, value in facts.items():
                if value != first[name]:
                    raise ConfigError(
                        f"rank {rank} ({host}) differs from rank 0 in {name}: {value}, on rank 0 {first[name]};"
                        " every node needs the same installation and the same files"
                    )
