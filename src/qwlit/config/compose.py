"""Turn command-line overrides into a checked RunConfig. Any mistake raises ConfigError with one line.

`groups` composes the files of the chosen groups, and the typed values replace the files' values. Then one check of the
whole tree against the dataclasses reports wrong names and values.
"""

import os
import re
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from qwlit.config.explain import explain
from qwlit.config.groups import compose_groups, group_options, one_line, packaged_hub_id
from qwlit.config.other_trainers import refuse_options_of_others
from qwlit.config.overrides import (
    MAPPINGS,
    TEXT_LISTS,
    agent_overrides,
    check_shell,
    read_overrides,
    repeated_keys,
)
from qwlit.config.relations import LENGTH, TEXTS, WARMUP, check_relations
from qwlit.config.run import RunConfig
from qwlit.config.settings import LONGEST_NAME, cut_name
from qwlit.config.user_files import refuse_resolvers
from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path
from qwlit.core.ranks import under_agent
from qwlit.core.yaml_files import read_yaml
from qwlit.data.config import parts_of
from qwlit.model.folder import base_of, is_adapter

GENERATION = "generation"
LITERAL = TEXTS | TEXT_LISTS | MAPPINGS.keys()
"""Typed settings that are taken as they are; in the values of others, OmegaConf reads `${…}`."""


@dataclass(frozen=True)
class Composed:
    """A checked configuration and the group choices that it was composed from."""

    config: RunConfig
    choices: dict[str, str]
    """Group → chosen file, e.g. recipe → full_sft; empty if `config=` named an earlier run's config.yaml."""
    typed: dict[str, Any]
    """Dotted key → value, of the settings that the user typed."""
    remarks: list[str]
    """Keys that are typed twice."""
    source: Path | None = None
    """The file that `config=` named."""


def check_arguments(arguments: list[str], own: Container[str] = ()) -> None:
    """Refuse arguments that no subcommand reads: options of other trainers, and lists that the shell took apart.

    Args:
        own: options of the subcommand that are not settings.

    Raises:
        ConfigError: saying what to type instead.
    """
    check_shell(arguments)
    others = [argument for argument in arguments if argument.lstrip("-").partition("=")[0] not in own]
    refuse_options_of_others(others, group_options())


def compose(overrides: list[str]) -> Composed:
    """Compose and check a run's configuration.

    Args:
        overrides: those that a user has typed went through `check_arguments`.

    Raises:
        ConfigError: naming the field, the rule and the nearest valid name.
    """
    overrides = agent_overrides(overrides) if under_agent() else overrides
    typed = read_overrides(overrides)
    refuse_resolvers("", {key: value for key, value in typed.items() if key not in LITERAL})
    groups = group_options()
    chosen = {key: typed.pop(key) for key in list(typed) if key in groups or key == "hydra.searchpath"}
    source = None
    if "config" in typed:
        source = resolve_path(str(typed["config"]))
        tree = _load_run(typed.pop("config"), chosen, groups)
        choices: dict[str, str] = {}
    else:
        tree, choices = compose_groups(groups, chosen, typed)
    settings = _with_typed(tree, typed)
    _replace_architecture(settings, typed, choices.get("model"), groups["model"])
    config = check(settings)
    check_relations(config)
    name = config.run.name or _default_name(config, choices)
    if under_agent() and "run.name" not in typed:
        # Each trial of a W&B sweep needs its own folder. A resumed trial has the same id, so it gets the same folder.
        trial = f"-{os.environ['WANDB_RUN_ID']}"
        name = cut_name(name, LONGEST_NAME - len(trial)) + trial
    config = replace(config, run=replace(config.run, name=name))
    return Composed(config, choices, typed, repeated_keys(overrides), source)


def _load_run(path: Any, chosen: dict[str, Any], groups: dict[str, list[str]]) -> DictConfig:
    """Load an earlier run's config.yaml; `generation=` may still choose how its model answers."""
    file = resolve_path(str(path))
    if not file.is_file():
        raise ConfigError(f"config={path}: no such file; give runs/NAME/config.yaml")
    for key, choice in chosen.items():
        if key != GENERATION:
            raise ConfigError(f"{key}={choice}: config={path} has fixed all groups; set single values")
    try:
        # `dump` writes values, never interpolations, and `OmegaConf.load` refuses a text such as "${". Its own loader
        # reads 1e-4 as a number, unlike yaml's, and is not public.
        tree = _literal(read_yaml(file, get_yaml_loader()))
    except (OSError, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={path} cannot be read: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config={path} is not a run's config.yaml; give runs/NAME/config.yaml")
    if GENERATION in chosen:
        tree[GENERATION] = compose_groups(groups, chosen, {})[0][GENERATION]
    return OmegaConf.create(tree)


def _with_typed(tree: DictConfig, typed: dict[str, Any]) -> Any:
    """Put the typed values into the tree, and resolve interpolations."""
    try:
        for key, value in (_cleared(typed) | typed).items():
            # A wrong name is added, too: `check` then refuses it with the nearest valid name.
            # A typed mapping replaces the earlier one; merged, names that the user left out would stay.
            literal = _literal(value) if key in LITERAL else value
            OmegaConf.update(tree, key, literal, force_add=True, merge=key not in MAPPINGS)
        return OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(one_line(error)) from None


def _literal(value: Any) -> Any:
    """Escape the texts in a value, so that OmegaConf reads no `${…}` in them as an interpolation."""
    if isinstance(value, dict):
        return {name: _literal(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    # Backslashes before "${" escape each other.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _cleared(typed: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a typed setting replaces: a typed warmup_steps sets the recipe's warmup_ratio to null.

    A typed warm-up also lifts the recipe's cap on it.
    """
    cleared: dict[str, Any] = {}
    for first, second in (WARMUP, LENGTH):
        if typed.get(first) is not None:
            cleared[second] = None
        if typed.get(second) is not None:
            cleared[first] = None
    if any(key in typed for key in WARMUP):
        cleared["scheduler.max_warmup_ratio"] = 1.0
    return cleared


def _replace_architecture(tree: dict[str, Any], typed: dict[str, Any], chosen: str | None, packaged: list[str]) -> None:
    """Drop the architecture of the chosen model file if a folder or another hub id names the model.

    Raises:
        ConfigError: a typed architecture would have no effect, or the base of an adapter was not found.
    """
    model = tree.get("model")
    if not isinstance(model, dict):
        return
    path, hub_id = model.get("path"), model.get("hub_id")
    is_other = hub_id is not None and ("model.hub_id" in typed or chosen is not None)
    if is_other and chosen is not None:
        # A model file of the user has its own hub id and architecture.
        is_other = chosen in packaged and packaged_hub_id(chosen) != hub_id
    if not path and not is_other:
        return
    if useless := next((key for key in typed if key.startswith("model.architecture")), None):
        origin = f"model.path={path}" if path else f"model.hub_id={hub_id}"
        raise ConfigError(
            f"{useless} has no effect beside {origin}, whose config.json has the architecture; leave it out"
        )
    model["architecture"] = None
    if path:
        model["hub_id"] = None
        if isinstance(path, str) and is_adapter(resolve_path(path)) and not model.get("adapter_path"):
            model |= {"adapter_path": path} | base_of(resolve_path(path))


def check(tree: dict[str, Any]) -> RunConfig:
    """Check the whole tree against the dataclasses.

    Raises:
        ConfigError: for the first mistake.
    """
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, list(group_options()))) from None


def dump(config: RunConfig) -> str:
    """Return the configuration as YAML; `config=` reads it back to an equal one."""
    # Unlike yaml's, it puts quotes around texts that OmegaConf's loader reads as numbers, such as 5e1.
    text: str = OmegaConf.to_yaml(OmegaConf.create(_literal(as_tree(config))), resolve=True)
    return text


def as_tree(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested dicts of JSON values."""
    tree: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return tree


def _default_name(config: RunConfig, choices: dict[str, str]) -> str:
    """Return the experiment's name, or model-recipe-data, so that the same command finds the same run."""
    data, model = choices.get("data", "data"), choices.get("model", "model")
    if data == "files":
        data = "-".join(resolve_path(part.path).stem for part in parts_of(config.data.path)[:3])
    source = config.model.adapter_path or config.model.path
    if source is None and config.model.architecture is None:
        source = config.model.hub_id
    if source:
        model = resolve_path(source).name
    name = choices.get("experiment") or f"{model}-{choices.get('recipe', 'recipe')}-{data}"
    return cut_name(re.sub(r"[^\w.-]+", "_", name).lstrip("._-"))
