"""What the waiting of OpenMP's threads costs: tokens a second by setting, alone and beside one busy process.

    python -m benchmarks.threads [rounds=2] [case=8k]

Each run is a training by the command line in a process of its own (the arm `qwlit` of `benchmarks.train`); the settings
take turns, forwards and backwards. The busy process counts in a loop on one core.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks import train
from benchmarks.machine import describe, keep
from benchmarks.work import CASES, prepare, tokens_of_steps
from qwlit.core.threads import GNU

SETTINGS: dict[str, dict[str, str]] = {
    "unset": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"{GNU}={turns}": {GNU: str(turns)} for turns in (0, 1_000, 10_000, 100_000, 1_000_000)},
}


def tokens_per_second(folder: Path, setting: dict[str, str]) -> float:
    """Train once with this setting and no other."""
    os.environ.update(setting)
    try:
        ends = train.run("qwlit", folder, bounded=False)[0]["ends"]
    finally:
        for name in setting:
            del os.environ[name]
    return sum(tokens_of_steps(folder)[1 : len(ends)]) / float(ends[-1] - ends[0])


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    names = list(SETTINGS)
    for name in (names + names[::-1]) * rounds:
        found[name].append(tokens_per_second(folder, SETTINGS[name]))
        print(f"{name:<26} {found[name][-1]:>8,.0f} tokens/s", file=sys.stderr, flush=True)
    return found


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    case = next(case for case in CASES if case.name == options.get("case", "8k"))
    rounds = int(options.get("rounds", 2))
    with tempfile.TemporaryDirectory() as name:
        prepare(case, Path(name))
        alone = measure(Path(name), rounds)
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            beside = measure(Path(name), rounds)
        finally:
            busy.kill()
    result = {
        "command": f"python -m benchmarks.threads {' '.join(arguments)}".strip(),
        "machine": describe("torch"),
        "tokens_per_second": {
            name: {"alone": median(alone[name]), "beside one busy process": median(beside[name])} for name in SETTINGS
        },
    }
    keep("threads", result)


if __name__ == "__main__":
    main(sys.argv[1:])
