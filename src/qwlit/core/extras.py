"""Packages that only some settings need, see `optional-dependencies` in pyproject.toml."""

import importlib
from typing import Any

from qwlit.core.errors import ConfigError, first_line


def import_extra(*modules: str, package: str, setting: str) -> Any:
    """Import the first of the modules that is there; each serves the setting alike.

    Raises:
        ConfigError: none can be imported; the error says what to install.
    """
    reason = ""
    for module in modules:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            reason = first_line(error)
    raise ConfigError(f"{setting} needs a package ({reason}); run pip install {package}")
