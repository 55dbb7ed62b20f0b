"""Overrides for another try of a run, computed from its own settings. Values: the tuning guide's table of symptoms."""

from typing import Any

from qwlit.core.metric import number_or_none
from qwlit.report.runs import RunRecord

UNSTABLE_LR, FULL_LR, LORA_LR = 5e-5, 1e-5, 2e-4
"""The guide's: the highest rate for an unstable run, the rates of full fine-tuning and LoRA."""
HIGHEST_FULL, HIGHEST_LORA, HIGHEST_RANDOM = 1e-4, 5e-4, 3e-3
"""Not above these: preflight's limit, the guide's range, and the demo's rate (assumption)."""


class Remedies:
    """The remedies for each symptom; every text is a list of overrides that `compose` takes with the run's config."""

    def __init__(self, run: RunRecord) -> None:
        self._settings, self._manifest = run.settings, run.manifest
        self._steps = run.results.steps or 0
        self.batch_size = max(1, int(self._number("train.global_batch_size", 16)))
        self._lr = self._number("optim.lr", 0.0)
        self._is_lora = run.settings.get("adapter.kind") == "lora"
        self._is_random = run.settings.get("model.init") == "random"

    def of_instability(self) -> list[str]:
        cap = HIGHEST_RANDOM if self._is_random else UNSTABLE_LR
        return [*self._lower_lr(min(self._lr / 4, cap)), *self._clip(), *self._larger_batch()]

    def of_divergence(self) -> list[str]:
        cap = HIGHEST_RANDOM if self._is_random else UNSTABLE_LR if self._is_lora else FULL_LR
        found = [
            *self._lower_lr(min(self._lr / 10, cap), warmup=True),
            *self._clip(),
            *self._larger_batch(),
            *self._lora(),
        ]
        return [*found, *["hardware.precision=32-true"] * (self._manifest.get("precision") == "16-mixed")]

    def of_overfitting(self, best_step: int) -> list[str]:
        """`best_step`: the step of the lowest validation loss."""
        patience = self._settings.get("validation.early_stopping_patience")
        found = " ".join([*self._more_weight_decay(), *self._more_dropout()])
        stops = ["validation.early_stopping_patience=3"] if patience is None else []
        return [*[found] * bool(found), f"train.max_steps={max(1, best_step)}", *stops]

    def of_memory(self) -> list[str]:
        found = []
        if self._manifest.get("activation_checkpointing") in ("none", "selective"):
            found.append("hardware.activation_checkpointing=full")
        micro = {key: self._number(f"hardware.{key}", 0) for key in ("micro_batch_size", "micro_batch_tokens")}
        found += [f"hardware.{key}={int(value) // 2}" for key, value in micro.items() if value > 1]
        if not any(micro.values()):
            found.append("hardware.micro_batch_size=1")
        if self._manifest.get("precision") == "32-true" and self._manifest.get("accelerator") == "cuda":
            found.append("hardware.precision=bf16-mixed")
        return [*found, *self._lora()]

    def of_slowness(self) -> list[str]:
        highest = HIGHEST_RANDOM if self._is_random else HIGHEST_LORA if self._is_lora else HIGHEST_FULL
        found = [f"optim.lr={min(10 * self._lr, highest):.2g}"] if 0 < self._lr < highest else []
        ratio, steps = self._number("scheduler.warmup_ratio", 0), self._number("scheduler.warmup_steps", 0)
        if max(ratio, steps / max(self._steps, 1)) > 0.1:
            found.append("scheduler.warmup_ratio=0.05")
        if self._settings.get("scheduler.name") == "exponential":
            found.append("scheduler.name=cosine")
        return [*found, *[f"train.max_steps={2 * self._steps}"] * (self._steps > 0)]

    def _number(self, key: str, default: float) -> float:
        value = number_or_none(self._settings.get(key))
        return default if value is None else value

    def _lower_lr(self, lr: float, *, warmup: bool = False) -> list[str]:
        if lr <= 0:
            return []
        return [f"optim.lr={lr:.2g}" + " scheduler.name=cosine scheduler.warmup_ratio=0.1" * warmup]

    def _clip(self) -> list[str]:
        norm = self._settings.get("train.max_grad_norm")
        return ["train.max_grad_norm=1.0"] if norm is None or self._number("train.max_grad_norm", 0) > 1 else []

    def _larger_batch(self) -> list[str]:
        """Twice the batch; by accumulation, so that it takes no more memory."""
        batch = self.batch_size
        limits: list[Any] = [self._settings.get(f"hardware.micro_batch_{what}") for what in ("size", "tokens")]
        devices = max(1, self._manifest.get("devices", 1) * self._manifest.get("num_nodes", 1))
        micro = f" hardware.micro_batch_size={max(1, batch // devices)}" if limits == [None, None] else ""
        return [f"train.global_batch_size={2 * batch}{micro}"] if batch <= 500_000 else []

    def _lora(self) -> list[str]:
        frozen = [value for key, value in self._settings.items() if key.startswith("freeze.")]
        if self._is_lora or self._is_random or any(frozen):
            return []
        return [f"adapter.kind=lora optim.lr={LORA_LR:g}"]

    def _more_weight_decay(self) -> list[str]:
        decay = self._number("optim.weight_decay", 0)
        return [f"optim.weight_decay={0.1 if decay < 0.1 else 0.2}"] if decay < 0.2 else []

    def _more_dropout(self) -> list[str]:
        if self._is_lora:
            return ["dropout.lora=0.05"] if self._number("dropout.lora", 0) < 0.05 else []
        rates = {key: self._number(f"dropout.{key}", 0) for key in ("attention", "feed_forward")}
        return [f"dropout.{key}={0.1 if rate < 0.1 else 0.2}" for key, rate in rates.items() if rate < 0.2]
