"""The learning-rate range test (Smith 2017): a short run whose learning rate rises at every step."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qwlit.config.compose import compose
from qwlit.core.errors import ConfigError, GuardStop, Preempted
from qwlit.core.files import read_json_lines, resolve_path, write_json_atomic
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.tuning.short_run import LOSSES_ONLY, delete_weights, failed, run_shortly
from qwlit.tuning.space import keys_of
from qwlit.tuning.trial import without_rollbacks

STEPS, FEWEST_STEPS, HIGHEST_LR = 100, 20, 0.1
# As in fastai's finder: smooth with a moving average of this weight; stop at four times the lowest smoothed loss.
SMOOTHING, DIVERGED = 0.9, 4.0
# Ignore this share of the steps at the start: their learning rate is so low that the loss shows only noise.
IGNORED_SHARE = 0.1
# A fall of the loss counts if it exceeds this many standard deviations of the noise.
NOISE = 2.0


@dataclass(frozen=True)
class RangeTest:
    """Losses at rising learning rates, and the learning rates that they suggest."""

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    """Learning rate at which the smoothed loss fell fastest per decade; None if it never fell."""
    lowest: float | None
    """Learning rate with the lowest smoothed loss; None if the loss still fell at the highest learning rate."""

    @property
    def suggestion(self) -> float | None:
        """Return `steepest`, but at most a third of `lowest`, beyond which the loss rises."""
        if self.steepest is None:
            return None
        return float(f"{min(self.steepest, self.lowest / 3 if self.lowest else self.steepest):.1e}")

    def reason(self) -> str:
        if self.steepest is None:
            return (
                "the loss did not fall by more than its noise at any learning rate;"
                " try larger batches (train.global_batch_size), more steps (train.max_steps) or another optim.lr"
            )
        if self.lowest is None:
            return f"the loss fell fastest at {self.steepest:.1e} and still fell at the highest; try a higher optim.lr"
        return (
            f"the loss fell fastest at {self.steepest:.1e} and was lowest at {self.lowest:.1e};"
            " the suggestion is the first value, or a third of the second if that is smaller"
        )


def find_lr(overrides: list[str], screen: Console) -> tuple[RangeTest, RunFolder]:
    """Train with a rising learning rate and evaluate the losses.

    Args:
        overrides: of `train`. `optim.lr` is the highest learning rate, `train.max_steps` the number of steps.

    Raises:
        ConfigError: the overrides do not fit a range test.
        QwlitError: the training could not begin, or ended after too few steps.
    """
    composed = compose(overrides)
    name = f"{composed.config.run.name}-lr"
    folder = RunFolder(resolve_path(composed.config.run.root) / name)
    typed = keys_of(overrides)
    if typed & {"scheduler.warmup_steps", "scheduler.warmup_ratio", "scheduler", "scheduler.name"}:
        raise ConfigError("the range test has a schedule of its own, without warm-up; leave scheduler.* out")
    defaults = {
        "optim.lr": HIGHEST_LR,
        "train.max_steps": STEPS,
        "preflight.allow": "[full_lr]",
        "scheduler.min_lr_ratio": 1e-6,
    }
    overrides = [
        *without_rollbacks(overrides),
        *(f"{key}={value}" for key, value in defaults.items() if key not in typed),
        "scheduler.name=range_test",
        "scheduler.warmup_steps=0",
        *LOSSES_ONLY,
        f"run.name={name}",
    ]
    steps = compose(overrides).config.train.max_steps or STEPS
    if steps < FEWEST_STEPS:
        raise ConfigError(f"train.max_steps={steps}: a range test needs at least {FEWEST_STEPS} steps")
    _delete_earlier_test(folder)
    log = folder.path.with_name(f".{folder.path.name}.log")
    code = run_shortly(overrides, folder, log, steps, "range test", screen, _has_diverged)
    records = [r for r in read_json_lines(folder.path / "metrics.jsonl") if r.get("train/loss") is not None]
    test = evaluate([record["optim/lr"] for record in records], [record["train/loss"] for record in records])
    # Ended by `_has_diverged` or by the guard, the run has reached learning rates that are too high: that is a result.
    if code not in (0, Preempted.exit_code, GuardStop.exit_code) or len(test.lrs) < FEWEST_STEPS // 2:
        raise failed(f"the range test measured only {len(test.lrs)} steps", code, log)
    log.replace(folder.path / "train.log")
    delete_weights(folder)
    draw(test, folder.path / "lr_range.png")
    write_json_atomic(
        folder.path / "lr_range.json",
        {"suggestion": test.suggestion, "reason": test.reason(), "lr": test.lrs, "loss": test.losses},
    )
    return test, folder


def _delete_earlier_test(folder: RunFolder) -> None:
    """Delete an earlier range test of this name, and nothing else.

    Raises:
        ConfigError: the folder contains something else.
    """
    if not folder.path.exists():
        return
    config = folder.config_file.read_text(encoding="utf-8") if folder.config_file.exists() else ""
    if "name: range_test" not in config and any(folder.path.iterdir()):
        raise ConfigError(f"{folder.path} exists and is not a range test; move it away, or set another run.name")
    folder.delete()


def _has_diverged(records: Sequence[dict[str, Any]]) -> bool:
    smoothed = smooth([record["train/loss"] for record in records if record.get("train/loss") is not None])
    return len(smoothed) > 10 and smoothed[-1] > DIVERGED * min(smoothed)


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving average, with bias correction for its start at 0."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**count))
    return smoothed


def evaluate(lrs: list[float], losses: list[float]) -> RangeTest:
    """Find where the smoothed loss falls fastest per decade of the learning rate, and where it is lowest."""
    smoothed = smooth(losses)
    first = int(IGNORED_SHARE * len(lrs))
    if len(lrs) - first < 3:
        return RangeTest(lrs, losses, smoothed, None, None)
    turn = min(range(first, len(lrs)), key=smoothed.__getitem__)
    slopes = {
        i: (smoothed[i + 1] - smoothed[i - 1]) / math.log10(lrs[i + 1] / lrs[i - 1])
        for i in range(max(1, first), min(turn + 1, len(lrs) - 1))
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    until = slice(first, max(turn, first + len(lrs) // 4))
    noise = statistics.pstdev(loss - level for loss, level in zip(losses[until], smoothed[until], strict=True))
    fall = smoothed[first] - smoothed[turn]
    # Noise moves the average too, but almost never by twice its standard deviation.
    if steepest is None or fall <= max(NOISE * noise, 1e-6 * abs(smoothed[first])):
        return RangeTest(lrs, losses, smoothed, None, None)
    return RangeTest(lrs, losses, smoothed, lrs[steepest], lrs[turn] if turn < len(lrs) - 1 else None)


def draw(test: RangeTest, file: Path) -> None:
    """Draw the loss against the learning rate into a PNG file."""
    from matplotlib.figure import Figure

    # Not pyplot: it would open a window where there is a screen.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(test.lrs, test.losses, color="0.8", linewidth=1, label="each step")
    axes.plot(test.lrs, test.smoothed, color="C0", linewidth=2, label="smoothed")
    if test.suggestion is not None:
        axes.axvline(test.suggestion, color="C1", linestyle="--", label=f"suggestion {test.suggestion:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats per supervised token")
    lowest, first = min(test.smoothed), test.smoothed[0]
    axes.set_ylim(lowest - 0.1 * (first - lowest + 0.1), first + 0.3 * (first - lowest + 0.1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
