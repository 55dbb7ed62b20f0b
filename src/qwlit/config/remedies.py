"""The one list of remedies: for each symptom, overrides for another try of a run, computed from its own settings.

What helps against which symptom, and the values, are those of the tuning guide where nothing else is said.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from qwlit.config.compose import compose
from qwlit.core.errors import ConfigError
from qwlit.core.metric import number_or_none
from qwlit.model.config import CHECKPOINTING_LEVELS, levels_with_less_memory
from qwlit.optim.kinds import OPTIMIZERS

DIVERGED_LR = {"full": 1e-5, "lora": 5e-5, "random": 3e-4}
UNSTABLE_LR = {"full": 5e-5, "lora": 5e-5, "random": 3e-3}
HIGHEST_LR = {"full": 1e-4, "lora": 5e-4, "random": 3e-3}
"""Not above these after such a symptom, or where it learns too slowly. Not the guide's: 1e-4 is preflight's limit, 3e-3
the learning rate of the demo (assumption)."""


@dataclass(frozen=True)
class TriedRun:
    """What the remedies for a run are computed from."""

    config_file: Path
    settings: Mapping[str, Any]
    """Dotted key → value."""
    machine: Mapping[str, Any]
    """precision, has_bf16, activation_checkpointing, devices, num_nodes; where they are known."""
    steps: int = 0
    """Steps trained, and the step of the lowest validation loss; 0 where unknown."""
    best_step: int = 0
    lr_factor: float = 1.0
    """What rollbacks multiplied the learning rate by."""

    def number(self, key: str, default: float = 0) -> float:
        value = number_or_none(self.settings.get(key))
        return default if value is None else value

    @property
    def global_batch_size(self) -> int:
        return max(1, int(self.number("train.global_batch_size", 16)))

    @property
    def kind(self) -> Literal["full", "lora", "random"]:
        if self.settings.get("model.init") == "random":
            return "random"
        return "lora" if self.settings.get("adapter.kind") == "lora" else "full"

    def lr(self, times: float, limits: Mapping[str, float]) -> float:
        """Return the learning rate times a factor; of an optimizer with AdamW's range, at most the limit."""
        kind = OPTIMIZERS.get(str(self.settings.get("optim.name")))
        limit = limits[self.kind] if kind is None or kind.has_adamw_lr_range else math.inf
        return min(times * self.lr_factor * self.number("optim.lr"), limit)


def remedies(symptom: str, run: TriedRun) -> list[str]:
    """Return overrides for another try of a run with a symptom of REMEDIES, the likeliest first.

    Each text composes after `config=<the run's config.yaml>`; one that would not is left out.
    """
    found = [text for remedy in REMEDIES[symptom] for text in remedy(run)]
    return [text for text in found if _composes(run.config_file, text)]


@cache
def _composes(config_file: Path, overrides: str) -> bool:
    try:
        compose([f"config={config_file}", *overrides.split()])
    except ConfigError:
        return False
    return True


def _tenth_of_the_lr(run: TriedRun) -> list[str]:
    lr = run.lr(0.1, DIVERGED_LR)
    return [f"optim.lr={lr:.2g} scheduler.name=cosine scheduler.warmup_ratio=0.1"] * (lr > 0)


def _quarter_of_the_lr(run: TriedRun) -> list[str]:
    lr = run.lr(0.25, UNSTABLE_LR)
    return [f"optim.lr={lr:.2g}"] * (lr > 0)


def _higher_lr(run: TriedRun) -> list[str]:
    lr = run.lr(10, HIGHEST_LR)
    return [f"optim.lr={lr:.2g}"] * (lr > run.number("optim.lr"))


def _clip(run: TriedRun) -> list[str]:
    return ["train.max_grad_norm=1.0"] * (run.number("train.max_grad_norm", math.inf) > 1)


def _larger_batch(run: TriedRun) -> list[str]:
    """Twice the batch; by accumulation, so that it takes no more memory."""
    batch, devices = run.global_batch_size, max(1, run.machine.get("devices", 1) * run.machine.get("num_nodes", 1))
    is_limited = any(run.settings.get(f"hardware.micro_batch_{what}") is not None for what in ("size", "tokens"))
    micro = "" if is_limited else f" hardware.micro_batch_size={max(1, batch // devices)}"
    return [f"train.global_batch_size={2 * batch}{micro}"]


def _train_less(run: TriedRun) -> list[str]:
    if run.kind != "full" or any(value for key, value in run.settings.items() if key.startswith("freeze.")):
        return []
    return ["adapter.kind=lora optim.lr=2e-4", "freeze.lower_layers_ratio=0.5"]


def _wider_than_float16(run: TriedRun) -> list[str]:
    wider = "bf16-mixed" if run.machine.get("has_bf16") else "32-true"
    return [f"hardware.precision={wider}"] * (run.machine.get("precision") == "16-mixed")


def _less_than_float32(run: TriedRun) -> list[str]:
    has_less = run.machine.get("precision") == "32-true" and run.machine.get("has_bf16")
    return ["hardware.precision=bf16-mixed"] if has_less else []


def _activation_checkpointing(run: TriedRun) -> list[str]:
    level = run.machine.get("activation_checkpointing")
    levels = levels_with_less_memory(level) if level in CHECKPOINTING_LEVELS else ()
    return [f"hardware.activation_checkpointing={less}" for less in levels]


def _smaller_micro_batch(run: TriedRun) -> list[str]:
    limits = {key: run.number(f"hardware.{key}") for key in ("micro_batch_size", "micro_batch_tokens")}
    found = [f"hardware.{key}={int(limit) // 2}" for key, limit in limits.items() if limit > 1]
    return found if any(limits.values()) else ["hardware.micro_batch_size=1"]


def _more_regularization(run: TriedRun) -> list[str]:
    goals = {"optim.weight_decay": [0.1, 0.2]}
    goals |= {"dropout.lora": [0.05]} if run.kind == "lora" else {}
    goals |= {} if run.kind == "lora" else {"dropout.attention": [0.1, 0.2], "dropout.feed_forward": [0.1, 0.2]}
    higher = {key: [goal for goal in found if goal > run.number(key)] for key, found in goals.items()}
    text = " ".join(f"{key}={found[0]}" for key, found in higher.items() if found)
    return [text] * bool(text)


def _stop_earlier(run: TriedRun) -> list[str]:
    patience = "validation.early_stopping_patience"
    return [f"train.max_steps={max(1, run.best_step)}", *[f"{patience}=3"] * (run.settings.get(patience) is None)]


def _schedule(run: TriedRun) -> list[str]:
    warmup = max(run.number("scheduler.warmup_ratio"), run.number("scheduler.warmup_steps") / max(run.steps, 1))
    is_early = run.settings.get("scheduler.name") == "exponential"
    return ["scheduler.warmup_ratio=0.05"] * (warmup > 0.1) + ["scheduler.name=cosine"] * is_early


def _twice_the_steps(run: TriedRun) -> list[str]:
    return [f"train.max_steps={2 * run.steps}"] * (run.steps > 0)


REMEDIES: dict[str, tuple[Callable[[TriedRun], list[str]], ...]] = {
    "diverging": (_tenth_of_the_lr, _clip, _larger_batch, _train_less, _wider_than_float16),
    "unstable": (_quarter_of_the_lr, _clip, _larger_batch),
    "overfitting": (_more_regularization, _stop_earlier),
    "memory": (_activation_checkpointing, _smaller_micro_batch, _less_than_float32, _train_less),
    "slow": (_higher_lr, _schedule, _twice_the_steps),
}
"""Symptom → remedies, the likeliest (of memory: the cheapest) first."""
