"""Print the rules as a table: `python -m qwlit.planning.preflight.table > docs/preflight.md`."""

from qwlit.planning.preflight.rules import RULES

INTRO = """\
# Preflight

Rules over the settings, drawn from runs that failed. `plan` prints their findings, and so does `train` at its start. An
error stops `train` with exit code 2, unless `preflight.allow=[NAME]` turns it into a warning. Warnings are recorded in
`events.jsonl`. A rule that needs data or tokenizer finds nothing if they are not available.

| rule | severity | why | source |
|---|---|---|---|
"""


def table() -> str:
    """Return the text of docs/preflight.md."""
    lines = (f"| `{rule.name}` | {rule.severity} | {rule.reason} | {rule.source} |\n" for rule in RULES.values())
    return INTRO + "".join(lines)


if __name__ == "__main__":
    print(table(), end="")
