"""Trainers side by side on the same work: tokens a second and peak memory, as ratios of one run.

    pip install -c constraints.txt -e ".[bench]"
    pip install --no-deps litgpt==0.5.13    # asks for an older huggingface-hub than transformers 5 does
    python -m benchmarks.train ["cases=8k;152k, LoRA"] [arms=qwlit,raw,hf,trl] [rounds=2] [device=cuda]

The arms run one after the other in processes of their own, forwards and backwards (A B C C B A) as often as `rounds`
says; medians count. Each arm runs in the environment that its user gets. Cases already in the result file stay there.
An arm whose first ten losses are not the others' does other work, and its row says so.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.arms import ARMS
from benchmarks.machine import describe
from benchmarks.work import CASES, CUDA_CASES, Case, prepare, tokens_of_steps
from qwlit.core.threads import bound_spinning

RESULTS = Path(__file__).parent / "results"
OURS = ("qwlit", "raw", "products")
TOLERANCE, COMPARED = 1e-4, 10
# bfloat16 keeps 8 bits of each number; over ten steps of a hundred layers' roundings (assumption).
TOLERANCE_BF16 = 1e-2


@dataclass
class Measured:
    """One arm on one case."""

    seconds_per_step: list[float]
    """A number a run: from the end of the first step to the end of the last."""
    tokens_per_second: list[float]
    peak_gib: list[float]
    """The process's largest resident set; on CUDA the most that torch has allocated there."""
    losses: list[float]

    @property
    def speed(self) -> float:
        return median(self.tokens_per_second)

    @property
    def memory(self) -> float:
        return median(self.peak_gib)


def run(
    arm: str, folder: Path, *, module: str = "benchmarks.arms", bounded: bool = True
) -> tuple[dict[str, Any], float]:
    """Run one arm in a process of its own; return what it recorded, and its peak memory, GiB.

    Args:
        bounded: qwlit's own arms let threads spin as long as its command line does; False: as the environment says.
    """
    out = folder / f"{arm}.json"
    log = (folder / f"{arm}.log").open("w")
    environment = dict(os.environ)
    if bounded and arm in OURS:
        bound_spinning(environment)
    words = [sys.executable, "-m", module, arm, str(folder), str(out)]
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    log.close()
    if status:
        raise RuntimeError(f"{arm} failed:\n{(folder / f'{arm}.log').read_text()[-2000:]}")
    record = json.loads(out.read_text())
    device_peak = record.get("device_peak")
    return record, usage.ru_maxrss / 2**20 if device_peak is None else device_peak / 2**30


def measure(case: Case, arms: list[str], rounds: int) -> tuple[dict[str, Measured], float | None]:
    """Return what the arms measured, and the seconds per step of the matrix products alone (on CPU)."""
    found: dict[str, Measured] = {}
    products: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(case, folder)
        tokens = tokens_of_steps(folder)
        for number, arm in enumerate((arms + arms[::-1]) * rounds):
            if number % len(arms) == 0 and not case.on_cuda:
                products.append(run("products", folder, module="benchmarks.products")[0]["seconds_per_step"])
            began = time.perf_counter()
            record, peak = run(arm, folder)
            ends = record["ends"]
            seconds = ends[-1] - ends[0]
            seen = found.setdefault(arm, Measured([], [], [], record["losses"]))
            seen.seconds_per_step.append(seconds / (len(ends) - 1))
            seen.tokens_per_second.append(sum(tokens[1 : len(ends)]) / seconds)
            seen.peak_gib.append(peak)
            print(
                f"{case.name:<22} {arm:<18} {seen.tokens_per_second[-1]:>9,.0f} tokens/s {peak:6.2f} GiB"
                f"  {time.perf_counter() - began:4.0f} s",
                flush=True,
            )
    return found, median(products) if products else None


def disagreement(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference among the first losses."""
    pairs = zip(ours[:COMPARED], theirs[:COMPARED], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def table(case: Case, found: dict[str, Measured]) -> list[str]:
    ours = found["qwlit"]
    lines = [
        "| arm | tokens/s | qwlit is faster by | peak GiB | qwlit's share | losses |",
        "|---|---|---|---|---|---|",
    ]
    for arm, seen in found.items():
        off = disagreement(seen.losses, ours.losses)
        # An adapter starts from another draw in another library: its losses agree in the first step alone.
        tolerance = TOLERANCE_BF16 if case.on_cuda else TOLERANCE
        if off < tolerance:
            verdict = f"agree to {off:.0e}"
        elif case.adapter and abs(seen.losses[0] / ours.losses[0] - 1) < tolerance:
            verdict = f"agree in the first step, then off by up to {off:.0e}"
        else:
            verdict = f"**invalid**: other work, off by {off:.0e}"
        speed = f"{ours.speed / seen.speed:.2f} ×"
        lines.append(
            f"| {arm} | {seen.speed:,.0f} | {speed} | {seen.memory:.2f} | {ours.memory / seen.memory:.2f} | {verdict} |"
        )
    return [*lines, ""]


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    device = options.get("device", "cpu")
    cases = CUDA_CASES if device == "cuda" else CASES
    names = options.get("cases", ";".join(case.name for case in cases)).split(";")
    # Liger's kernels are Triton's; LitGPT's loop above is for CPU.
    usual = [arm for arm in ARMS if arm != ("litgpt" if device == "cuda" else "trl_liger")]
    asked = options.get("arms", ",".join(usual)).split(",")
    place = RESULTS / f"{options.get('out', f'train_{device}')}.json"
    results = json.loads(place.read_text())["results"] if place.exists() else {}
    machine = describe("torch", "transformers", "lightning", "peft", "trl", "litgpt")
    for case in (case for case in cases if case.name in names):
        arms = [arm for arm in asked if not (case.adapter and arm == "litgpt")]
        found, products = measure(case, arms, int(options.get("rounds", "1")))
        results[case.name] = {
            "machine": machine,
            "command": shlex.join(["python", "-m", "benchmarks.train", *arguments]),
            "case": asdict(case),
            "arms": {arm: asdict(seen) for arm, seen in found.items()},
            "products_seconds_per_step": products,
        }
        place.write_text(json.dumps({"results": results}, indent=1) + "\n")
        place.with_suffix(".md").write_text(page(results))
    print(page(results))


def page(results: dict[str, Any]) -> str:
    lines = ["# Trainers side by side", ""]
    lines += [f"**{arm}**: {' '.join((run.__doc__ or '').split())}  " for arm, run in ARMS.items()] + [""]
    for case in (*CASES, *CUDA_CASES):
        if case.name in results:
            result = results[case.name]
            arms = {arm: Measured(**seen) for arm, seen in result["arms"].items()}
            machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
            lines += [f"### {case.name}", "", f"`{result['command']}`", "", machine, "", *table(case, arms)]
            if products := result.get("products_seconds_per_step"):
                share = products / median(arms["qwlit"].seconds_per_step)
                lines += [f"The matrix products of a step alone, back to back, take {share:.0%} of qwlit's step.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
