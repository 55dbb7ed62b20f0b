"""Measure qwlit on a GPU, in parts of at most nine minutes.

    python -m benchmarks.gpu list                    # the parts, in their order, with their minutes
    python -m benchmarks.gpu                         # all of them, about 28 minutes on one H100
    python -m benchmarks.gpu parts=head,memory       # these, again
    python -m benchmarks.gpu size=toy device=cpu     # seconds of work, to see that everything runs
    python -m benchmarks.gpu wheels                  # what to install where there is no network
    python -m benchmarks.gpu render                  # write the tables into docs/performance.md

More options: out=FOLDER instead of benchmarks/results/gpu, minutes=9 as the limit of a part.

Each part runs in a process of its own and writes FOLDER/PART.json after every row, with command, versions and device.
A part that takes too long is cut off and keeps its rows; one that fails leaves the others alone. Weights are random, of
the published shapes, so nothing is downloaded.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.gpu.page import PAGE, RESULTS, read, render, show, with_section
from benchmarks.gpu.parts import LIMIT_MINUTES, PARTS
from benchmarks.gpu.tables import write

WHEELS = Path(__file__).with_name("requirements.txt")
OPTIONS = {"parts", "size", "device", "out", "minutes"}


def run_limited(words: list[str], seconds: float) -> str:
    """Run a command and all that it starts, for at most so long; return how it ended: done, cut off or failed."""
    # Its processes are a group of their own, so that all of them end with it.
    process = subprocess.Popen(words, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds / 60:g} minutes"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "done" if code == 0 else f"failed with code {code}"


def run_part(name: str, folder: Path, *, device: str, size: str, minutes: float, command: str) -> str:
    """Run a part, complete its file, and return how it ended."""
    place = folder / f"{name}.json"
    facts = {"part": name, "command": command, "device": device, "size": size, "machine": {}, "settings": {}}
    write(place, facts | {"status": "running", "seconds": 0.0, "rows": []})
    words = [sys.executable, "-m", "benchmarks.gpu.run_part", name, str(place), device, size, command]
    status = run_limited(words, minutes * 60)
    write(place, json.loads(place.read_text()) | {"status": status})
    return status


def main(arguments: list[str]) -> int:
    if arguments == ["list"]:
        for part in PARTS.values():
            print(f"{part.name:<12} {part.minutes:>4} min  {(part.module.__doc__ or '').splitlines()[0]}")
        return 0
    if arguments == ["wheels"]:
        print(WHEELS.read_text(), end="")
        return 0
    if arguments == ["render"]:
        PAGE.write_text(with_section(PAGE.read_text(), render(RESULTS)))
        return 0
    options = _options(arguments)
    size, device = options.get("size", "full"), options.get("device", "cuda")
    if size == "full" and device == "cpu":
        raise SystemExit("size=full needs a GPU; add size=toy")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; size=toy device=cpu shows that the parts run")
    default = tempfile.mkdtemp(prefix="qwlit-gpu-toy-") if size == "toy" else str(RESULTS)
    folder = Path(options.get("out", default))
    folder.mkdir(parents=True, exist_ok=True)
    # One GPU of the machine: TRL refuses to train on several from one process.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    command = shlex.join(["python", "-m", "benchmarks.gpu", *arguments])
    ends = {}
    for name in options.get("parts", ",".join(PARTS)).split(","):
        print(f"== {name}, about {PARTS[name].minutes if size == 'full' else 0.1} minutes", flush=True)
        minutes = float(options.get("minutes", LIMIT_MINUTES))
        ends[name] = run_part(name, folder, device=device, size=size, minutes=minutes, command=command)
    if folder == RESULTS:
        PAGE.write_text(with_section(PAGE.read_text(), render(RESULTS)))
    found = read(folder)
    print(*(show(name, found[name]) for name in ends), sep="\n\n")
    print(f"{folder}: " + ", ".join(f"{name} {end}" for name, end in ends.items()))
    return int(any(end.startswith("failed") for end in ends.values()))


def _options(arguments: list[str]) -> dict[str, str]:
    options = dict(word.partition("=")[::2] for word in arguments)
    names = [name for name in options.get("parts", "check").split(",") if name not in PARTS]
    if options.keys() - OPTIONS or names:
        wrong = ", ".join([*sorted(options.keys() - OPTIONS), *names])
        raise SystemExit(f"{wrong}: the options are {', '.join(sorted(OPTIONS))}, the parts {', '.join(PARTS)}")
    for key, values in {"size": ("full", "toy"), "device": ("cuda", "cpu")}.items():
        if options.get(key, values[0]) not in values:
            raise SystemExit(f"{key}={options[key]}: {' or '.join(values)}")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
