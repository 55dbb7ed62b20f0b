"""What files of settings may do that somebody else has written: name values, and nothing more."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult
from omegaconf._utils import get_yaml_loader

from qwlit.core.errors import ConfigError
from qwlit.core.yaml_files import read_yaml

FILE_SCHEME = "file://"
RESOLVERS = ("oc.select",)
"""OmegaConf's functions that are allowed in a value: they read other settings and nothing else."""
BACKSLASH = "\\"
REFERENCE = re.compile(r"(?P<escapes>\\*)\$\{\s*(?P<name>[\w.\[\]-]*)\s*(?P<next>.?)", re.DOTALL)


def check_folders(folders: Any) -> list[str]:
    """Return the folders of hydra.searchpath.

    Raises:
        ConfigError: there is no such folder, or the entry is no folder; for `pkg://`, Hydra would import a package.
    """
    entries = folders if isinstance(folders, list) else [] if folders is None else [folders]
    for entry in entries:
        refuse_resolvers("hydra.searchpath", entry)
        scheme, separator, _ = str(entry).partition("://")
        if separator and f"{scheme}{separator}" != FILE_SCHEME:
            raise ConfigError(f"hydra.searchpath: {entry} is no folder; give one as {FILE_SCHEME}FOLDER")
        if not Path(str(entry).removeprefix(FILE_SCHEME)).is_dir():
            raise ConfigError(f"hydra.searchpath: {entry} is not a folder; give an existing one")
    return entries


def refuse_resolvers(key: str, value: Any, file: Path | None = None) -> None:
    """Refuse a text in the value that calls a function of OmegaConf, such as `${oc.env:NAME}`.

    Raises:
        ConfigError: with file, key and function.
    """
    for name, text in _texts(key, value):
        for found in REFERENCE.finditer(text):
            # An odd number of backslashes makes ${ plain text.
            if len(found["escapes"]) % 2 or found["next"] in ("}", ""):
                continue
            if found["next"] == ":" and found["name"] in RESOLVERS:
                continue
            called = found["name"] if found["next"] == ":" else f"{found[0].lstrip(BACKSLASH)}…"
            raise ConfigError(
                f"{f'{file}: ' if file else ''}{name}={text}: only references such as ${{seed}} are evaluated, not"
                f" {called}, with which a file of somebody else could read this machine's variables; write the value"
                f" itself, or type {name}=… with $NAME"
            )


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the texts in a value with their dotted keys."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(key, item)
    elif isinstance(value, str):
        yield key, value


class CheckedFiles(FileConfigSource):
    """Hydra's reader of the YAML files in a folder, which refuses a file that does more than name values."""

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path) / self._normalize_file_name(config_path)
        if file.is_file():
            try:
                tree = read_yaml(file, get_yaml_loader())
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise ConfigError(f"{file} cannot be read: {error}") from None
            refuse_resolvers("", tree, file)
        return super().load_config(config_path)


def check_files_of_folders() -> None:
    """Let Hydra read the files of hydra.searchpath through `CheckedFiles`. Call it when Hydra is initialized."""
    SourcesRegistry.instance().types["file"] = CheckedFiles
