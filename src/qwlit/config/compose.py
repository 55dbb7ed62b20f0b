"""From command-line overrides to a checked RunConfig. Whatever is wrong is said in one line.

Hydra composes groups and files; every value override is forced in (`++`), so that a wrong name is not Hydra's to
report but falls to the one check of the whole tree against the dataclasses, which knows the nearest valid name.
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
"""Folder of files for the verb of that name; no group of settings."""


def conf_dir() -> Path:
    """Return the folder of YAML files: `qwlit/conf` in a wheel, `conf/` at the top of a checkout."""
    package = Path(__file__).parents[1]
    for candidate in (package / "conf", package.parents[1] / "conf"):
        if (candidate / f"{MAIN}.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"qwlit's conf folder is neither in {package} nor beside it")


@dataclass(frozen=True)
class Composed:
    """A checked configuration and where it came from."""

    config: RunConfig
    choices: dict[str, str]
    """Group → chosen file, e.g. recipe → full_sft; empty when an earlier run's config.yaml was given."""


def group_options() -> dict[str, list[str]]:
    """Return every group with its choices, as the packaged folder has them."""
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
    _settle_pairs(tree, typed)
    _settle_model(tree, typed, choices.get("model"))
    config = check(tree)
    check_relations(config)
    config = _with_default_name(config, choices)
    if under_agent() and "run.name" not in typed:
        config = _named(config, trial_name(str(config.run.name)))
    return Composed(config=config, choices=choices)


def _parse(overrides: list[str]) -> list[Override]:
    """Parse overrides. Of a key typed twice the later one counts, so that scripts can pass "$@" on."""
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"'{text}': overrides have the form key=value, e.g. optim.lr=1e-5")
        override = _read(text)
        if override.is_sweep_override():
            raise ConfigError(f"'{text}' names several values; train takes one, a list is written [a,b]")
        if override.is_delete():
            raise ConfigError(f"'{text}': settings cannot be deleted; set the value you want")
        parsed.append(override)
    return parsed


LISTS = {"data.path", "data.val_path"}
"""Texts that may also be lists."""
OF_TEXTS = {"slurm.options", "slurm.setup", "slurm.mounts"}
"""Lists in the words of other programs: Hydra's grammar cannot read [--mem=5G]."""
# Hydra's grammar has ASCII letters only: in a list, what it cannot read is quoted for it.
FOREIGN = re.compile(r"""[^\[\]{},:'"\s]*[^\x00-\x7f][^\[\]{},:'"]*""")


def _read(text: str) -> Override:
    """Read one override; a value that Hydra's grammar has no letters for (data.path=数据.jsonl) is text."""
    parser = OverridesParser.create()
    key, _, value = text.partition("=")
    if key.lstrip("+") in LISTS and value.startswith("{"):
        raise ConfigError(f"'{text}': parts are a list, [{{path:…,weight:…}},…]")
    if key.lstrip("+") in LISTS and value.startswith("["):
        text = f"{key}={FOREIGN.sub(lambda match: repr(match.group()), value)}"
    try:
        override = parser.parse_override(text)
        # 2024_01 is a name here, though it is a number in YAML.
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
    """Compose group files and values by Hydra."""
    if "data.path" in typed and "data" not in typed:
        # One's own data also replaces the demo's validation set and its exact-match check.
        typed = {"data": _parse(["data=files"])[0], **typed}
    if "model.hub_id" in typed and "model" not in typed:
        # A packaged file of the same hub id knows the architecture without asking the hub.
        wanted = typed["model.hub_id"].value()
        for name, hub_id in _packaged_hub_ids().items():
            if hub_id is not None and hub_id == wanted:
                typed["model"] = _parse([f"model={name}"])[0]
    for folder in typed["hydra.searchpath"].value() if "hydra.searchpath" in typed else []:
        if str(folder).startswith("file://") and not Path(str(folder).removeprefix("file://")).is_dir():
            raise ConfigError(f"hydra.searchpath: {folder} is no folder")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), job_name="qwlit", version_base="1.3"):
            # experiment=null is what stands there anyway, and Hydra cannot be told so.
            chosen = [o for o in typed.values() if (o.key_or_group, o.value()) != ("experiment", None)]
            words = [_as_hydra(o, user_files="hydra.searchpath" in typed) for o in chosen]
            composed = hydra_compose(MAIN, words, return_hydra_config=True)
            choices = {k: v for k, v in composed.hydra.runtime.choices.items() if not k.startswith("hydra/")}
            tree: Any = OmegaConf.to_container(
                OmegaConf.masked_copy(composed, [k for k in composed if k != "hydra"]), resolve=True
            )
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(_one_line(error)) from None
    return tree, choices


def _as_hydra(override: Override, *, user_files: bool) -> str:
    """Return the override as Hydra should see it: group choices checked, values forced in."""
    key, line = override.key_or_group, str(override.input_line).lstrip("+")
    if key.startswith("hydra."):
        return line
    options = group_options().get(key)
    if options is None:
        return f"++{line}"
    choice = override.value()
    if choice is None and key != "experiment":
        raise ConfigError(f"{key}=null: choose one of {', '.join(options)}")
    # With files of the user's own, only Hydra knows all choices.
    if choice is not None and choice not in options and not user_files:
        hint = nearest(str(choice), options) or f" Choose one of {', '.join(options)}."
        raise ConfigError(f"{key}={choice}: no such {key}.{hint}")
    return line


def _from_run(path: Any, typed: dict[str, Override]) -> tuple[dict[str, Any], dict[str, str]]:
    """Take an earlier run's resolved config.yaml, with single values changed."""
    file = resolve_path(str(path))
    if not file.is_file():
        raise ConfigError(f"config={path}: no such file; give a run's config.yaml")
    try:
        tree = OmegaConf.load(file)
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"config={path} is not a run's config.yaml")
        for key, override in typed.items():
            if key in group_options() and "." not in key:
                raise ConfigError(f"{key}={override.value()}: config={path} has made every choice; set single values")
            OmegaConf.update(tree, key, override.value(), force_add=True)
        container: Any = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={path} cannot be read: {_one_line(error)}") from None
    return container, {}


PAIRS = (("scheduler.warmup_steps", "scheduler.warmup_ratio"), ("train.max_steps", "train.max_epochs"))


def _settle_pairs(tree: dict[str, Any], typed: dict[str, Override]) -> None:
    """Let a typed value clear the recipe's value for the same thing."""
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


def _packaged_hub_ids() -> dict[str, str | None]:
    """Return the hub id of every packaged model file, by the file's name."""
    files = (conf_dir() / "model").glob("*.yaml")
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")).get("hub_id") for file in files}


def _settle_model(tree: dict[str, Any], typed: dict[str, Override], chosen: str | None) -> None:
    """Let a folder or a hub id replace the chosen model file, whose architecture describes another model.

    Raises:
        ConfigError: a typed architecture has no effect, or an adapter's base is not here.
    """
    model = tree.get("model")
    if not isinstance(model, dict):
        return
    path, hub_id = model.get("path"), model.get("hub_id")
    is_other = hub_id is not None and ("model.hub_id" in typed or chosen is not None)
    if is_other and chosen is not None:
        hub_ids = _packaged_hub_ids()
        # A file of the user's own names its own hub id.
        is_other = chosen in hub_ids and hub_ids[chosen] != hub_id
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
    """Check a whole tree against the dataclasses.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, list(group_options()))) from None


def dump(config: RunConfig) -> str:
    """Return the configuration as YAML that `config=` reads back to the same."""
    return yaml.safe_dump(as_tree(config), sort_keys=False, allow_unicode=True)


def as_tree(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as JSON has it."""
    tree: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return tree


def _with_default_name(config: RunConfig, choices: dict[str, str]) -> RunConfig:
    """Name the run after its experiment, or model-recipe-data; the same command then finds the same run."""
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
