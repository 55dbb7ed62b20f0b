"""Read a sweep file. It has W&B's own format, so that `wandb sweep FILE` accepts it as well."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from qwlit.config.groups import SWEEPS, conf_dir
from qwlit.core.errors import ConfigError, nearest
from qwlit.core.files import resolve_path
from qwlit.core.metric import Metric
from qwlit.core.schema import Flag, PositiveInt, config_dataclass
from qwlit.core.yaml_files import read_yaml

Scalar = str | int | float | bool | None


@config_dataclass
class Parameter:
    """The values to try for a setting: one `value`, a list of `values`, or a distribution."""

    value: Scalar | list[Scalar] = None
    values: list[Scalar | list[Scalar]] | None = None
    distribution: str | None = None
    min: FiniteFloat | int | None = None
    max: FiniteFloat | int | None = None
    q: FiniteFloat | int | None = None
    mu: FiniteFloat | None = None
    sigma: FiniteFloat | None = None
    probabilities: list[float] | None = None

    @property
    def step(self) -> float | int:
        """q, by default 1; a whole number where it is one."""
        q = 1 if self.q is None else self.q
        return int(q) if q == int(q) else q


@config_dataclass
class EarlyTerminate:
    """W&B's hyperband. It decides after `min_iter`, `min_iter` x `eta`, `min_iter` x `eta`**2, … values of the metric.

    At each decision only the best 1/`eta` of the trials continue. Example: with min_iter=2 and eta=3 the best third
    continues after 2, 6, 18, … values. If `max_iter` and `s` are given instead of `min_iter`, the first decision is
    after `max_iter` / `eta`**`s` values. Example: with max_iter=27, s=2 and eta=3 it is after 27 / 9 = 3 values.
    """

    type: Literal["hyperband"]
    min_iter: PositiveInt | None = None
    max_iter: PositiveInt | None = None
    s: PositiveInt | None = None
    eta: Annotated[int, Field(ge=2)] = 3
    strict: Flag = False


@config_dataclass
class SweepDocument:
    """The content of the file. Entries that only W&B uses are passed to it unchanged."""

    method: Literal["grid", "random", "bayes"]
    metric: Metric
    parameters: dict[str, Parameter]
    command: list[str]
    early_terminate: EarlyTerminate | None = None
    name: str | None = None
    description: str | None = None
    project: str | None = None
    entity: str | None = None
    run_cap: PositiveInt | None = None


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file."""

    name: str
    path: Path
    document: SweepDocument
    raw: Mapping[str, Any]
    """The file's entries as W&B expects them."""

    @property
    def overrides(self) -> list[str]:
        """Return the overrides of every trial, from the file's command."""
        command = self.document.command
        return [argument for argument in command[command.index("train") + 1 :] if not argument.startswith("${")]


def sweep_names() -> list[str]:
    """Return the names of the packaged sweeps."""
    return sorted(file.stem for file in (conf_dir() / SWEEPS).glob("*.yaml"))


def read_sweep(name: str) -> Sweep:
    """Read a sweep by its name in conf/sweep, or by its path.

    Raises:
        ConfigError: there is no such file, or it does not follow W&B's format.
    """
    known = sweep_names()
    path = conf_dir() / SWEEPS / f"{name}.yaml" if name in known else resolve_path(name)
    if not path.is_file():
        hint = nearest(name, known) or f" Choose one of {', '.join(known)}, or give a file's path."
        raise ConfigError(f"sweep={name}: no such sweep.{hint}")
    try:
        raw = read_yaml(path, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a sweep: a sweep has method, metric, parameters and command")
    try:
        document = TypeAdapter(SweepDocument).validate_python(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None
    _check_command(path, document.command)
    _check_parameters(path, document.parameters, raw["parameters"])
    return Sweep(path.stem, path, document, raw)


def _explain(error: ValidationError) -> str:
    """Explain the first mistake in one line: the field, the rule and the nearest name."""
    finding = sorted(error.errors(), key=lambda f: f["type"] != "unexpected_keyword_argument")[0]
    *owner, name = [str(part) for part in finding["loc"]] or [""]
    field = ".".join([*owner, name])
    if owner[:1] == ["parameters"]:
        setting = f"parameters.{[*owner, name][1]}"
        if name == "parameters":
            inner = next(iter(finding["input"]), "NAME") if isinstance(finding["input"], dict) else "NAME"
            return f"{setting} has nested parameters; write each setting with its full name, {setting}.{inner}"
        if len(owner) > 1 and _has_rules(finding["input"]):
            return (
                f"{setting}: a value here is text, a number or a list of them, not rules with keys; write each set of"
                " rules into an experiment file, and list the files: parameters.experiment: {values: [a, b]}"
            )
        if len(owner) == 1:
            return f"{setting}: give value, values, or min and max, e.g. {{values: [1, 2]}}"
    if finding["type"] == "unexpected_keyword_argument":
        sections = {"parameters": Parameter, "metric": Metric, "early_terminate": EarlyTerminate}
        known = sections.get(owner[0], SweepDocument) if owner else SweepDocument
        names = list(known.__annotations__)
        hint = nearest(name, names) or f" Known here: {', '.join(names)}."
        return f"{field}: no such entry.{hint}"
    if finding["type"] in ("missing", "missing_argument"):
        return f"{field} is not set"
    return f"{field}: {finding['msg'][0].lower()}{finding['msg'][1:]}"


def _has_rules(value: Any) -> bool:
    """Whether the value is a dict, or a list with one."""
    return isinstance(value, dict) or (isinstance(value, list) and any(_has_rules(item) for item in value))


PROGRAM = ("${env}", "/usr/bin/env", "${interpreter}", "python", "python3", "-m", "qwlit")
"""Words of `command` before "train"."""


def _check_command(path: Path, command: list[str]) -> None:
    shape = "${env} ${interpreter} -m qwlit train … ${args_no_hyphens}"
    if "train" not in command or "qwlit" not in command:
        raise ConfigError(f"{path}: command runs no `qwlit train`; write it as {shape}")
    if other := [word for word in command[: command.index("train")] if word not in PROGRAM]:
        # W&B's agents run what stands here, and the file may be somebody else's.
        raise ConfigError(f"{path}: command runs {other[0]}; write it as {shape}")
    if command[-1] != "${args_no_hyphens}":
        raise ConfigError(f"{path}: command ends in {command[-1]}; it must end as in {shape}")


EXPONENTS = ("log_uniform", "inv_log_uniform", "q_log_uniform", "log_normal")
"""Distributions whose ends are exponents of e."""
LARGEST_EXPONENT = 700
"""The largest number of a computer is e^709."""
FORMS = (("value",), ("values",), ("min", "max"), ("mu", "sigma"))


def _check_parameters(path: Path, parameters: dict[str, Parameter], raw: dict[str, Any]) -> None:
    if not parameters:
        raise ConfigError(f"{path}: parameters is empty; name a setting, e.g. optim.lr")
    for name, parameter in parameters.items():
        if not re.fullmatch(r"[\w.]+", name):
            raise ConfigError(f"{path}: parameters.{name}: name a setting as train does, e.g. optim.lr")
        given = [form for form in FORMS if set(form) & raw[name].keys()]
        if len(given) != 1 and parameter.distribution not in ("beta", "q_beta"):
            raise ConfigError(f"{path}: parameters.{name}: give one of value, values, or min and max")
        if given == [("min", "max")] and None in (parameter.min, parameter.max):
            raise ConfigError(f"{path}: parameters.{name}: a range needs both min and max")
        if parameter.q is not None and parameter.distribution is not None and "q_" not in parameter.distribution:
            raise ConfigError(
                f"{path}: parameters.{name}.q: {parameter.distribution} has no step; write distribution: q_uniform"
            )
        if parameter.values == []:
            raise ConfigError(f"{path}: parameters.{name}.values is empty; list the values to try")
        if parameter.distribution in EXPONENTS and max(parameter.max or 0, parameter.mu or 0) > LARGEST_EXPONENT:
            raise ConfigError(
                f"{path}: parameters.{name}: the ends of {parameter.distribution} are exponents of e, at most"
                f" {LARGEST_EXPONENT}; for plain ends write log_uniform_values"
            )
        low, high = parameter.min, parameter.max
        if low is not None and high is not None and low > high:
            raise ConfigError(f"{path}: parameters.{name}: min {low:g} is above max {high:g}")
