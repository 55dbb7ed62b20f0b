"""Whole runs under the guard: healthy ones, learning rates that are too high, and a fine-tuning that turns to NaN.

    python -m benchmarks.guard_runs [parts=healthy,rates,story] [seeds=3] [folder=DIR]

- healthy: recipes x data x seeds; the guard must not go back and skip almost nothing.
- rates: learning rates from 3 to 1e10 times a good one, from random and from pretrained weights, clipped and not; none
  may end "done" above its start. The same with guard=off shows how many steps the first alarm comes before the smoothed
  loss shows the trouble. It prints the table of docs/guard.md.
- story: a small Qwen2, trained before, is fully fine-tuned at N times the largest stable rate of its pilot; once
  with the guard and once with guard=off. It draws docs/guard.png.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.machine import describe
from qwlit.training.resilience.divergence import DivergenceRules, StepNumbers

RESULTS = Path(__file__).parent / "results"
DEMO = Path(__file__).parents[1] / "src" / "qwlit" / "resources" / "demo"
SMALL = [
    *("model=demo", "model.architecture.num_hidden_layers=2", "model.architecture.hidden_size=64"),
    *("model.architecture.intermediate_size=96", "hardware=cpu", "logging.every_steps=1", "data.exact_match=0"),
    *("validation.each_epoch=false", "train.max_epochs=null", "preflight.allow=[full_lr,full_lr_large,lr_range]"),
]
GOOD_LR = 3e-3
GOOD_TUNING_LR = 1e-4
STEPS = 150
STORY_STEPS = 400


def train(name: str, *overrides: str) -> dict[str, Any]:
    """Train in a process of its own; return what the folder says afterwards."""
    done = subprocess.run(
        [sys.executable, "-m", "qwlit", "train", f"run.name={name}", *overrides],
        capture_output=True,
        text=True,
        check=False,
    )
    run = Path("runs") / name
    if not (run / "summary.json").exists():
        raise SystemExit(done.stderr)
    summary = json.loads((run / "summary.json").read_text())
    losses = [(r["step"], r["train/loss"]) for r in read(run / "metrics.jsonl") if r.get("train/loss") is not None]
    events = [row for name in ("rolled_back", "events") for row in read(run / f"{name}.jsonl") if "event" in row]
    alarms = sorted((e for e in events if e["event"] in ("rollback", "stopped")), key=lambda event: event["time"])
    # A rollback is recorded at the step to which the run goes.
    first_alarm = [(a["decision"]["from_step"] if "decision" in a else a["step"], a["reason"]) for a in alarms[:1]]
    last_line = (done.stderr.strip().splitlines() or [""])[-1]
    return {
        "name": name,
        "code": done.returncode,
        "status": summary["status"],
        "steps": summary["steps"],
        "skipped_steps": summary["skipped_steps"],
        "rollbacks": [event["decision"] for event in alarms if event["event"] == "rollback"],
        "alarm": first_alarm[0] if first_alarm else None,
        "first_loss": mean(loss for _, loss in losses[:5]) if losses else None,
        "last_loss": mean(loss for _, loss in losses[-5:]) if losses else None,
        "losses": losses,
        "said": last_line.replace(f"{Path(__file__).parents[1]}/", ""),
    }


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def healthy(seeds: int) -> Iterator[dict[str, Any]]:
    text = Path("text.jsonl")
    rows = [json.loads(line) for line in (DEMO / "train.jsonl").read_text().splitlines()]
    documents = [{"text": "\n".join(str(turn["content"]) for turn in row["messages"])} for row in rows[:3000]]
    text.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))
    data = {"chat": "data=demo", "text": f"data.path={text}"}
    pretrained = pretrained_words()
    recipes = {
        "pretrain": [*SMALL, "recipe=pretrain", f"optim.lr={GOOD_LR}"],
        "full_sft": [*pretrained, "recipe=full_sft", f"optim.lr={GOOD_TUNING_LR}"],
        "lora": [*pretrained, "recipe=lora", "optim.lr=1e-3"],
        "freeze": [*pretrained, "recipe=freeze", "optim.lr=1e-4"],
    }
    for seed in range(seeds):
        for recipe, words in recipes.items():
            for kind, override in data.items():
                yield train(f"{recipe}-{kind}-{seed}", *words, override, f"train.max_steps={2 * STEPS}", f"seed={seed}")


def pretrained_words() -> list[str]:
    """Train from random weights; return the words of `SMALL` for a run that begins with the result."""
    train("base", *SMALL, "data=demo", "recipe=pretrain", f"optim.lr={GOOD_LR}", f"train.max_steps={2 * STEPS}")
    return [*(word for word in SMALL if not word.startswith("model")), "model.path=runs/base/export"]


def rates(seeds: int) -> Iterator[dict[str, Any]]:
    starts = {
        "random": (GOOD_LR, [*SMALL, "recipe=pretrain"]),
        "pretrained": (GOOD_TUNING_LR, [*pretrained_words(), "recipe=full_sft"]),
    }
    choices = product(starts.items(), (3, 10, 30, 100, 300, 1e3, 1e5, 1e10), ("1.0", "null"), range(seeds))
    for (start, (good_lr, words)), factor, clip, seed in choices:
        lr = [f"optim.lr={good_lr * factor:g}", f"train.max_grad_norm={clip}", "scheduler.warmup_steps=10"]
        length = [f"train.max_steps={STEPS}", "checkpoint.every_steps=15", "dropout=none", f"seed={seed}"]
        name, whole = f"rate-{start}-{factor:g}-{clip}-{seed}", [*words, "data=demo", *lr, *length]
        run = train(name, *whole)
        off = train(f"{name}-off", *whole, "guard=off") if run["alarm"] else run
        yield {"start": start, "factor": factor, "clip": clip} | run | {"loss_shows": loss_shows(off["losses"])}


def loss_shows(losses: list[tuple[int, float]]) -> int | None:
    """Return the first step at which the smoothed loss is above its best by the margin of the rule, or not finite."""
    rules = DivergenceRules(max_nonfinite_steps=3)
    for index, (step, loss) in enumerate(losses):
        if step > index + 1:
            return index + 1  # `losses` has the finite ones
        rules.update(StepNumbers(step, loss, 1.0, skipped=False, nonfinite=False, spike=False))
        if rules.risen_steps:
            return step
    return None if len(losses) == STEPS else len(losses) + 1


def print_leads(runs: list[dict[str, Any]]) -> None:
    print("| begins with | rate | clipped | first alarm | because | smoothed loss shows it | steps before | end |")
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        step, reason = run["alarm"] or ("–", "–")
        shows = run["loss_shows"] or "never"
        lead = shows - step if run["alarm"] and run["loss_shows"] else "–"
        clip = "no" if run["clip"] == "null" else "yes"
        cells = (run["start"], f"{run['factor']:g} ×", clip, step, reason, shows, lead, run["status"])
        print("|", " | ".join(map(str, cells)), "|")


def story(seeds: int) -> Iterator[dict[str, Any]]:
    """Find the factor at which guard=off is lost, then train with the guard at that factor."""
    qwen2 = [*SMALL, "model.architecture.model_type=qwen2"]
    yield train("story-base", *qwen2, "data=demo", "recipe=pretrain", f"optim.lr={GOOD_LR}", "train.max_steps=500")
    words = [
        *(word for word in SMALL if not word.startswith("model")),
        "model.path=runs/story-base/export",
        "data=demo",
    ]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "qwlit",
            "sweep",
            "action=pilot",
            *words,
            "recipe=full_sft",
            "optim.lr=3e-3",
            "run.name=story",
            "train.max_steps=200",
        ],
        check=True,
    )
    pilot = json.loads(Path("runs/story-pilot/pilot.json").read_text())
    stable = max(run["lr"] for run in pilot["runs"] if run["reason"] is None)
    long = [*words, "recipe=full_sft", f"train.max_steps={STORY_STEPS}", "checkpoint.every_steps=20"]
    for factor in (3, 10, 30, 100, 300):
        off = train(f"story-off-{factor}", *long, f"optim.lr={factor * stable:g}", "guard=off")
        yield {"factor": factor, "stable_lr": stable} | off
        if off["status"] != "done" or off["last_loss"] is None or off["last_loss"] > off["first_loss"]:
            break
    for seed in range(seeds):
        for guard in ("default", "off"):
            run = train(
                f"story-{guard}-{factor}-{seed}",
                *long,
                f"optim.lr={factor * stable:g}",
                f"guard={guard}",
                f"seed={seed}",
            )
            yield {"factor": factor, "stable_lr": stable, "guard": guard} | run


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    """Draw the losses of the story with and without the guard, and where the runs went back."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    colours = {"default": "C0", "off": "C3"}
    for run in runs:
        if "guard" not in run or not run["losses"]:
            continue
        steps, losses = zip(*run["losses"], strict=True)
        label = f"guard={run['guard']}" if run["name"].endswith("-0") else None
        axes.plot(steps, losses, color=colours[run["guard"]], linewidth=1, alpha=0.8, label=label)
        for back in run["rollbacks"]:
            axes.axvline(back["to_step"], color="C0", linestyle=":", linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss, nats per supervised token", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main(arguments: list[str]) -> None:
    import contextlib

    options = dict(word.split("=", 1) for word in arguments)
    parts = options.get("parts", "healthy,rates,story").split(",")
    seeds = int(options.get("seeds", 3))
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.guard_runs {' '.join(arguments)}".strip(),
        "machine": describe("torch", "lightning", "transformers"),
    }
    with tempfile.TemporaryDirectory(dir=options.get("folder")) as folder, contextlib.chdir(folder):
        for part in parts:
            runs = []
            for run in {"healthy": healthy, "rates": rates, "story": story}[part](seeds):
                shown = {key: value for key, value in run.items() if key not in ("losses", "rollbacks")}
                print(json.dumps(shown | {"rollbacks": len(run["rollbacks"])}), flush=True)
                runs.append(run)
            if part == "rates":
                print_leads(runs)
            if part == "story":
                draw(runs, RESULTS.parents[1] / "docs" / "guard.png")
            result[part] = [{key: value for key, value in run.items() if key != "losses"} for run in runs]
    file = RESULTS / "guard_runs.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(earlier | result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
