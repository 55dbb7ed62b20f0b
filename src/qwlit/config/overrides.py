"""Read and write overrides, `key=value`. Hydra's grammar reads the values; text that it cannot read stays as typed."""

import re
import shlex
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from qwlit.config.relations import TEXTS
from qwlit.core.errors import ConfigError
from qwlit.core.lists import read_list
from qwlit.training.config import WANDB_CONFIG_KEY

PATHS = {"data.path", "data.val_path"}
"""Settings of text that may also be lists."""
MAPPINGS = {
    "data.columns": "{instruction: question, output: answer}",
    "data.val_path": "{math: a.jsonl, chat: b.jsonl}",
}
"""Settings that may be a mapping, each with an example."""
TEXT_LISTS = {"slurm.options", "slurm.setup", "slurm.mounts"}
"""Lists of text for other programs. Hydra's grammar cannot read [--mem=5G]."""
VERBATIM = TEXTS | {"config"}
"""Settings of text, and the path of an earlier run's settings."""
BRACKETS = {"[": "]", "{": "}"}
LEAVES = re.compile(r"""'[^']*'|"[^"]*"|[^\[\]{},]+""")
"""The items inside of lists and mappings, each mapping's with its key."""
# Hydra's grammar knows only ASCII letters. This finds what is quoted (group 1), and unquoted text with other letters.
NON_ASCII = re.compile(r"""('[^']*'|"[^"]*")|[^\[\]{},:'"\s]*[^\x00-\x7f][^\[\]{},:'"]*""")
# W&B's agent passes the whole W&B config of a resumed trial: also the keys of qwlit and of the client.
NO_SETTINGS = (WANDB_CONFIG_KEY, "_wandb", "wandb_version")
# The agent writes Python's None, alone or inside a list, where YAML needs null.
NONE = re.compile(r"(?<=[=\[, ])None(?=$|[\], ])")


def agent_overrides(arguments: list[str]) -> list[str]:
    """Return those of the W&B agent's arguments that are settings, written as a user types them."""
    return [NONE.sub("null", argument) for argument in arguments if argument.partition("=")[0] not in NO_SETTINGS]


def check_shell(arguments: list[str]) -> None:
    """Refuse what a shell leaves of an override without quotes, and carriage returns of Windows files.

    Raises:
        ConfigError: with the override in quotes.
    """
    for at, argument in enumerate(arguments):
        if argument.endswith("\r"):
            raise ConfigError(
                f"{argument!r} ends with a carriage return; give the file with this command Unix line ends (dos2unix)"
            )
        key, _, value = argument.partition("=")
        if value[:1] in BRACKETS and not _is_closed(value) and at + 1 < len(arguments):
            _refuse_split(arguments[at:])
        expanded = [other for other in arguments if other.startswith(f"{key}=") and other != argument]
        # data.columns explains itself what braces without quotes become.
        if expanded and key != "data.columns" and re.match(r"\[?(?!hf:|qwlit:|file:)\w+:", value):
            raise ConfigError(
                f"{key} is typed several times ({argument}, {expanded[0]}): the shell expanded the braces; put the"
                f" override into quotes, '{key}=…'"
            )


def _refuse_split(arguments: list[str]) -> None:
    """Refuse an override that the shell split at its blanks, if the next arguments close its bracket."""
    whole = arguments[0]
    for argument in arguments[1:]:
        whole += f" {argument}"
        if _is_closed(whole.partition("=")[2]):
            raise ConfigError(f"the shell split {whole} at its blanks; put quotes around it, {shlex.quote(whole)}")


def _is_closed(text: str) -> bool:
    return all(text.count(opening) <= text.count(closing) for opening, closing in BRACKETS.items())


def read_overrides(overrides: list[str]) -> dict[str, Any]:
    """Return dotted key → value. If a key is typed twice, the later value counts.

    Raises:
        ConfigError: an override is not key=value, or is a form of Hydra's that a run cannot use.
    """
    typed = {}
    for text in overrides:
        if text.startswith("~"):
            raise ConfigError(f"'{text}': settings cannot be deleted; set a value instead")
        if text.find("=") < 1:
            raise ConfigError(f"'{text}': overrides have the form key=value, e.g. optim.lr=1e-5")
        key, value = _read(text)
        typed[key] = value
    return typed


def _read(text: str) -> tuple[str, Any]:
    """Return key and value. A value that the grammar cannot read is text, e.g. the path in data.path=it's(1).jsonl."""
    parser = OverridesParser.create()
    typed_key, _, typed = text.partition("=")
    try:
        key = parser.parse_override(f"{typed_key}=").get_key_element().lstrip("+")
    except HydraException:
        raise ConfigError(f"'{text}' cannot be read as key=value") from None
    if key == "data.path" and typed.startswith("{"):
        raise ConfigError(f"'{text}': give the parts as a list, [{{path:…,weight:…}},…]")
    is_list = typed.startswith("[")
    is_mapping = key in MAPPINGS and typed.startswith("{")
    if is_mapping:
        _refuse_twice(key, typed)
    has_items = is_list or is_mapping
    quoted = NON_ASCII.sub(lambda found: found[1] or repr(found[0].rstrip()), typed) if has_items else typed
    try:
        override = parser.parse_override(f"{key}={quoted}")
    except HydraException:
        if is_mapping:
            return key, _read_mapping(key, typed)
        if is_list and key in TEXT_LISTS:
            return key, read_list(typed)
        _refuse_unreadable(key, quoted)
        return key, typed
    value = override.value()
    if is_mapping and isinstance(value, dict):
        # A name such as true or null is a text too.
        return key, {format_value(name): item for name, item in value.items()}
    is_quoted = isinstance(value, str) and typed[:1] in ("'", '"')
    if key in VERBATIM and not (value is None or is_quoted or (key in PATHS and isinstance(value, list))):
        # The grammar reads 2024_01 as a number and \( as (, but a text setting is what is typed, without blanks around.
        return key, typed.strip(" \t")
    if override.is_sweep_override():
        raise ConfigError(f"'{text}' gives several values, but a run takes one; write a list as [a,b]")
    return key, value


def _refuse_twice(key: str, typed: str) -> None:
    """Refuse a mapping that has a name twice: of the two values, a reader would keep only the last one."""
    try:
        node = yaml.compose(typed, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return
    # YAML reads name:value without a blank as a name.
    names = [name.value.partition(":")[0] for name, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{key}={typed}: {name} is given twice")


def _read_mapping(key: str, typed: str) -> dict[Any, Any]:
    """Read a mapping of texts that Hydra's grammar cannot read, e.g. with other letters or brackets.

    Raises:
        ConfigError: it is no mapping; without quotes, the shell passes only a part of it.
    """
    try:
        value = yaml.load(typed, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{key}={typed} is not a whole mapping; put quotes around it, '{key}={MAPPINGS[key]}', and inside it"
            " other quotes around a name with brackets"
        )
    return value


def _refuse_unreadable(key: str, typed: str) -> None:
    """Refuse a list or mapping that cannot be read, and name the item that needs quotes."""
    if typed[:1] not in BRACKETS:
        return
    if key in PATHS and not _is_closed(typed):
        raise ConfigError(f"{key}={typed}: {BRACKETS[typed[0]]} is missing at the end")
    for item in LEAVES.findall(typed):
        value = re.sub(r"^\w+:", "", item.strip()).strip() if "{" in typed else item.strip()
        try:
            OverridesParser.create().parse_override(f"{key}={value}")
        except HydraException:
            quoted = shlex.quote(f"{key}={typed}".replace(value, f'"{value}"'))
            raise ConfigError(
                f"{key}={typed}: the item {value} needs quotes, and the override as well: {quoted}"
            ) from None


def show_value(value: Any) -> str:
    """Write a value as typed; with quotes and escapes if it has blanks at its ends, quotes or control characters."""
    text = format_value(value)
    return text if text.isprintable() and text == text.strip() and not re.search("['\"]", text) else repr(text)


def format_value(value: Any) -> str:
    """Write a value as a user types it in an override: null, true, [a,b]."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{format_value(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
