"""Trainers side by side on the same work: tokens a second and peak memory, as ratios of one run.

    pip install -c constraints.txt -e ".[bench]"
    pip install --no-deps litgpt==0.5.13    # asks for an older huggingface-hub than transformers 5 does
    python -m benchmarks.train ["cases=8k;152k, LoRA"] [arms=qwlit,raw,hf,trl] [rounds=2] [device=cuda]

The arms run one after the other in processes of their own, forwards and backwards (A B C C B A) as often as `rounds`
says; medians count. Each arm runs in the environment that its user gets. Cases already in the result file stay there.
An arm whose first ten losses, or whose first gradient's norm, are not the others' does other work, and its row says so.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.arms import ARMS, ON_CUDA_ONLY
from benchmarks.machine import command_line_environment, describe
from benchmarks.work import CASES, COMPARED, CUDA_CASES, Case, prepare, tokens_of_steps

RESULTS = Path(__file__).parent / "results"
OURS = ("qwlit", "qwlit_auto", "raw", "products")
TOLERANCE = 1e-4
# bfloat16 keeps 8 bits of each number; over ten steps of a hundred layers' roundings (assumption).
TOLERANCE_BF16 = 1e-2
# Of the first gradient's norm, because random weights have nearly the same loss on any tokens. Adapters that two
# libraries draw differ by 2 %, training on all tokens instead of 40 % by 38 % (measured with a small model on CPU).
TOLERANCE_NORM = 0.1


@dataclass
class Measured:
    """One arm on one case."""

    seconds_per_step: list[float]
    """A number a run: from the end of the warm-up to the end of the last step."""
    tokens_per_second: list[float]
    peak_gib: list[float]
    """The process's largest resident set; on CUDA the most that torch has allocated there."""
    losses: list[float]
    grad_norms: list[float] = field(default_factory=list)
    """Before clipping; none where an arm does not say them."""
    how: dict[str, Any] = field(default_factory=dict)
    """Precision, attention, threads and TF32 of the arm's process."""

    @property
    def speed(self) -> float:
        return median(self.tokens_per_second)

    @property
    def memory(self) -> float:
        return median(self.peak_gib)


def run(
    arm: str,
    folder: Path,
    *,
    module: str = "benchmarks.arms",
    bounded: bool = True,
    most_seconds: float | None = None,
) -> tuple[dict[str, Any], float]:
    """Run one arm in a process of its own; return what it recorded, and its peak memory, GiB.

    Args:
        bounded: qwlit's own arms let threads spin as long as its command line does; False: as the environment says.
        most_seconds: an arm that takes longer is killed; None: it may take any time.

    Raises:
        RuntimeError: the arm failed or was killed; the message has the end of its output.
    """
    out = folder / f"{arm}.json"
    log = (folder / f"{arm}.log").open("w")
    environment = command_line_environment() if bounded and arm in OURS else dict(os.environ)
    words = [sys.executable, "-m", module, arm, str(folder), str(out)]
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
    killer = threading.Timer(most_seconds or threading.TIMEOUT_MAX, process.kill)
    killer.daemon = True
    killer.start()
    _, status, usage = os.wait4(process.pid, 0)
    is_late = not killer.is_alive()
    killer.cancel()
    log.close()
    if status:
        late = f"\nit was killed after {most_seconds:g} s" if is_late else ""
        raise RuntimeError(f"{arm} failed:\n{(folder / f'{arm}.log').read_text()[-2000:]}{late}")
    record = json.loads(out.read_text())
    device_peak = record.get("device_peak")
    return record, usage.ru_maxrss / 2**20 if device_peak is None else device_peak / 2**30


def run_arm(case: Case, folder: Path, arm: str, tokens: list[int], *, most_seconds: float | None = None) -> Measured:
    """Run one arm once on a prepared case.

    Args:
        tokens: of every step.
        most_seconds: see `run`.
    """
    began = time.perf_counter()
    record, peak = run(arm, folder, most_seconds=most_seconds)
    ends = record["ends"]
    seconds = ends[-1] - ends[case.warmup - 1]
    speed = sum(tokens[case.warmup : len(ends)]) / seconds
    print(
        f"{case.name:<22} {arm:<18} {speed:>9,.0f} tokens/s {peak:6.2f} GiB  {time.perf_counter() - began:4.0f} s",
        flush=True,
    )
    kept = {key: record[key] for key in ("losses", "grad_norms", "how")}
    return Measured([seconds / (len(ends) - case.warmup)], [speed], [peak], **kept)


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
            once = run_arm(case, folder, arm, tokens)
            if seen := found.get(arm):
                seen.seconds_per_step += once.seconds_per_step
                seen.tokens_per_second += once.tokens_per_second
                seen.peak_gib += once.peak_gib
            else:
                found[arm] = once
    return found, median(products) if products else None


def disagreement(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference among the first losses."""
    return largest_difference(ours[:COMPARED], theirs[:COMPARED])


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference; infinite where a loss is not a number, which `max` would pass over."""
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return max(math.inf if math.isnan(difference) else difference for difference in differences)


def verdict(case: Case, theirs: Measured, ours: Measured) -> str:
    """Say how far an arm's losses agree with qwlit's, and whether its figures are those of other work."""
    off = disagreement(theirs.losses, ours.losses)
    tolerance = TOLERANCE_BF16 if case.on_cuda else TOLERANCE
    if theirs.grad_norms and ours.grad_norms:
        norm_off = abs(theirs.grad_norms[0] / ours.grad_norms[0] - 1)
        if not norm_off < TOLERANCE_NORM:
            return f"**invalid**: other work, the first gradient's norm off by {norm_off:.0%}"
    if off < tolerance:
        return f"agree to {off:.0e}"
    # An adapter starts from another draw in another library: its losses agree in the first step alone.
    if case.adapter and abs(theirs.losses[0] / ours.losses[0] - 1) < tolerance:
        return f"agree in the first step, then off by up to {off:.0e}"
    return f"**invalid**: other work, off by {off:.0e}"


def table(case: Case, found: dict[str, Measured]) -> list[str]:
    ours = found["qwlit"]
    lines = [
        "| arm | tokens/s | qwlit is faster by | peak GiB | qwlit's share | losses |",
        "|---|---|---|---|---|---|",
    ]
    for arm, seen in found.items():
        speed, losses = f"{ours.speed / seen.speed:.2f} ×", verdict(case, seen, ours)
        lines.append(
            f"| {arm} | {seen.speed:,.0f} | {speed} | {seen.memory:.2f} | {ours.memory / seen.memory:.2f} | {losses} |"
        )
    return [*lines, ""]


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    device = options.get("device", "cpu")
    cases = CUDA_CASES if device == "cuda" else CASES
    names = options.get("cases", ";".join(case.name for case in cases)).split(";")
    # LitGPT's loop is for CPU.
    usual = [arm for arm in ARMS if arm not in (("litgpt",) if device == "cuda" else (*ON_CUDA_ONLY, "qwlit_auto"))]
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
