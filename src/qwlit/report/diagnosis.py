"""What a run's records say about its health: symptoms, each with its evidence and with overrides for another try.

"Measured": in trainings like those of tests/runs/test_diagnosis.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwlit.config.remedies import TriedRun, remedies
from qwlit.core.metric import number_or_none
from qwlit.report.curves import thin
from qwlit.report.runs import RunRecord
from qwlit.report.statistics import jumps, noise_of, smoothed, swings
from qwlit.training.resilience.rollback import LR_FACTOR

FEWEST_RECORDS, FEWEST_VALIDATIONS, SMOOTH_RECORDS = 20, 3, 9
"""With fewer, nothing is said about the loss, or about val/loss (assumption). The smoothed loss is the median of so
many records, as the guard's; of fewer in short runs."""
RISE_FLOOR, RISE_SHARE, RISE_SCALES, RISE_CEILING = 0.1, 0.1, 5.0, 4.0
"""A smoothed loss has risen if it is above its best by the largest of nats, share of the best, and scales of its own
noise, or by the last number of nats. Measured: 120 healthy steps of one or two samples have one rise of 4 scales."""
RISEN_PART, SWINGS = 4, 2
"""The loss diverged if it has risen in all of the last one of so many parts of the run, or was ever above its start by
RISE_CEILING; it oscillates if it rose and fell again so often. Assumptions: one wave may be the order of the data."""
NORM_JUMP, NORM_JUMP_OF_ONE, NORM_WINDOW, NORM_LEAST_LOSS = 0.35, 1.2, 25, 0.1
"""The gradient norm jumps if one record in 20 is so far (in logs) from the median around it; the second number, over
the batch size, comes on top. Measured: 0.10 to 0.33 in healthy runs with batches of 16 and 32, 0.40 to 0.6 (once above
0.7) with 1 and 2. At a rate 100 times too high, where the loss stays high and does not swing, 0.54 to 0.81 with batches
of 16 and 32; at one 33 times too high 0.38 to 1.2, so that some such runs are not seen. Records with a loss below the
last number, in nats, do not count, because few samples make their gradient: measured in a healthy run that ends at 0.06
nats, 0.45 with them and 0.24 without."""
MOST_SKIPS = 0.005
"""Healthy runs skip at most 0.2 % of their steps (docs/guard.md)."""
OVERFIT_SHARE, OVERFIT_SCALES, OVERFIT_ALWAYS = 0.03, 4.0, 0.1
"""val/loss is above its best by the first share and so many scales of its noise, or by the last share. Assumptions."""
SLOW_FALL, SLOW_MOVED, SLOW_FALL_RANDOM = 0.1, 0.003, 0.25
"""The loss fell by less than the first share, noise apart, while all updates together are less than the second share
of the weights' norm; with random weights: by less than the third. Measured in 120 steps: fine-tuning at a good rate
moves 0.03 to 0.06, at a thousandth of it 0.00006; random weights fall by 0.7 at a good rate, by 0.07 at 1/150 of it."""
NEAR_MEMORY = 0.9
"""Share of the device's memory: `plan` reserves 0.6 GiB and 4 % for context and fragmentation."""
OF_SAMPLING = ("the model repeats itself", "the distribution of the next token")
"""Beginnings of the probe's alarms."""
ROWS = "Look at the rows and what is supervised in them: qwlit inspect."


@dataclass(frozen=True)
class Symptom:
    """Something wrong with a run. Each of the `remedies`, the likeliest first, are overrides for config=<the run's>."""

    name: str
    evidence: list[str]
    remedies: list[str]
    advice: str


@dataclass(frozen=True)
class Diagnosis:
    """The symptoms of a run; none if it is healthy. `looked_at`: what the records allowed to judge, and what not."""

    symptoms: list[Symptom]
    looked_at: str


def diagnose(run: RunRecord) -> Diagnosis:
    """Judge a run by its records; what its folder lacks is not judged."""
    return _Examination(run).diagnosis()


class _Examination:
    def __init__(self, run: RunRecord) -> None:
        self._run = run
        best_step, _ = min(run.series.get("val/loss", [(0, 0.0)]), key=lambda point: point[1])
        steps = run.results.steps or 0
        factor = math.prod(LR_FACTOR for decision in run.decisions if decision.get("cause") == "divergence")
        self._tried = TriedRun(run.path / "config.yaml", run.settings, run.manifest, steps, best_step, factor)
        points = thin(run.series.get("train/loss", []))
        self._enough = len(points) >= FEWEST_RECORDS
        self._start = points[0][1] if points else 0.0
        self._steps = [step for step, _ in points]
        self._losses, self._noise = smoothed([value for _, value in points], SMOOTH_RECORDS)

    def diagnosis(self) -> Diagnosis:
        found: list[Symptom] = []
        for rule in (self._diverging, self._memory, self._overfitting, self._unstable, self._slow):
            # A diverging loss also swings, and neither it nor a swinging or overfitted one converges slowly.
            is_known = any(symptom.name.endswith("loss") or symptom.name == "overfitting" for symptom in found)
            if not (is_known and rule in (self._unstable, self._slow)) and (symptom := rule()):
                found.append(symptom)
        return Diagnosis(found, self._looked_at())

    def _diverging(self) -> Symptom | None:
        """The guard's decisions, losses that are not finite, and a loss that rose and stayed up."""
        run, told = self._run, []
        what = {"rollback": "went back to step", "stopped": "the guard stopped the run at step"}
        acts = [event for event in run.events if event["event"] in what]
        told += [f"{event.get('reason')}: {what[event['event']]} {event['step']}" for event in acts]
        skips = [e["step"] for e in run.events if e["event"] == "skip" and "float16" not in str(e.get("reason"))]
        if len(skips) > max(2, MOST_SKIPS * (run.results.steps or 0)):
            told.append(f"{len(skips)} steps were skipped, from step {skips[0]} on")
        finite = {step for step, _ in run.series.get("train/loss", [])}
        # Each record of a training loss has the learning rate, too.
        if lost := [step for step, _ in run.series.get("optim/lr", []) if step not in finite]:
            told.append(f"the loss is not finite in {len(lost)} records, from step {lost[0]} on")
        if self._enough:
            best, last = int(np.argmin(self._losses)), self._losses[-(len(self._losses) // RISEN_PART) :]
            top = int(np.argmax(self._losses))
            if self._losses[top] > self._start + RISE_CEILING:
                told.append(f"the loss rose from {self._start:.3g} to {self._losses[top]:.3g}, step {self._steps[top]}")
            elif (last > self._losses[best] + self._margin(self._losses[best])).all():
                told.append(f"the loss rose from {self._losses[best]:.3g}, step {self._steps[best]}, to {last[-1]:.3g}")
        if not told:
            return None
        causes = {event.get("cause") or _cause(event) for event in acts}
        if len(told) == len(acts) and causes == {"state"}:
            return Symptom("damaged state", told, [], "Check the memory and the devices of this machine.")
        name = "degenerate sampling" if any(text.startswith(OF_SAMPLING) for text in told) else "diverging loss"
        # Only a run that the guard stopped has this file.
        is_stopped = any(event["event"] == "stopped" for event in acts)
        advice = "Read the samples in diagnosis.json." if is_stopped else "Read the decisions in events.jsonl."
        return Symptom(name, told, remedies("diverging", self._tried), advice)

    def _margin(self, best: float) -> float:
        share = RISE_SHARE * abs(best)
        return min(max(RISE_FLOOR, share, RISE_SCALES * self._noise), max(RISE_CEILING, share))

    def _memory(self) -> Symptom | None:
        failures = [event for event in self._run.events if event["event"] == "out_of_memory"]
        peak, total = self._run.results.peak_memory_gib, number_or_none(self._run.manifest.get("device_memory_gib"))
        if failures:
            name, told = "out of memory", f"step {failures[-1]['step'] + 1}: {failures[-1].get('message')}"
        elif peak is None or not total or peak < NEAR_MEMORY * total:
            return None
        else:
            name, told = "near the memory limit", f"{peak:.2f} of {total:.2f} GiB were in use, {peak / total:.0%}"
        return Symptom(name, [told], remedies("memory", self._tried), "`qwlit plan` counts what other settings take.")

    def _overfitting(self) -> Symptom | None:
        """A validation loss that rises again while the training loss does not."""
        points = self._run.series.get("val/loss", [])
        if len(points) < FEWEST_VALIDATIONS:
            return None
        steps, values = zip(*points, strict=True)
        best = int(np.argmin(values))
        share = max(OVERFIT_SHARE, OVERFIT_SCALES * noise_of(values) / (abs(values[best]) or 1))
        limit = values[best] + min(share, OVERFIT_ALWAYS) * abs(values[best])
        if len(values) - best < 3 or min(values[-2:]) <= limit:
            return None
        before, end = self._train_loss_at(steps[best]), self._train_loss_at(steps[-1])
        if before is None or end is None or end > before + self._noise:
            return None
        told = [
            f"val/loss rose from {values[best]:.4g} at step {steps[best]} to {values[-1]:.4g} at step {steps[-1]}",
            f"train/loss went from {before:.4g} to {end:.4g} meanwhile",
        ]
        tries = remedies("overfitting", self._tried)
        if end < values[-1]:
            return Symptom("overfitting", told, tries, "More data, or more varied data, help most.")
        return Symptom("forgetting", told, tries, "Training data are unlike the validation's: mix such data in.")

    def _train_loss_at(self, step: int) -> float | None:
        before = [loss for at, loss in self._run.series.get("train/loss", []) if at <= step]
        return float(np.median(before[-SMOOTH_RECORDS:])) if before else None

    def _unstable(self) -> Symptom | None:
        """A loss that rises and falls again, or a gradient norm that jumps."""
        told, waves = [], swings(self._steps, self._losses, self._margin) if self._enough else []
        if len(waves) >= SWINGS:
            step, low, high = max(waves, key=lambda wave: wave[2] - wave[1])
            told.append(f"the loss rose and fell {len(waves)} times, most from {low:.3g} to {high:.3g} at step {step}")
        learned = {step for step, loss in self._run.series.get("train/loss", []) if loss < NORM_LEAST_LOSS}
        norms = [(step, norm) for step, norm in self._run.series.get("optim/grad_norm", []) if step not in learned]
        norms = [(step, math.log(norm)) for step, norm in norms if norm > 0]
        if len(norms) >= FEWEST_RECORDS:
            (jump, step), batch = jumps(norms[len(norms) // 10 :], NORM_WINDOW), self._tried.global_batch_size
            if jump > NORM_JUMP + NORM_JUMP_OF_ONE / batch:
                how = f"{math.exp(jump):.1f} times as large or as small as around it, most at step {step}"
                told.append(f"in 5 % of the records the gradient norm is {how}")
        return Symptom("unstable loss", told, remedies("unstable", self._tried), ROWS) if told else None

    def _slow(self) -> Symptom | None:
        """A loss that hardly falls because the weights hardly move."""
        if not self._enough or self._losses[0] <= 0:
            return None
        first, last, moved = self._losses[0], self._losses[-1], self._moved()
        is_still = first - last < SLOW_FALL * first + RISE_SCALES * self._noise
        is_slow = is_still and moved is not None and moved < SLOW_MOVED
        is_slow |= self._run.settings.get("model.init") == "random" and last > (1 - SLOW_FALL_RANDOM) * first
        if not is_slow:
            return None
        told = [f"the loss went from {first:.4g} to {last:.4g} in {self._steps[-1]} steps"]
        told += [f"all updates together are at most {100 * moved:.2g} % of the weights' norm"] if moved else []
        return Symptom("slow convergence", told, remedies("slow", self._tried), ROWS)

    def _moved(self) -> float | None:
        """Return the sum of all steps' update ratios, of the group that moved most; None where not measured."""
        series = [points for key, points in self._run.series.items() if key.startswith("optim/update_ratio/")]
        gaps = [zip([0, *(step for step, _ in points)], points, strict=False) for points in series]
        return max((sum(ratio * (step - before) for before, (step, ratio) in each) for each in gaps), default=0) or None

    def _looked_at(self) -> str:
        counts = [
            self._counted("records of", "train/loss", FEWEST_RECORDS),
            self._counted("of", "optim/grad_norm", FEWEST_RECORDS),
            self._counted("of", "val/loss", FEWEST_VALIDATIONS),
        ]
        memory = "peak memory" if self._run.manifest.get("device_memory_gib") else "no memory limit, as it is not known"
        return ", ".join([*counts, f"{len(self._run.events)} events", memory])

    def _counted(self, words: str, key: str, fewest: int) -> str:
        count = len(self._run.series.get(key, []))
        too_few = f" (too few, less than {fewest})" if count < fewest else ""
        return f"{count} {words} {key}{too_few}"


def _cause(rollback: Any) -> Any:
    return decision.get("cause") if isinstance(decision := rollback.get("decision"), dict) else None
