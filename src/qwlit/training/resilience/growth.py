"""Find a slow divergence by numbers from inside the model, before or without a rise of the loss.

A fine-tuning at a healthy learning rate hardly changes how large the values inside the model are. One at 100 times that
rate blows them up within tens of steps; its loss may rise less than the noise, or fall again while the model is broken.
Models with random weights grow when all is well, so for them only attention logits of a size that no healthy run has
are an alarm. docs/telemetry.md has the runs and the sources behind the numbers.
"""

import math
from typing import Any

from lightning.pytorch.callbacks import Callback

from qwlit.training.resilience.guard import Guard
from qwlit.training.resilience.probe import MAX_ATTENTION_LOGIT
from qwlit.training.step_gauges import ACTIVATION_NORM
from qwlit.training.telemetry import Record

GROWTH, IN_A_ROW = 4.0, 2
"""A number is so many times its first value or more, in so many records in a row."""
FLOORS = {ACTIVATION_NORM: 0.0, MAX_ATTENTION_LOGIT: 50.0}
"""Below these values growth is no alarm: the softmax of attention is saturated only by larger logits."""
LIMITS_FROM_RANDOM = {ACTIVATION_NORM: math.inf, MAX_ATTENTION_LOGIT: 1000.0}
"""For models that began with random weights."""
RANDOM_SHARE = 0.9
"""A first loss of this share of ln(vocabulary) or more is that of random weights, also if they come from a folder: a
guess at random has ln(vocabulary), a published model on any text less than half of it (assumption)."""


class SlowDivergence(Callback):
    """Reads the records of metrics.jsonl, on every rank, and raises alarms."""

    def __init__(self, guard: Guard, *, is_pretrained: bool, vocab_size: int) -> None:
        """Create the callback.

        Args:
            is_pretrained: the weights were loaded; the first loss may still say that they are random.
        """
        self._guard = guard
        self._is_pretrained = is_pretrained
        self._random_loss = RANDOM_SHARE * math.log(vocab_size)
        self._first: dict[str, float] = {}
        """The run's first value of each number; the activations of step 1 are those of the pretrained weights."""
        self._grown: dict[str, int] = {}
        """How many records in a row are too large."""

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "grown": self._grown, "is_pretrained": self._is_pretrained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first, self._grown = dict(state_dict["first"]), dict(state_dict["grown"])
        self._is_pretrained = state_dict.get("is_pretrained", self._is_pretrained)  # earlier checkpoints lack it

    def read(self, step: int, record: Record) -> None:
        """Judge a record of metrics.jsonl.

        Raises:
            GuardStop: see `Guard.alarm`.
        """
        loss = record.get("train/loss")
        if not self._first and loss is not None and loss >= self._random_loss:
            self._is_pretrained = False
        for name, floor in FLOORS.items():
            value = record.get(name)
            if value is None or not math.isfinite(value):
                continue
            first = self._first.setdefault(name, value)
            limit = max(floor, GROWTH * first) if self._is_pretrained else LIMITS_FROM_RANDOM[name]
            has_grown = value > limit
            self._grown[name] = self._grown.get(name, 0) + 1 if has_grown else 0
            if self._grown[name] >= IN_A_ROW:
                self._guard.alarm(step, f"{name} grew from {first:.3g} to {value:.3g}", "divergence")
