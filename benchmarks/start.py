"""Where the time from the start of `train experiment=demo` to the end of its first step goes, in CPU and wall seconds.

    python -m benchmarks.start [repeats=7] [collect=true]

Each repeat is a fresh process with warm files and tokenized data. It imports the packages one after the other, each
with what it brings along, and then runs the command. The figures are medians. `collect=true` imports with garbage
collection, which `train` does not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from statistics import median
from typing import Any

IMPORTS = {
    "import torch": ["torch"],
    "import torch._dynamo, with sympy": ["torch._dynamo"],  # torch's optimizers import it
    "import transformers and the model": ["transformers.models.qwen3.modeling_qwen3"],
    "import matplotlib": ["matplotlib.pyplot"],  # torchmetrics imports it
    "import lightning, with torchmetrics": ["lightning.pytorch"],
    "import hydra and pydantic": ["hydra.compose", "pydantic.dataclasses"],
    "import qwlit": ["qwlit.commands.train", "qwlit.run.training_run"],
}
STAGES = {
    "compose the settings": "qwlit.commands.train:check_named_loggers",
    "plan, with data that are tokenized": "qwlit.run.training_run:load_model",
    "draw the weights": "qwlit.run.training_run:begin",
    "write config and manifest": "qwlit.run.training_run:fit",
    "build trainer and loader": "qwlit.training.module:CausalLMModule.training_step",
    "the first step": "qwlit.training.telemetry:Telemetry.on_train_batch_end",
}
"""What the command has done when it calls this function."""


def train(launched: float, *, collect: bool) -> None:
    """Train in this process up to the end of the first step, and write when each part was done."""
    from qwlit.core.imports import without_collection

    marks = {"": (0.0, launched)}

    def mark(part: str) -> None:
        marks[part] = sum(os.times()[:4]), time.time()
        if part == [*STAGES][-1]:
            Path("marks.json").write_text(json.dumps(marks))
            os._exit(0)

    def marking(part: str, function: Any) -> Any:
        return lambda *given, **named: (mark(part), function(*given, **named))[1]

    mark("start Python")
    with nullcontext() if collect else without_collection():
        for part, modules in IMPORTS.items():
            [import_module(module) for module in modules]
            mark(part)
    for part, name in STAGES.items():
        owner, _, function = name.replace(":", ".").rpartition(".")
        setattr(resolve_name(owner), function, marking(part, resolve_name(name)))
    sys.argv = ["qwlit", "train", "experiment=demo", "run.name=start", "run.overwrite=true"]
    import_module("qwlit.__main__").main()


def measure(repeats: int, arguments: list[str]) -> dict[str, list[float]]:
    """Return the CPU and wall seconds of each part; the first process only warms up."""
    found: list[list[tuple[float, float]]] = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + repeats):
            words = [sys.executable, "-m", "benchmarks.start", f"launched={time.time()}", *arguments]
            subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
            marks = json.loads(Path(folder, "marks.json").read_text())
            found.append([(end[0] - start[0], end[1] - start[1]) for start, end in pairwise(marks.values())])
    parts = zip(["start Python", *IMPORTS, *STAGES], zip(*found[1:], strict=True), strict=True)
    return {part: [median(kind) for kind in zip(*times, strict=True)] for part, times in parts}


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    if "launched" in options:
        train(float(options["launched"]), collect="collect" in options)
    machine = import_module("benchmarks.machine")
    seconds = measure(int(options.get("repeats", 7)), arguments)
    result = {
        "command": f"python -m benchmarks.start {' '.join(arguments)}".strip(),
        "machine": machine.describe("torch", "transformers", "lightning", "matplotlib"),
        "seconds": {part: {"cpu": round(cpu, 2), "wall": round(wall, 2)} for part, (cpu, wall) in seconds.items()},
    }
    machine.keep("start_collecting" if "collect" in options else "start", result)
    for part, (cpu, wall) in [*seconds.items(), ("in all", map(sum, zip(*seconds.values(), strict=True)))]:
        print(f"{part:<36}{cpu:>6.2f}{wall:>6.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
