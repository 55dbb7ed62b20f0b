"""What is known of how runs die, as rules over the settings: one function a rule, one file a theme."""

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
