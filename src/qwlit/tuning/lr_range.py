"""The learning-rate range test (Smith 2017): a short training whose rate rises every step shows what it bears."""

import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from qwlit.config.compose import compose
from qwlit.core.console import measuring
from qwlit.core.errors import ConfigError, GuardStop, Preempted, QwlitError
from qwlit.core.files import resolve_path, write_json_atomic
from qwlit.training.resilience.preemption import answering_signals
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.tuning.trial import Tail, last_message, start_training

STEPS, FEWEST, HIGHEST = 100, 20, 0.1
# As fastai's finder: a moving average that forgets a tenth a step, over when it is four times the best.
SMOOTHING, DIVERGED = 0.9, 4.0
# The first steps tell the noise of the samples, not of the rate.
SETTLING = 0.1
NOISE = 2.0
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class RangeTest:
    """Losses at rising rates, and what they say."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    """Rate at which the smoothed loss fell fastest per decade; None where it never fell."""
    lowest: float | None
    """Rate at which it was lowest: beyond it, steps are too long. None where it still fell at the highest."""

    @property
    def suggestion(self) -> float | None:
        """Return the steepest rate, but never more than a third of the one at which the loss turned."""
        if self.steepest is None:
            return None
        return float(f"{min(self.steepest, self.lowest / 3 if self.lowest else self.steepest):.1e}")

    def reason(self) -> str:
        if self.steepest is None:
            return (
                "the loss fell at no rate by more than it scatters;"
                " try larger steps (train.global_batch_size), more of them (train.max_steps), or other rates (optim.lr)"
            )
        if self.lowest is None:
            return f"the loss fell fastest at {self.steepest:.1e} and still fell at the highest; try a higher optim.lr"
        return (
            f"the loss fell fastest at {self.steepest:.1e} and turned at {self.lowest:.1e};"
            " the suggestion is the first, or a third of the second if that is less"
        )


def find_lr(words: list[str], screen: Console) -> tuple[RangeTest, RunFolder]:
    """Train with a rising rate and read what came of it.

    Args:
        words: overrides of `train`; `optim.lr` is the highest rate, `train.max_steps` the number of steps.

    Raises:
        QwlitError: the training could not begin; or too little of it was measured.
    """
    composed = compose(words)
    name = f"{composed.config.run.name}-lr"
    folder = RunFolder(resolve_path(composed.config.run.root) / name)
    typed = {word.partition("=")[0].lstrip("+") for word in words}
    if typed & {"scheduler.warmup_steps", "scheduler.warmup_ratio", "scheduler", "scheduler.name"}:
        raise ConfigError("the range test has a schedule of its own, without warm-up; leave scheduler.* out")
    defaults = {"optim.lr": f"{HIGHEST}", "train.max_steps": f"{STEPS}", "preflight.allow": "[full_lr]"}
    overrides = [
        *words,
        *(f"{key}={value}" for key, value in defaults.items() if key not in typed),
        *([] if "scheduler.min_lr_ratio" in typed else ["scheduler.min_lr_ratio=1e-6"]),
        "scheduler.name=range_test",
        "scheduler.warmup_steps=0",
        "train.max_epochs=null",
        "validation.each_epoch=false",
        "validation.every_steps=null",
        "checkpoint.each_epoch=false",
        "checkpoint.every_steps=null",
        "logging.every_steps=1",
        "data.exact_match=0",
        "logger.wandb=false",
        f"run.name={name}",
    ]
    steps = compose(overrides).config.train.max_steps or STEPS
    if steps < FEWEST:
        raise ConfigError(f"train.max_steps={steps}: a range test needs {FEWEST} steps at least")
    _make_room(folder)
    code, log = _train(overrides, folder, steps, screen)
    test = read_range_test(folder)
    # Ended by us or by the guard, it has seen the end of what the run bears.
    if code not in (0, Preempted.exit_code, GuardStop.exit_code) or len(test.rates) < FEWEST // 2:
        error = QwlitError(f"the range test measured {len(test.rates)} steps only: {last_message(log)}")
        error.exit_code = code if code > 0 else QwlitError.exit_code
        raise error
    log.replace(folder.path / "train.log")
    for useless in ("checkpoints", "export"):
        shutil.rmtree(folder.path / useless, ignore_errors=True)
    draw(test, folder.path / "lr_range.png")
    write_json_atomic(
        folder.path / "lr_range.json",
        {"suggestion": test.suggestion, "reason": test.reason(), "lr": test.rates, "loss": test.losses},
    )
    return test, folder


def _make_room(folder: RunFolder) -> None:
    """Delete an earlier range test of this name, and nothing else.

    Raises:
        ConfigError: something else lies there.
    """
    if not folder.path.exists():
        return
    config = folder.config_file.read_text(encoding="utf-8") if folder.config_file.exists() else ""
    if "name: range_test" not in config and any(folder.path.iterdir()):
        raise ConfigError(f"{folder.path} exists and is no range test; move it away, or set another run.name")
    folder.delete()


def _train(overrides: list[str], folder: RunFolder, steps: int, screen: Console) -> tuple[int, Path]:
    """Run the training until it ends or the loss has gone; return its exit code and what it said."""
    log = folder.path.with_name(f".{folder.path.name}.log")
    tail = Tail(folder.path / "metrics.jsonl")
    log.unlink(missing_ok=True)
    process = start_training(overrides, log, {})
    with measuring("range test", screen) as show, answering_signals():
        try:
            while process.poll() is None:
                rows = tail.read()
                show(len(rows), steps, f"{len(rows)} steps")
                if _has_diverged([row["train/loss"] for row in rows if "train/loss" in row]):
                    process.terminate()
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode, log


def _has_diverged(losses: Sequence[float | None]) -> bool:
    smoothed = smooth([loss for loss in losses if loss is not None])
    return len(smoothed) > 10 and smoothed[-1] > DIVERGED * min(smoothed)


def read_range_test(folder: RunFolder) -> RangeTest:
    """Read what a run with rising rates has measured."""
    rows = [row for row in Tail(folder.path / "metrics.jsonl").read() if row.get("train/loss") is not None]
    return judge([row["optim/lr"] for row in rows], [row["train/loss"] for row in rows])


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start at 0."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**count))
    return smoothed


def judge(rates: list[float], losses: list[float]) -> RangeTest:
    """Find where the smoothed loss falls fastest per decade of the rate, and where it turns."""
    smoothed = smooth(losses)
    first = int(SETTLING * len(rates))
    if len(rates) - first < 3:
        return RangeTest(rates, losses, smoothed, None, None)
    turn = min(range(first, len(rates)), key=smoothed.__getitem__)
    slopes = {
        i: (smoothed[i + 1] - smoothed[i - 1]) / math.log10(rates[i + 1] / rates[i - 1])
        for i in range(max(1, first), min(turn + 1, len(rates) - 1))
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    until = slice(first, max(turn, first + len(rates) // 4))
    scatter = statistics.pstdev(loss - level for loss, level in zip(losses[until], smoothed[until], strict=True))
    fall = smoothed[first] - smoothed[turn]
    # The average wanders, too: of noise alone it hardly ever falls by twice the scatter.
    if steepest is None or fall <= max(NOISE * scatter, 1e-6 * abs(smoothed[first])):
        return RangeTest(rates, losses, smoothed, None, None)
    return RangeTest(rates, losses, smoothed, rates[steepest], rates[turn] if turn < len(rates) - 1 else None)


def draw(test: RangeTest, file: Path) -> None:
    """Draw loss against rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(test.rates, test.losses, color="0.8", linewidth=1, label="each step")
    axes.plot(test.rates, test.smoothed, color="C0", linewidth=2, label="smoothed")
    if test.suggestion is not None:
        axes.axvline(test.suggestion, color="C1", linestyle="--", label=f"suggestion {test.suggestion:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats a supervised token")
    lowest, first = min(test.smoothed), test.smoothed[0]
    axes.set_ylim(lowest - 0.1 * (first - lowest + 0.1), first + 0.3 * (first - lowest + 0.1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
