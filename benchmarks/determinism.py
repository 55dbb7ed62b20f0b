"""How far two runs with the same seed drift apart: attention, precision and learning rate of the third document's case.

    python -m benchmarks.determinism [steps=40] [hidden=256] [layers=4]

Trains a small Qwen2 on the demo's conversations, in fresh processes: twice with determinism=fast, twice with
reproducible, and with fast on two threads instead of one, the control that is not zero. Writes how far the loss of
every step deviates into results/determinism.json and draws docs/determinism.svg; with `draw` alone it draws again.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import qwlit
from benchmarks.machine import describe
from qwlit.report.drawing import PALETTE, figure

RESULTS = Path(__file__).parent / "results" / "determinism.json"
PICTURE = Path(__file__).parents[1] / "docs" / "determinism.svg"
CASES = [*product(("sdpa", "eager"), ("32-true", "bf16-mixed"), ("1e-5", "3e-4"))]
"""Attention, precision, learning rate."""
ARMS = {
    "fast": ("fast", 1, "fast", 1),
    "reproducible": ("reproducible", 1, "reproducible", 1),
    "fast, 2 threads": ("fast", 1, "fast", 2),
}
"""Of each comparison mode and threads, twice."""
SMALLEST = 1e-9
"""Where the picture draws what is equal to the bit."""


def losses(folder: Path, name: str) -> list[list[float]]:
    """Return the losses of every case that a process has trained."""
    runs = [qwlit.Run(folder / f"{name}-{number}") for number in range(len(CASES))]
    return [[float(loss) for loss in run.metrics()["train/loss"].dropna()] for run in runs]


def train_cases(mode: str, place: Path, options: dict[str, str]) -> None:
    """Train all cases in this process."""
    hidden, steps = int(options.get("hidden", 256)), options.get("steps", "40")
    rows = Path(qwlit.__file__).parent / "resources/demo/val.jsonl"
    words = ["model=demo", "model.architecture.model_type=qwen2", f"model.architecture.hidden_size={hidden}"]
    words += [f"model.architecture.intermediate_size={3 * hidden}", "recipe=full_sft", "hardware=cpu", "guard=off"]
    words += [f"model.architecture.num_hidden_layers={options.get('layers', '4')}", f"data.path={rows}", "seed=1"]
    words += [f"train.max_steps={steps}", "train.max_epochs=null", "train.global_batch_size=8", "logging.every_steps=1"]
    words += ["data.val_path=null", "data.val_fraction=0", "data.exact_match=0", "validation.each_epoch=false"]
    words += [
        "checkpoint.each_epoch=false",
        "preflight.allow=[full_lr,full_lr_large,lr_range]",
        f"run.root={place.parent}",
    ]
    for number, (attention, precision, lr) in enumerate(CASES):
        case = [f"model.attention={attention}", f"hardware.precision={precision}", f"optim.lr={lr}"]
        qwlit.train(*words, *case, f"determinism={mode}", f"run.name={place.name}-{number}")


def measure(arguments: list[str], folder: Path) -> dict[str, list[list[float]]]:
    """Return the deviations of every arm: of every case, of every step."""
    arms = ARMS.values()
    wanted = {(first, a, 0) for first, a, _, _ in arms} | {(second, b, 1) for _, _, second, b in arms}
    processes = []
    for mode, threads, number in sorted(wanted):
        own = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "10000"}
        place = str(folder / f"{mode}-{threads}-{number}")
        words = [sys.executable, "-m", "benchmarks.determinism", "train", mode, place, *arguments]
        processes.append(subprocess.Popen(words, env=os.environ | own, stdout=sys.stderr))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a training failed")
    return {
        arm: [
            [abs(x - y) for x, y in zip(one, other, strict=True)]
            for one, other in zip(losses(folder, f"{first}-{a}-0"), losses(folder, f"{second}-{b}-1"), strict=True)
        ]
        for arm, (first, a, second, b) in ARMS.items()
    }


def draw(deviations: dict[str, list[list[float]]]) -> None:
    """Draw a panel for each precision and learning rate: deviation over steps, on a log axis."""
    kinds = [*product(("32-true", "bf16-mixed"), ("1e-5", "3e-4"))]
    with figure("determinism", 9.0, 5.0) as picture:
        panels = picture.subplots(2, 2, sharex=True, sharey=True)
        for axes, (precision, lr) in zip(panels.flat, kinds, strict=True):
            for number, (attention, *kind) in enumerate(CASES):
                if kind != [precision, lr]:
                    continue
                for arm, colour in zip(deviations, PALETTE, strict=False):
                    values = [max(value, SMALLEST) for value in deviations[arm][number]]
                    style = {"color": colour, "linestyle": "-" if attention == "sdpa" else "--", "linewidth": 1.2}
                    axes.plot(range(1, len(values) + 1), values, label=f"{arm}, {attention}", **style)
            axes.set(title=f"{precision}, lr {lr}", yscale="log", ylim=(SMALLEST / 2, 1))
            axes.set_yticks([SMALLEST, 1e-6, 1e-3, 1], ["0", "1e-6", "1e-3", "1"])
        for axes in panels[-1]:
            axes.set(xlabel="step")
        for axes in panels[:, 0]:
            axes.set(ylabel="deviation of the loss")
        panels[0, 0].legend()
        picture.savefig(PICTURE, metadata={"Date": None})


def table(deviations: dict[str, list[list[float]]]) -> str:
    """Return the largest deviations as a table in Markdown."""
    lines = [f"| attention | precision | lr | {' | '.join(deviations)} |", "|---|---|---|" + "---|" * len(deviations)]
    for number, case in enumerate(CASES):
        lines.append(
            f"| {' | '.join(case)} | {' | '.join(f'{max(deviations[arm][number]):.2g}' for arm in deviations)} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["train"]:
        train_cases(arguments[1], Path(arguments[2]), dict(word.split("=", 1) for word in arguments[3:]))
        return
    if arguments[:1] == ["draw"]:
        result = json.loads(RESULTS.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            deviations = measure(arguments, Path(folder))
        result = {
            "command": f"python -m benchmarks.determinism {' '.join(arguments)}".strip(),
            "machine": describe("torch", "lightning", "transformers"),
            "cases": ["attention, precision, learning rate", *(" ".join(case) for case in CASES)],
            "deviations": deviations,
        }
        RESULTS.write_text(json.dumps(result, indent=None) + "\n")
    draw(result["deviations"])
    print(table(result["deviations"]))


if __name__ == "__main__":
    main(sys.argv[1:])
