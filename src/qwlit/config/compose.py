"""Turn command-line overrides into a checked RunConfig. Any mistake raises ConfigError with one line.

Hydra composes groups and files. Every value override is passed with `++`, so that Hydra accepts any name. The one check
of the whole tree against the dataclasses then reports wrong names, with the nearest valid name.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from qwlit.config.explain import explain
from qwlit.config.relations import TEXTS, check_relations
from qwlit.config.run import RunConfig
from qwlit.config.trial import agent_overrides, trial_name
from qwlit.core.errors import ConfigError, nearest
from qwlit.core.files import resolve_path
from qwlit.core.lists import read_list
from qwlit.core.ranks import under_agent
from qwlit.data.config import parts_of
from qwlit.model.folder import base_of, is_adapter

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


@dataclass(frozen=True)
class Composed:
    """A checked configuration and the group choices that it was composed from."""

    config: RunConfig
    choices: dict[str, str]
    """Group → chosen file, e.g. recipe → full_sft; empty if `config=` named an earlier run's config.yaml."""


def group_options() -> dict[str, list[str]]:
    """Return every group of the packaged folder with its choices."""
    groups = sorted(p for p in conf_dir().iterdir() if p.is_dir() and p.name != SWEEPS)
    return {group.name: sorted(p.stem for p in group.glob("*.yaml")) for group in groups}


def compose(overrides: list[str]) -> Composed:
    """Compose and check a run's configuration.

    Raises:
        ConfigError: naming the field, the rule and the nearest valid name.
    """
    parsed = _parse(agent_overrides(overrides) if under_agent() else overrides)
    typed = {o.key_or_group: o for o in parsed}
    base = typed.pop("config", None)
    tree, choices = _from_run(base.value(), typed) if base else _from_groups(typed)
    _clear_alternatives(tree, typed)
    _replace_architecture(tree, typed, choices.get("model"))
    config = check(tree)
    check_relations(config)
    config = _with_default_name(config, choices)
    if under_agent() and "run.name" not in typed:
        config = _named(config, trial_name(str(config.run.name)))
    return Composed(config=config, choices=choices)


def _parse(overrides: list[str]) -> list[Override]:
    """Parse the overrides and refuse Hydra's forms that a run cannot use: several values, and deletions."""
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"'{text}': overrides have the form key=value, e.g. optim.lr=1e-5")
        override = _read(text)
        if override.is_sweep_override():
            raise ConfigError(f"'{text}' gives several values, but a run takes one; write a list as [a,b]")
        if override.is_delete():
            raise ConfigError(f"'{text}': settings cannot be deleted; set a value instead")
        parsed.append(override)
    return parsed


LISTS = {"data.path", "data.val_path"}
"""Settings of text that may also be lists."""
OF_TEXTS = {"slurm.options", "slurm.setup", "slurm.mounts"}
"""Lists of text for other programs: Hydra's grammar cannot read [--mem=5G]."""
# Hydra's grammar knows only ASCII letters, so list items with other letters are quoted.
FOREIGN = re.compile(r"""[^\[\]{},:'"\s]*[^\x00-\x7f][^\[\]{},:'"]*""")


def _read(text: str) -> Override:
    """Read one override. A value that Hydra's grammar cannot read (data.path=数据.jsonl) is quoted and read as text."""
    parser = OverridesParser.create()
    key, _, value = text.partition("=")
    if key.lstrip("+") in LISTS and value.startswith("{"):
        raise ConfigError(f"'{text}': give the parts as a list, [{{path:…,weight:…}},…]")
    if key.lstrip("+") in LISTS and value.startswith("["):
        text = f"{key}={FOREIGN.sub(lambda match: repr(match.group()), value)}"
    try:
        override = parser.parse_override(text)
        # For a text setting, 2024_01 is a name, although YAML reads a number: quote it below.
        is_list = override.key_or_group in LISTS and isinstance(override.value(), list)
        if override.key_or_group not in TEXTS or is_list or isinstance(override.value(), str | None):
            return override
    except HydraException:
        pass
    if key.lstrip("+") in OF_TEXTS and value.startswith("["):
        quoted = f"[{','.join(_quoted(item) for item in read_list(value))}]"
    else:
        quoted = _quoted(value)
    try:
        return parser.parse_override(f"{key}={quoted}")
    except HydraException:
        raise ConfigError(f"'{text}' cannot be read as key=value") from None


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _from_groups(typed: dict[str, Override]) -> tuple[dict[str, Any], dict[str, str]]:
    """Compose the group files and the typed values with Hydra. Return the tree and the chosen files."""
    if "data.path" in typed and "data" not in typed:
        # The user's own data also replace the demo's validation set and its exact-match check.
        typed = {"data": _parse(["data=files"])[0], **typed}
    if "model.hub_id" in typed and "model" not in typed:
        # The packaged file with this hub id has the architecture, so the hub is not needed.
        wanted = typed["model.hub_id"].value()
        preset = next((name for name in group_options()["model"] if wanted and _packaged_hub_id(name) == wanted), None)
        typed = typed if preset is None else {"model": _parse([f"model={preset}"])[0], **typed}
    for folder in typed["hydra.searchpath"].value() if "hydra.searchpath" in typed else []:
        if str(folder).startswith("file://") and not Path(str(folder).removeprefix("file://")).is_dir():
            raise ConfigError(f"hydra.searchpath: {folder} is not a folder; give an existing one")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), job_name="qwlit", version_base="1.3"):
            # experiment=null is the default, and Hydra refuses it as an override.
            chosen = [o for o in typed.values() if (o.key_or_group, o.value()) != ("experiment", None)]
            overrides = [_as_hydra(o, user_files="hydra.searchpath" in typed) for o in chosen]
            composed = hydra_compose(MAIN, overrides, return_hydra_config=True)
            choices = {k: v for k, v in composed.hydra.runtime.choices.items() if not k.startswith("hydra/")}
            tree: Any = OmegaConf.to_container(
                OmegaConf.masked_copy(composed, [k for k in composed if k != "hydra"]), resolve=True
            )
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(_one_line(error)) from None
    return tree, choices


def _as_hydra(override: Override, *, user_files: bool) -> str:
    """Return the override for Hydra: check a group choice, and prefix a value with `++`."""
    key, line = override.key_or_group, str(override.input_line).lstrip("+")
    if key.startswith("hydra."):
        return line
    options = group_options().get(key)
    if options is None:
        return f"++{line}"
    choice = override.value()
    if choice is None and key != "experiment":
        raise ConfigError(f"{key}=null: choose one of {', '.join(options)}")
    # If the user adds a folder of own files, only Hydra knows all choices.
    if choice is not None and choice not in options and not user_files:
        hint = nearest(str(choice), options) or f" Choose one of {', '.join(options)}."
        raise ConfigError(f"{key}={choice}: no such {key}.{hint}")
    return line


def _from_run(path: Any, typed: dict[str, Override]) -> tuple[dict[str, Any], dict[str, str]]:
    """Load an earlier run's config.yaml and apply the typed values."""
    file = resolve_path(str(path))
    if not file.is_file():
        raise ConfigError(f"config={path}: no such file; give a run's config.yaml")
    try:
        tree = OmegaConf.load(file)
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"config={path} is not a run's config.yaml")
        for key, override in typed.items():
            if key in group_options() and "." not in key:
                raise ConfigError(f"{key}={override.value()}: config={path} has fixed all groups; set single values")
            OmegaConf.update(tree, key, override.value(), force_add=True)
        container: Any = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={path} cannot be read: {_one_line(error)}") from None
    return container, {}


PAIRS = (("scheduler.warmup_steps", "scheduler.warmup_ratio"), ("train.max_steps", "train.max_epochs"))


def _clear_alternatives(tree: dict[str, Any], typed: dict[str, Override]) -> None:
    """Let a typed value clear the recipe's other key of the pair, e.g. warmup_steps clears warmup_ratio.

    A typed warm-up also lifts the recipe's cap on it.
    """
    if all(key in typed and typed[key].value() is not None for key in PAIRS[0]):
        raise ConfigError("scheduler.warmup_steps and scheduler.warmup_ratio are both set; give one of them")
    for pair in PAIRS:
        for key, other in (pair, pair[::-1]):
            if key in typed and typed[key].value() is not None and other not in typed:
                section, name = other.split(".")
                if isinstance(tree.get(section), dict):
                    tree[section][name] = None
    lifted = any(key in typed for key in PAIRS[0]) and "scheduler.max_warmup_ratio" not in typed
    if lifted and isinstance(tree.get("scheduler"), dict):
        tree["scheduler"]["max_warmup_ratio"] = 1.0


def _packaged_hub_id(name: str) -> str | None:
    """Return the hub id in a packaged model file."""
    text = (conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    hub_id: str | None = yaml.safe_load(text).get("hub_id")
    return hub_id


def _replace_architecture(tree: dict[str, Any], typed: dict[str, Override], chosen: str | None) -> None:
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
        is_other = chosen in group_options()["model"] and _packaged_hub_id(chosen) != hub_id
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
    return yaml.safe_dump(as_tree(config), sort_keys=False, allow_unicode=True)


def as_tree(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested dicts of JSON values."""
    tree: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return tree


def _with_default_name(config: RunConfig, choices: dict[str, str]) -> RunConfig:
    """Name the run after its experiment, or model-recipe-data, so that the same command finds the same run."""
    if config.run.name is not None:
        return config
    data, model = choices.get("data", "data"), choices.get("model", "model")
    if data == "files":
        data = "-".join(resolve_path(part.path).stem for part in parts_of(config.data.path)[:3])
    if (
        source := config.model.adapter_path
        or config.model.path
        or (config.model.architecture is None and config.model.hub_id)
    ):
        model = resolve_path(source).name
    name = choices.get("experiment") or f"{model}-{choices.get('recipe', 'recipe')}-{data}"
    name = re.sub(r"[^\w.-]+", "_", name).lstrip("._-")[:200]
    return _named(config, name)


def _named(config: RunConfig, name: str) -> RunConfig:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
