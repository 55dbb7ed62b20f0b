"""The rules as a table: `python -m qwlit.planning.preflight.table > docs/preflight.md`."""

from qwlit.planning.preflight import RULES

INTRO = """\
# Preflight

Rules over the settings, known from how runs die. `plan` prints what they find, and so does `train` at its start: an
error stops it with exit code 2 unless `preflight.allow=[NAME]` turns it into a warning; warnings are kept in
`events.jsonl`. A rule that needs data or tokenizer is silent where they are not reachable.

| rule | severity | why | source |
|---|---|---|---|
"""


def table() -> str:
    rows = (f"| `{rule.name}` | {rule.severity} | {rule.reason} | {rule.source} |\n" for rule in RULES.values())
    return INTRO + "".join(rows)


if __name__ == "__main__":
    print(table(), end="")
