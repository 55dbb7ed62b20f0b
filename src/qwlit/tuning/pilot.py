"""The pilot: three short runs around a learning rate, before the long one.

A learning rate that diverges after hours often shows it in a few hundred steps at three times its value.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from qwlit.config.compose import compose
from qwlit.core.errors import ConfigError, GuardStop
from qwlit.core.files import read_json_lines, resolve_path, write_json_atomic
from qwlit.training.resilience.divergence import RISE_FLOOR, RISE_SHARE, SMOOTH_STEPS
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.tuning.short_run import LOSSES_ONLY, delete_weights, failed, prepare_folder, run_shortly
from qwlit.tuning.space import keys_of
from qwlit.tuning.trial import without_rollbacks

FACTORS = (1 / 3, 1.0, 3.0)
STEPS, FEWEST_STEPS = 200, 20
WARMUP_RATIO = 0.1
MAX_SKIPPED_SHARE = 0.01
"""A run that skips more steps is not stable."""
OWN_NAMES = ("lr-", "pilot.")
"""How the names in a pilot's folder begin."""
SAMPLES_READ = 2
"""The slice of the data has so many times the samples that the steps train on, so that a shuffle has a choice."""


@dataclass(frozen=True)
class ShortRun:
    """One of the runs."""

    lr: float
    losses: list[float]
    """Of each step that was not skipped as not finite."""
    skipped_steps: int
    reason: str | None
    """Why the learning rate is not stable; None if it is."""

    @property
    def is_stable(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Pilot:
    """The runs, and what follows from them."""

    runs: list[ShortRun]

    @property
    def highest_stable(self) -> float | None:
        """The highest learning rate up to which every one is stable; None if the lowest is not."""
        stable = None
        for run in self.runs:
            if not run.is_stable:
                break
            stable = run.lr
        return stable

    @property
    def suggestion(self) -> float | None:
        """The learning rate for the long run: a third of the highest stable one."""
        return None if self.highest_stable is None else float(f"{self.highest_stable / 3:.2g}")

    @property
    def overrides(self) -> list[str]:
        """Overrides for the long run; empty if no learning rate was stable."""
        if self.suggestion is None:
            return []
        return [f"optim.lr={self.suggestion:g}", f"scheduler.warmup_ratio={WARMUP_RATIO:g}"]

    def describe(self) -> str:
        if self.highest_stable is None:
            return f"not even {self.runs[0].lr:.2g} is stable: try again with optim.lr={self.runs[0].lr / 10:.1g}"
        above = next((run for run in self.runs if not run.is_stable), None)
        edge = f"{above.lr:.2g} is not ({above.reason})" if above else "no higher one was tried"
        return (
            f"{self.highest_stable:.2g} is stable for these steps and {edge}; a long run diverges at lower learning"
            " rates than a short one, so take a third"
        )


def run_pilot(overrides: list[str], screen: Console) -> tuple[Pilot, RunFolder]:
    """Train three short runs, at a third of optim.lr, at optim.lr and at three times it.

    Args:
        overrides: of `train`. `train.max_steps` is the number of steps, 200 if it is not typed.

    Raises:
        ConfigError: the overrides do not fit a pilot.
        QwlitError: a run could not begin.
    """
    config = compose(overrides).config
    folder = RunFolder(resolve_path(config.run.root) / f"{config.run.name}-pilot")
    typed = keys_of(overrides)
    if typed & {"scheduler.name", "scheduler.warmup_steps", "scheduler.warmup_ratio", "scheduler"}:
        raise ConfigError("the pilot has a schedule of its own: warm-up, then constant; leave scheduler.* out")
    steps = config.train.max_steps if "train.max_steps" in typed and config.train.max_steps else STEPS
    if steps < FEWEST_STEPS:
        raise ConfigError(f"train.max_steps={steps}: a pilot needs at least {FEWEST_STEPS} steps")
    prepare_folder(folder, OWN_NAMES, "pilot")
    samples = SAMPLES_READ * steps * config.train.global_batch_size
    short = [
        *without_rollbacks(overrides),
        # A run of a high learning rate is what the pilot is for.
        *([] if "preflight.allow" in typed else ["preflight.allow=[full_lr,full_lr_large,lr_range]"]),
        *([] if "data.max_samples" in typed else [f"data.max_samples={samples}"]),
        f"train.max_steps={steps}",
        "scheduler.name=constant",
        f"scheduler.warmup_steps={round(WARMUP_RATIO * steps)}",
        *LOSSES_ONLY,
        f"run.root={folder.path}",
    ]
    pilot = Pilot([_train(short, config.optim.lr * factor, folder.path, steps, screen) for factor in FACTORS])
    write_json_atomic(
        folder.path / "pilot.json",
        {"suggestion": pilot.suggestion, "overrides": pilot.overrides, "runs": [asdict(run) for run in pilot.runs]},
    )
    draw(pilot, folder.path / "pilot.png")
    return pilot, folder


def _train(overrides: list[str], lr: float, folder: Path, steps: int, screen: Console) -> ShortRun:
    """Train at this learning rate and judge the run.

    Raises:
        QwlitError: it could not begin, or ended for another reason than its learning rate.
    """
    run = RunFolder(folder / f"lr-{lr:.2g}")
    log = folder / f"lr-{lr:.2g}.log"
    own = [f"optim.lr={lr:.6g}", f"run.name={run.path.name}"]
    code = run_shortly([*overrides, *own], run, log, steps, f"pilot at {lr:.2g}", screen)
    if code not in (0, GuardStop.exit_code):
        raise failed(f"the pilot at optim.lr={lr:.2g} did not end", code, log)
    records = read_json_lines(run.path / "metrics.jsonl")
    losses = [record["train/loss"] for record in records if record.get("train/loss") is not None]
    skipped = int(run.read_summary().get("skipped_steps") or 0)
    delete_weights(run)
    stops = [event for event in read_json_lines(run.path / "events.jsonl") if event.get("event") == "stopped"]
    reason = str(stops[-1].get("reason")) if stops else _find_instability(losses, skipped, steps)
    return ShortRun(lr, losses, skipped, reason)


def _find_instability(losses: list[float], skipped: int, steps: int) -> str | None:
    """Return why a run that came to its end is not stable; None if it is."""
    if skipped > MAX_SKIPPED_SHARE * steps:
        return f"{skipped} of {steps} steps were skipped"
    # The guard waits for a dozen steps; the pilot need not.
    smoothed = [median(losses[end - SMOOTH_STEPS : end]) for end in range(SMOOTH_STEPS, len(losses) + 1)]
    if smoothed and smoothed[-1] > min(smoothed) + max(RISE_FLOOR, RISE_SHARE * min(smoothed)):
        return f"its loss rose from {min(smoothed):.3g} to {smoothed[-1]:.3g}"
    return None


def draw(pilot: Pilot, file: Path) -> None:
    """Draw the losses of the three runs into a PNG file."""
    from matplotlib.figure import Figure

    # Not pyplot: it would open a window where there is a screen.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for run in pilot.runs:
        how = "stable" if run.is_stable else "not stable"
        axes.plot(range(1, len(run.losses) + 1), run.losses, linewidth=1, label=f"{run.lr:.2g}, {how}")
    axes.set(xlabel="step", ylabel="loss, nats per supervised token")
    highest = max((loss for run in pilot.runs if run.is_stable for loss in run.losses), default=math.inf)
    if math.isfinite(highest):
        axes.set_ylim(0, 1.5 * highest)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="learning rate")
    figure.savefig(file, dpi=150)


def rows(pilot: Pilot) -> Sequence[Sequence[Any]]:
    """Return a row per run: learning rate, first and last loss, skipped steps, and how it ended."""
    return [
        (
            f"{run.lr:.2g}",
            f"{run.losses[0]:.3f}" if run.losses else "-",
            f"{run.losses[-1]:.3f}" if run.losses else "-",
            run.skipped_steps,
            run.reason or "stable",
        )
        for run in pilot.runs
    ]
