"""Run one part in this process: `python -m benchmarks.gpu.run_part PART FILE DEVICE SIZE COMMAND`."""

import sys
from pathlib import Path

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.tables import Scale, Tables
from benchmarks.machine import describe, settings

PACKAGES = (
    *("torch", "triton", "transformers", "lightning", "peft", "bitsandbytes", "trl", "accelerate", "liger-kernel"),
    *("cut-cross-entropy", "flash-attn-3", "flash-attn", "flash-attn-4"),
)


def main(name: str, place: str, device: str, size: str, command: str) -> None:
    part = PARTS[name]
    facts = {"part": name, "command": command, "device": device, "size": size}
    tables = Tables(Path(place), facts | {"machine": describe(*PACKAGES), "settings": settings()})
    part.module.measure(tables, Scale(device, size == "toy"))
    tables.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
