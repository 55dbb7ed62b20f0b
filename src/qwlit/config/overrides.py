"""Read and write overrides, `key=value`. Hydra's grammar reads the values; text that it cannot read stays as typed."""

import itertools
import re
import shlex
from collections.abc import Iterable
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
FREE_TEXTS = TEXTS - PATHS - {"run.name"}
"""Settings whose text may have any brackets and commas."""
VERBATIM = TEXTS | {"config"}
"""Settings of text, and the path of an earlier run's settings."""
BRACKETS = {"[": "]", "{": "}"}
FULL_WIDTH = str.maketrans("，：；＝“”‘’【】［］｛｝（）％", ",:;=\"\"''[][]{}()%")
"""Punctuation of Chinese input methods, and what is meant in an override."""
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
        if argument.strip() in ("", "\\"):
            raise ConfigError(
                f"{argument!r} is no override: nothing, not even a blank, may follow a \\ at the end of a line, and a"
                " shell variable must be set"
            )
        if argument[:1] == "=" and at > 0:
            value = "".join(arguments[at : at + (2 if argument == "=" else 1)])
            raise ConfigError(f"leave out the blanks around =, {arguments[at - 1]}{value}")
        key, _, value = argument.partition("=")
        following = list(itertools.takewhile(_is_plain_word, arguments[at + 1 :]))
        if following and (argument.endswith("=") or (key in TEXTS and value[:1] not in BRACKETS)):
            _refuse_blanks(key, value, following)
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


def _is_plain_word(argument: str) -> bool:
    """Whether the argument is no override, option or settings file."""
    return "=" not in argument and argument[:1] != "-" and not argument.endswith((".yaml", ".yml"))


def _refuse_blanks(key: str, value: str, following: list[str]) -> None:
    """Refuse a text that the shell split at its blanks, several files, and a blank behind `=`."""
    if not value:
        raise ConfigError(f"leave out the blanks around =, {key}={following[0]}")
    if key in PATHS:
        raise ConfigError(
            f"{' '.join(following)} is no override; for several files: '{key}=[{','.join([value, *following])}]'"
        )
    whole = " ".join([f"{key}={value}", *following])
    raise ConfigError(f"the shell split {whole} at its blanks; put quotes around it, {shlex.quote(whole)}")


def full_width_remark(arguments: list[str], message: str) -> str:
    """Return which full-width punctuation an argument has that the error message shows; empty if there is none."""
    for part in itertools.chain.from_iterable(re.split(r"[=,\[\]{}]", argument) for argument in arguments):
        found = next((letter for letter in part if ord(letter) in FULL_WIDTH), None)
        if found and part.strip() in message:
            return f" ({found} is a full-width character; type {found.translate(FULL_WIDTH)})"
    return ""


def _is_closed(text: str) -> bool:
    return all(text.count(opening) <= text.count(closing) for opening, closing in BRACKETS.items())


def repeated_keys(arguments: Iterable[str]) -> list[str]:
    """Return a remark for each key that is typed twice with different values."""
    typed: dict[str, str] = {}
    remarks = []
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        earlier = typed.get(key, value)
        if equals and earlier != value:
            remedy = f"; for several files: '{key}=[{earlier},{value}]'" if key in PATHS else ""
            remarks.append(f"{key} is typed twice ({earlier}, {value}), and the last one counts{remedy}")
        typed[key] = value
    return remarks


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
        try:
            key, value = _read(text)
        except ConfigError:
            raise
        except (RecursionError, ValueError):
            # The grammar reads brackets by recursion, and Python reads no number of more than 4,300 digits.
            key = text.partition("=")[0]
            raise ConfigError(f"{key}: the value has too many brackets in brackets, or a number too long") from None
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
    if key not in FREE_TEXTS | TEXT_LISTS:
        _refuse_miswritten(key, typed)
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
        return key, _read_unreadable(key, typed, quoted)
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


def _refuse_miswritten(key: str, typed: str) -> None:
    """Refuse what other languages allow in a value, and what reads as a part of the value here."""
    if typed.endswith(","):
        raise ConfigError(f"{key}={typed} has a comma at the end; leave it out")
    if found := re.search(r"\{[^{}]*?(\w+)=", typed):
        raise ConfigError(f"{key}={typed}: inside braces write {found[1]}:…, not {found[1]}=")
    if key != "data.columns" and re.fullmatch(r"\{[^{}:]+\}", typed):
        raise ConfigError(f"{key}={typed}: write a list with brackets, '{key}=[{typed[1:-1]}]'")
    if key == "hardware.devices" and ("," in typed or typed.startswith("[")):
        raise ConfigError(f"{key}={typed}: it is the number of devices; choose them with CUDA_VISIBLE_DEVICES")
    if key in PATHS | {"logger.tags"} or key.startswith("hydra.") or re.search("['\"{]", typed):
        return
    if typed.startswith("[") and any(" " in item.strip() for item in typed.strip("[]").split(",")):
        raise ConfigError(f"{key}={typed}: separate the items with commas, {re.sub('[ ,]+', ',', typed)}")


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


def _read_unreadable(key: str, typed: str, quoted: str) -> Any:
    """Return a value that Hydra's grammar cannot read: a list of text for another program, else the text itself.

    Args:
        quoted: the value with quotes around the items that have other letters.

    Raises:
        ConfigError: a bracket is missing, or an item of a list needs quotes.
    """
    if key not in FREE_TEXTS and len(typed) > 1 and typed[0] in BRACKETS and not _is_closed(typed):
        raise ConfigError(f"{key}={typed}: {BRACKETS[typed[0]]} is missing at the end")
    if typed.startswith("[") and key in TEXT_LISTS:
        return read_list(typed)
    _refuse_unreadable(key, quoted)
    return typed


def _refuse_unreadable(key: str, typed: str) -> None:
    """Refuse a list or mapping that cannot be read, and name the item that needs quotes."""
    if typed[:1] not in BRACKETS:
        return
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
