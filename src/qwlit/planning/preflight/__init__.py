"""Rules over the settings, drawn from runs that failed: one function per rule, one file per topic."""

from qwlit.planning.preflight import batch, data, hardware, learning_rate, regularization, validation
from qwlit.planning.preflight.rules import (
    RULES,
    DataFacts,
    Finding,
    PreflightFacts,
    TokenizerFacts,
    check_allowed,
    find,
    refuse,
)

__all__ = [
    "RULES",
    "DataFacts",
    "Finding",
    "PreflightFacts",
    "TokenizerFacts",
    "batch",
    "check_allowed",
    "data",
    "find",
    "hardware",
    "learning_rate",
    "refuse",
    "regularization",
    "validation",
]
