"""Print the options of other trainers as tables, the end of docs/coming-from.md."""

import re
from collections.abc import Iterable

from qwlit.config.other_trainers_options import NOT_YET, OTHERS, TRAINERS, Option, read_table

COMMANDS = """\
## Subcommands

| theirs | here |
|---|---|
"""
OVERRIDE = re.compile(r"'[\w.]+=[^']+'|(?<![`\w'])[\w.]+=(?:\[[^\]]+\]|[^\s,;)]+)")


def tables() -> str:
    """Return the end of docs/coming-from.md: the subcommands, then one table of options for each topic."""
    table = read_table()
    commands = "".join(f"| `{name}` | {_as_code(answer)} |\n" for name, answer in table["commands"].items())
    topics = (_topic(topic, options) for topic, options in table["options"].items())
    return COMMANDS + commands + "".join(topics)


def _topic(topic: str, options: Iterable[Option]) -> str:
    columns = [*TRAINERS.values(), "others", "here"]
    head = f"\n## {topic}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "".join(f"| {' | '.join(_row(option))} |\n" for option in options)


def _row(option: Option) -> list[str]:
    names = [" ".join(f"`{name}`" for name in option.names.get(trainer, ())) for trainer in (*TRAINERS, OTHERS)]
    return [*names, _here(option)]


def _here(option: Option) -> str:
    """Return what the option is here: the setting, the values that differ, and what is missing."""
    ours = " or ".join(f"`{name}`" for name in option.ours.format(value="…").split(" or ")) if option.ours else ""
    others = "other values: " if (option.values or option.patterns) and option.instead.startswith(NOT_YET) else ""
    instead = _as_code(f"{others}{option.instead}")
    texts = [ours, *_values(option), instead, _as_code(option.note)]
    return "; ".join(text for text in texts if text).replace("|", "\\|")


def _values(option: Option) -> list[str]:
    """Return the values with their answers; values with the same answer together."""
    by_answer: dict[str, list[str]] = {}
    for value, answer in option.values.items():
        by_answer.setdefault(answer, []).append(f"`{value}`")
    return [f"{', '.join(values)}: {_as_code(answer)}" for answer, values in by_answer.items()]


def _as_code(text: str) -> str:
    return OVERRIDE.sub(lambda found: f"`{found[0]}`", text)


if __name__ == "__main__":
    print(tables(), end="")
