"""Read the groups of settings: the files in `conf/` and in folders of the user, composed by Hydra."""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwlit.config.overrides import show_value
from qwlit.config.relations import LENGTH, WARMUP
from qwlit.config.user_files import check_files_of_folders, check_folders
from qwlit.core.errors import ConfigError, nearest

MAIN = "train"
SWEEPS = "sweep"
"""Folder of sweep files for the subcommand `sweep`; not a group of settings."""


def conf_dir() -> Path:
    """Return the folder of the YAML files: `qwlit/conf` in a wheel, `conf/` in a checkout."""
    package = Path(__file__).parents[1]
    for candidate in (package / "conf", package.parents[1] / "conf"):
        if (candidate / f"{MAIN}.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"qwlit's conf folder is neither in {package} nor beside it")


def group_options() -> dict[str, list[str]]:
    """Return every group of the packaged folder with its choices."""
    groups = sorted(p for p in conf_dir().iterdir() if p.is_dir() and p.name != SWEEPS)
    return {group.name: sorted(p.stem for p in group.glob("*.yaml")) for group in groups}


def compose_groups(
    groups: dict[str, list[str]], chosen: dict[str, Any], typed: dict[str, Any]
) -> tuple[DictConfig, dict[str, str]]:
    """Compose the chosen files with Hydra. Return the tree, and the chosen file of every group.

    Args:
        groups: every packaged group with its choices.
    """
    if "data.path" in typed:
        # The user's own data also replace the demo's validation set and its exact-match check.
        chosen = {"data": "files"} | chosen
    hub_id = typed.get("model.hub_id")
    preset = next((name for name in groups["model"] if hub_id and packaged_hub_id(name) == hub_id), None)
    if preset:
        # The packaged file with this hub id has the architecture, so the hub is not needed.
        chosen = {"model": preset} | chosen
    if chosen.get("experiment", "") is None:
        # This is the default, and Hydra refuses it as an override.
        del chosen["experiment"]
    own_folders = check_folders(chosen.get("hydra.searchpath"))
    for group in [key for key in chosen if key in groups]:
        choice, options = chosen[group], groups[group]
        if choice is None:
            raise ConfigError(f"{group}=null: choose one of {', '.join(options)}")
        # If the user adds a folder of own files, only Hydra knows all choices.
        if choice not in options and not own_folders:
            hint = nearest(str(choice), options) or f" Choose one of {', '.join(options)}."
            raise ConfigError(f"{group}={show_value(choice)}: no such {group}.{hint}")
    overrides = tuple(f"{key}={choice!r}" for key, choice in chosen.items())
    if own_folders:
        return _read_groups(overrides)
    packaged = frozenset((str(file), file.stat().st_mtime_ns) for file in conf_dir().rglob("*.yaml"))
    return deepcopy(_read_packaged_groups(overrides, packaged))


@lru_cache(maxsize=32)
def _read_packaged_groups(
    overrides: tuple[str, ...], packaged: frozenset[tuple[str, int]]
) -> tuple[DictConfig, dict[str, str]]:
    """Keep what Hydra composed, because a sweep composes its settings hundreds of times, 0.1 s each.

    Args:
        packaged: path and time of every packaged file, so that an edited file is read again.
    """
    return _read_groups(overrides)


def _read_groups(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    """Compose the files of the groups that `overrides` choose."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), job_name="qwlit", version_base="1.3"):
            check_files_of_folders()
            composed = hydra_compose(MAIN, list(overrides), return_hydra_config=True)
            _clear_alternatives(composed, list(overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(one_line(error)) from None
    except RecursionError:
        raise ConfigError(f"{' '.join(overrides)}: a file of settings names itself in its defaults") from None
    choices = {k: v for k, v in composed.hydra.runtime.choices.items() if not k.startswith("hydra/")}
    return OmegaConf.masked_copy(composed, [k for k in composed if k != "hydra"]), choices


def _clear_alternatives(composed: DictConfig, overrides: list[str]) -> None:
    """Where files set both settings of a pair, keep those of the last file and set the other one to null.

    So an experiment's warmup_steps replaces a recipe's warmup_ratio, as a typed one does.
    """
    pairs = [pair for pair in (WARMUP, LENGTH) if all(OmegaConf.select(composed, key) is not None for key in pair)]
    if not pairs:
        return
    folders = [Path(source.path) for source in composed.hydra.runtime.config_sources if source.schema == "file"]
    for default in GlobalHydra.instance().config_loader().compute_defaults_list(MAIN, overrides, RunMode.RUN).defaults:
        files = (folder / f"{default.config_path.removesuffix('.yaml')}.yaml" for folder in folders)
        # Hydra's own settings are in no folder.
        content = next((OmegaConf.load(file) for file in files if file.is_file()), OmegaConf.create())
        for pair in pairs:
            in_file = {key: OmegaConf.select(content, key) for key in pair}
            if any(value is not None for value in in_file.values()):
                for key, value in in_file.items():
                    OmegaConf.update(composed, key, value)


def packaged_hub_id(name: str) -> str | None:
    """Return the hub id in a packaged model file."""
    text = (conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    hub_id: str | None = yaml.safe_load(text).get("hub_id")
    return hub_id


def one_line(error: BaseException) -> str:
    """Return the message without line breaks; Hydra's own error is empty where it wraps one of OmegaConf."""
    if not str(error) and error.__cause__:
        return one_line(error.__cause__)
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
