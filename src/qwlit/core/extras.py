"""Packages that only some settings need, see `optional-dependencies` in pyproject.toml."""

import importlib
from typing import Any

from qwlit.core.errors import ConfigError, first_line


def import_extra(module: str, *, package: str, setting: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ConfigError: it cannot be imported; the error says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{setting} needs a package ({first_line(error)}); run pip install {package}") from None
