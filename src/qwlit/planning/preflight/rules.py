"""What a rule is, what it may look at, and what it finds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qwlit.config.run import RunConfig
from qwlit.core.errors import ConfigError, nearest
from qwlit.model.config import Execution
from qwlit.optim.schedules import Schedule
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.training.machine import Machine

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class DataFacts:
    """What tokenizing has shown."""

    supervised_share: float
    """Of the tokens to train on, 0 to 1."""
    cut_share: float
    """Of the rows: left out or cut because they are longer than data.max_seq_len."""
    longest: int
    """Tokens of the longest sample."""
    has_validation: bool


@dataclass(frozen=True)
class TokenizerFacts:
    pad_id: int | None
    eos_id: int | None
    num_tokens: int


@dataclass(frozen=True)
class PreflightFacts:
    """Everything a rule may look at. What was not reachable is None, and the rules about it are silent."""

    config: RunConfig
    machine: Machine
    execution: Execution
    compile_obstacle: str | None
    """Why layers are not compiled although they might."""
    num_parameters: int
    memory: MemoryEstimate
    schedule: Schedule | None
    """With the run's length in steps."""
    highest_lr: float
    """Peak of the group that has the highest."""
    data: DataFacts | None
    tokenizer: TokenizerFacts | None
    vocab_size: int
    context_length: int
    """Positions that the model was made for."""

    @property
    def trains_pretrained(self) -> bool:
        """Whether pretrained weights themselves are trained, by a step of AdamW's size (SGD's rates are others)."""
        config = self.config
        return config.adapter.kind == "none" and config.model.init == "pretrained" and config.optim.name != "sgd"


@dataclass(frozen=True)
class Finding:
    """What a rule has to say of a run."""

    name: str
    severity: Severity
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


Said = tuple[str, str] | None
"""Message and remedy, or nothing."""
Check = Callable[[PreflightFacts], Said]


@dataclass(frozen=True)
class Rule:
    """A rule as the table in docs/preflight.md has it."""

    name: str
    severity: Severity
    reason: str
    source: str
    check: Check


RULES: dict[str, Rule] = {}
GUIDE = "tuning guide for Qwen3-0.6B"
STORY = "Qwen2-7B-Instruct, inf and nan from step 3600"


def rule(severity: Severity, *, source: str) -> Callable[[Check], Check]:
    """Enter a function into the rules; its name is the rule's, its docstring the reason."""

    def enter(check: Check) -> Check:
        reason = " ".join((check.__doc__ or "").split())
        RULES[check.__name__] = Rule(check.__name__, severity, reason, source, check)
        return check

    return enter


def find(facts: PreflightFacts) -> list[Finding]:
    """Ask every rule; errors first. What `preflight.allow` names is a warning."""
    found = []
    for name, entry in RULES.items():
        said = entry.check(facts)
        if said is not None:
            severity = "warning" if name in facts.config.preflight.allow else entry.severity
            found.append(Finding(name, severity, *said))
    return sorted(found, key=lambda finding: finding.severity != "error")


def check_allowed(names: tuple[str, ...]) -> None:
    """Raise ConfigError for a name in `preflight.allow` that is no rule's."""
    for name in names:
        if name not in RULES:
            raise ConfigError(
                f"preflight.allow: there is no rule '{name}'.{nearest(name, RULES)} See docs/preflight.md"
            )


def refuse(findings: list[Finding]) -> None:
    """Raise ConfigError for the first error."""
    for finding in findings:
        if finding.severity == "error":
            raise ConfigError(f"{finding}; or preflight.allow=[{finding.name}] to run all the same")
