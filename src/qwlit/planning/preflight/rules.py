"""The rules' types, the facts that they read, and the function that runs all rules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qwlit.config.overrides import format_value
from qwlit.config.run import RunConfig
from qwlit.core.errors import ConfigError, nearest
from qwlit.model.config import Execution
from qwlit.optim.kinds import OPTIMIZERS
from qwlit.optim.schedules import Schedule

if TYPE_CHECKING:
    # They import torch, which takes seconds, and `preflight.allow` is checked before.
    from qwlit.planning.memory.estimate import MemoryEstimate
    from qwlit.planning.saves import SavePlan
    from qwlit.training.machine import Machine

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class DataFacts:
    """Facts about the tokenized data."""

    supervised_share: float
    """Supervised tokens / tokens of the training data, 0 to 1."""
    cut_share: float
    """Share of the rows that are left out or cut because they are longer than data.max_seq_len, 0 to 1."""
    longest: int
    """Number of tokens of the longest sample."""
    has_validation: bool


@dataclass(frozen=True)
class TokenizerFacts:
    pad_id: int | None
    eos_id: int | None
    num_tokens: int


@dataclass(frozen=True)
class PreflightFacts:
    """Everything that a rule may read. A fact is None if it is not available; rules that need it then return None."""

    config: RunConfig
    typed: Mapping[str, Any]
    """Dotted key → value, of the settings that the user typed."""
    machine: "Machine"
    execution: Execution
    compile_obstacle: str | None
    """Why hardware.compile=auto does not compile the layers; None if it does."""
    num_parameters: int
    memory: "MemoryEstimate"
    bytes_by_phase: Mapping[str, float]
    """The memory of each phase of the run on one device, see `memory.whole_run`."""
    saves: "SavePlan"
    schedule: Schedule | None
    """Learning-rate schedule with the number of steps."""
    highest_lr: float
    """The highest peak learning rate of all parameter groups."""
    data: DataFacts | None
    tokenizer: TokenizerFacts | None
    vocab_size: int
    context_length: int
    """Number of positions that the model was trained for."""

    def as_typed(self, *keys: str) -> str | None:
        """Return the first of these settings that the user typed, as key=value; None if none was typed."""
        return next((f"{key}={format_value(self.typed[key])}" for key in keys if key in self.typed), None)

    @property
    def trains_pretrained(self) -> bool:
        """Whether the run trains pretrained weights themselves, and its optimizer diverges where AdamW does."""
        config = self.config
        trains_base = config.adapter.kind == "none" and config.model.init == "pretrained"
        return trains_base and OPTIMIZERS[config.optim.name].has_adamw_lr_limit


@dataclass(frozen=True)
class Finding:
    """The message of a rule about a run, with the remedy."""

    name: str
    severity: Severity
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


Result = tuple[str, str] | None
"""Message and remedy, or None if the rule finds nothing."""
Check = Callable[[PreflightFacts], Result]


@dataclass(frozen=True)
class Rule:
    """A rule: one line of the table in docs/preflight.md."""

    name: str
    severity: Severity
    reason: str
    source: str
    check: Check


RULES: dict[str, Rule] = {}
GUIDE = "tuning guide for Qwen3-0.6B"
FAILED_RUN = "Qwen2-7B-Instruct, inf and nan from step 3600"


def rule(severity: Severity, *, source: str) -> Callable[[Check], Check]:
    """Register a function as a rule. Its name is the rule's name, its docstring the reason."""

    def register(check: Check) -> Check:
        reason = " ".join((check.__doc__ or "").split())
        RULES[check.__name__] = Rule(check.__name__, severity, reason, source, check)
        return check

    return register


def run_rules(facts: PreflightFacts) -> list[Finding]:
    """Return the findings of all rules, errors first. Rules in `preflight.allow` only warn."""
    found = []
    for name, entry in RULES.items():
        result = entry.check(facts)
        if result is not None:
            severity = "warning" if name in facts.config.preflight.allow else entry.severity
            found.append(Finding(name, severity, *result))
    return sorted(found, key=lambda finding: finding.severity != "error")


def check_allowed(names: tuple[str, ...]) -> None:
    """Raise ConfigError if a name in `preflight.allow` is not the name of a rule."""
    for name in names:
        if name not in RULES:
            raise ConfigError(
                f"preflight.allow: there is no rule '{name}'.{nearest(name, RULES)} See docs/preflight.md"
            )


def refuse(findings: list[Finding]) -> None:
    """Raise ConfigError for the first finding that is an error."""
    for finding in findings:
        if finding.severity == "error":
            raise ConfigError(f"{finding}; or set preflight.allow=[{finding.name}] to run anyway")
