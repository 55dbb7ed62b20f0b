"""Rules over the settings, drawn from runs that failed: one function per rule, one file per topic."""

# Importing a topic registers its rules; their order here is the order of the findings.
from qwlit.planning.preflight import batch, data, hardware, learning_rate, regularization, validation  # noqa: F401
