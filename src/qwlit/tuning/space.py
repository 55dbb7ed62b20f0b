"""The search space of a sweep: its parameters as Optuna distributions, and drawn values as overrides of `train`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwlit.config.compose import Composed, compose
from qwlit.config.overrides import format_value
from qwlit.core.errors import ConfigError
from qwlit.core.schema import MAX_COUNT
from qwlit.tuning.sweep_file import EXPONENTS, Parameter, Sweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RANGES = ("int_uniform", "uniform", "q_uniform", "log_uniform", "log_uniform_values")
MOST_POINTS = 100_000
"""Of a grid."""
DIGITS = 12
"""Decimal places of a multiple of q, so that 0.1 x 3 is 0.3."""
Space = dict[str, "BaseDistribution"]


def keys_of(overrides: Iterable[str]) -> set[str]:
    """Return the settings that the overrides set."""
    return {override.partition("=")[0].lstrip("+") for override in overrides}


def format_overrides(parameters: Mapping[str, Any]) -> list[str]:
    """Return a trial's parameters as overrides of `train`."""
    return [f"{name}={format_value(value)}" for name, value in parameters.items()]


def build_space(sweep: Sweep) -> Space:
    """Translate the sweep file's parameters to Optuna distributions.

    Raises:
        ConfigError: only W&B supports the distribution, or its bounds are invalid.
    """
    return {name: _distribution(sweep, name, p) for name, p in sorted(sweep.document.parameters.items())}


def with_distributions(sweep: Sweep) -> dict[str, Any]:
    """Return the file's parameters for W&B, which would ignore a step q without `distribution: q_uniform`."""
    implied = {name: _implied(parameter) for name, parameter in sweep.document.parameters.items()}
    return {
        name: {**raw, "distribution": implied[name]} if implied[name] == "q_uniform" else raw
        for name, raw in sweep.raw["parameters"].items()
    }


def _distribution(sweep: Sweep, name: str, parameter: Parameter) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    where = f"{sweep.path}: parameters.{name}"
    kind = _implied(parameter)
    if kind in ("constant", "categorical"):
        if parameter.probabilities is not None:
            raise ConfigError(f"{where}.probabilities: only W&B supports them; leave them out, or use backend=wandb")
        choices = parameter.values if kind == "categorical" else [parameter.value]
        if choices is None:
            raise ConfigError(f"{where}: {kind} needs values")
        # Optuna's choices cannot be lists.
        return CategoricalDistribution([format_value(c) if isinstance(c, list) else c for c in choices])
    if kind not in RANGES:
        known = ", ".join(("constant", "categorical", *RANGES))
        raise ConfigError(f"{where}.distribution={kind}: only W&B supports it; use {known}, or backend=wandb")
    if sweep.document.method == "grid" and kind not in ("int_uniform", "q_uniform"):
        raise ConfigError(
            f"{where}: a grid needs values=[…], because a range has infinitely many; or set method: random"
        )
    low, high = parameter.min, parameter.max
    if low is None or high is None:
        raise ConfigError(f"{where}: give value, values, or min and max")
    if kind == "log_uniform":
        low, high = math.exp(low), math.exp(high)
    if kind.startswith("log_uniform") and low <= 0:
        raise ConfigError(f"{where}: min={low:g}, but a log scale needs min above 0")
    if kind == "q_uniform":
        return _multiples(where, parameter)
    if kind == "int_uniform":
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=kind != "uniform")


def _multiples(where: str, parameter: Parameter) -> "BaseDistribution":
    """Return W&B's q_uniform: multiples of q, which are whole numbers if q is one."""
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high, q = parameter.min or 0, parameter.max or 0, parameter.step
    if q <= 0:
        raise ConfigError(f"{where}.q={q:g}: values are multiples of q; give a number above 0")
    if max(abs(low), abs(high)) / q > MAX_COUNT:
        raise ConfigError(f"{where}.q={q:g} is too small for values up to {high:g}; give a larger one")
    first, last = math.ceil(low / q - 1e-9), math.floor(high / q + 1e-9)
    if first > last:
        raise ConfigError(f"{where}: there is no multiple of q={q:g} between {low:g} and {high:g}")
    if isinstance(q, int):
        return IntDistribution(first * q, last * q, step=q)
    return FloatDistribution(round(first * q, DIGITS), round(last * q, DIGITS), step=q)


def _implied(parameter: Parameter) -> str:
    """Return the distribution; where the file names none, the one that W&B assumes, and q_uniform for a step q."""
    if parameter.distribution is not None:
        return parameter.distribution
    if parameter.q is not None:
        return "q_uniform"
    if parameter.values is not None:
        return "categorical"
    if parameter.min is None:
        return "constant"
    return "int_uniform" if isinstance(parameter.min, int) and isinstance(parameter.max, int) else "uniform"


def grid_points(space: Space) -> dict[str, list[Any]]:
    """Return the values of each parameter of a grid.

    Raises:
        ConfigError: it has more points than Optuna can list.
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if math.prod(map(_num_points, space.values())) > MOST_POINTS:
        raise ConfigError(
            f"the sweep's grid has more than {MOST_POINTS:,} points; give fewer values, or set method: random"
        )
    points: dict[str, list[Any]] = {}
    for name, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            points[name] = list(distribution.choices)
        elif isinstance(distribution, IntDistribution):
            points[name] = list(range(distribution.low, distribution.high + 1, distribution.step))
        else:
            low, high, step = distribution.low, distribution.high, distribution.step  # type: ignore[attr-defined]
            points[name] = [min(high, round(low + i * step, DIGITS)) for i in range(round((high - low) / step) + 1)]
    return points


def _num_points(distribution: Any) -> int:
    if hasattr(distribution, "choices"):
        return len(distribution.choices)
    return int((distribution.high - distribution.low) / distribution.step + 0.5) + 1


def check_space(sweep: Sweep, overrides: list[str]) -> Composed:
    """Compose `train` with every choice and both ends of every range, so that no trial fails by a name or a value.

    Raises:
        ConfigError: naming the parameter and the mistake.
    """
    typed = keys_of(override for override in overrides if override not in sweep.overrides)
    for name in sweep.document.parameters:
        if name in typed:
            raise ConfigError(f"{name} is a parameter of the sweep ({sweep.path}); leave it out here or in the file")
        if name.startswith(("run.", "slurm.")):
            raise ConfigError(f"{sweep.path}: parameters.{name}: the sweep itself sets where a trial runs; remove it")
    ends = {name: _ends(parameter) for name, parameter in sweep.document.parameters.items()}
    first = {name: values[0] for name, values in ends.items() if values}
    composed = compose([*overrides, *format_overrides(first)])
    for name, values in ends.items():
        for value in values:
            try:
                compose([*overrides, *format_overrides(first | {name: value})])
            except ConfigError as error:
                raise ConfigError(f"{sweep.path}: parameters.{name}: {error}") from None
    return composed


def _ends(parameter: Parameter) -> Sequence[Any]:
    """Return a parameter's choices, or the ends of its range; for W&B's normal distributions, the mean."""
    if parameter.values is not None:
        return parameter.values
    if parameter.min is not None and parameter.max is not None:
        ends = [parameter.min, parameter.max]
    elif parameter.mu is not None:
        ends = [parameter.mu]
    else:
        return [parameter.value] if parameter.distribution in (None, "constant") else []
    if _implied(parameter) == "q_uniform" and isinstance(q := parameter.step, int) and q > 0:
        ends = [math.ceil(ends[0] / q) * q, math.floor(ends[-1] / q) * q]
    return [math.exp(end) for end in ends] if parameter.distribution in EXPONENTS else ends
