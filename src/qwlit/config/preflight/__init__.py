"""What is known of how runs die, as rules over the settings: one function a rule, one file a theme."""

from qwlit.config.preflight import batch, data, machine, rate, regularization, watching
from qwlit.config.preflight.rules import RULES, DataFacts, Facts, Finding, TokenizerFacts, check_allowed, find, refuse

__all__ = [
    "RULES",
    "DataFacts",
    "Facts",
    "Finding",
    "TokenizerFacts",
    "batch",
    "check_allowed",
    "data",
    "find",
    "machine",
    "rate",
    "refuse",
    "regularization",
    "watching",
]
