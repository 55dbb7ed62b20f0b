"""Find overrides that make a run fit into memory, the cheapest first."""

from dataclasses import replace

from qwlit.config.compose import Composed, compose
from qwlit.core.errors import ConfigError
from qwlit.model.config import levels_with_less_memory
from qwlit.planning.micro_batches import plan_batches
from qwlit.planning.run_plan import RunPlan
from qwlit.planning.setup import resolve_setup

REMEDIES_SHOWN = 4
Remedy = tuple[list[str], float]
"""Overrides, and the largest memory in bytes that the whole run needs with them on one device."""


def fitting_overrides(overrides: list[str], plan: RunPlan) -> list[Remedy]:
    """Try overrides that reduce memory, the cheapest first, and return those that fit; [] if the run itself fits.

    Args:
        overrides: the overrides that `plan` was composed from.
    """
    if plan.fits is not False:
        return []
    found: list[Remedy] = []
    for more in _smaller(plan.setup.composed):
        if any(set(fitting) <= set(more) for fitting, _ in found):
            continue  # some of these overrides alone are enough
        try:
            setup = resolve_setup(_changed(overrides, plan.setup.composed, more), trust_profile=True)
            setup, _, batches = plan_batches(setup, plan.data.split if plan.data else None)
            fitted, memory = setup.fit_memory(batches.largest)
        except ConfigError:
            continue
        smaller = replace(plan, setup=fitted, batches=batches, memory=memory)
        if smaller.fits and memory.fits_host:
            found.append((more, smaller.peak_bytes))
        if len(found) == REMEDIES_SHOWN:
            break
    return found


def _changed(typed: list[str], composed: Composed, overrides: list[str]) -> Composed:
    """Apply more overrides. Composing takes 0.2 s, so replace single values directly and compose only for a recipe."""
    if any(override.startswith("recipe=") for override in overrides):
        return compose([*typed, *overrides])
    config = composed.config
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        new: object = int(value) if value.isdecimal() else value
        config = replace(config, **{section: replace(getattr(config, section), **{name or "name": new})})
    return replace(composed, config=config)


def _smaller(composed: Composed) -> list[list[str]]:
    """Return overrides to try: first those that only cost time, then another optimizer or recipe, then more devices."""
    config = composed.config
    hardware = config.hardware
    on_cpu, from_scratch = hardware.accelerator == "cpu", config.model.init == "random"
    current = hardware.activation_checkpointing
    levels = () if current == "auto" else levels_with_less_memory(current)
    one_sample = [] if hardware.micro_batch_size == 1 else ["hardware.micro_batch_size=1"]
    _, tokens = hardware.micro_batch_limits
    candidates = [["hardware.strategy=auto"]] if hardware.strategy == "ddp" else []
    candidates += [[f"hardware.activation_checkpointing={level}"] for level in levels]
    candidates += [["hardware.offload_optimizer=auto"]] if not hardware.offload_optimizer else []
    candidates += [
        [f"hardware.micro_batch_tokens={tokens // part}"] for part in (2, 4) if tokens and tokens >= 2 * part
    ]
    candidates += [one_sample] if one_sample else []
    if composed.choices:
        optimizers = ["adamw_8bit"] if on_cpu else ["adamw_8bit", "paged_adamw_8bit"]
        recipes = [] if from_scratch else ["recipe=lora", "recipe=qlora"]
        for override in (*(f"optim={name}" for name in optimizers), *recipes):
            candidates += [[override], [override, *one_sample]]
    devices = hardware.devices
    first = 1 if devices == "auto" else devices
    return candidates + [[f"hardware.devices={count}"] for count in (2, 4, 8) if count > first and not on_cpu]
