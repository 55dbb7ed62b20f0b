"""`plan`: say what `train` with the same overrides would do, without training."""

import gc
import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwlit.commands.options import compose_run, own_options
from qwlit.core.console import console
from qwlit.core.devices import GIB, USUAL_MFU
from qwlit.core.errors import ConfigError
from qwlit.core.streams import write_json

if TYPE_CHECKING:
    from qwlit.optim.schedules import Schedule
    from qwlit.planning.remedies import Remedy
    from qwlit.planning.run_plan import RunPlan

OUTPUTS = ("text", "json")
BAR_WIDTH, CURVE_WIDTH = 30, 60


def main(arguments: list[str]) -> None:
    own, overrides = own_options(arguments, {"output": OUTPUTS, "mfu": None})
    mfu = _mfu(own["mfu"])
    if "torch" not in sys.modules:
        # `plan` computes nothing, and bitsandbytes needs a second to compile functions when it is imported.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Nearly every object lives until the end, so garbage collection only costs time.
    gc.disable()
    try:
        composed = compose_run(overrides)
        # Importing these takes seconds: a wrong setting must end the command before.
        from qwlit.planning.remedies import fitting_overrides
        from qwlit.planning.run_plan import build_plan

        plan = build_plan(composed, console(stderr=True), preview=True)
        remedies = fitting_overrides(overrides, plan)
    finally:
        gc.enable()
    if own["output"] == "json":
        write_json(json.dumps(as_json(plan, remedies, mfu), indent=1, ensure_ascii=False))
    else:
        show(plan, remedies, mfu, console())


def _mfu(text: str | None) -> float:
    try:
        mfu = USUAL_MFU if text is None else float(text)
    except ValueError:
        mfu = 0.0
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu={text}: give the share of the devices' peak that a run reaches, above 0 and at most 1")
    return mfu


def as_json(plan: "RunPlan", remedies: "list[Remedy]", mfu: float) -> dict[str, Any]:
    """Return the plan for scripts; unknown values are null."""
    memory, batches = plan.memory, plan.batches
    config, machine, schedule = plan.config, plan.machine, plan.schedule
    groups = plan.setup.groups
    return {
        "parameters": {
            "total": plan.setup.num_parameters,
            "trainable": plan.setup.num_trainable,
            "groups": [
                {"name": g.name, "parameters": g.size, "lr": g.lr, "weight_decay": g.weight_decay} for g in groups
            ],
        },
        "memory": {
            "components": {name: size / GIB for name, size in memory.components.items()},
            "total_gib": plan.peak_bytes / GIB,
            "device_gib": memory.device / GIB if memory.device else None,
            "fullest_at": memory.phase,
            "activation_checkpointing": machine.activation_checkpointing,
            "offload_optimizer": machine.offload_optimizer,
            "host_gib": memory.host / GIB,
            "price": asdict(plan.price),
            "phases_gib": {phase: size / GIB for phase, size in plan.bytes_by_phase.items()},
        },
        "fits": plan.fits,
        "would_fit": [{"overrides": overrides, "total_gib": peak / GIB} for overrides, peak in remedies],
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": config.hardware.micro_batch_size,
        "micro_batch_tokens": config.hardware.micro_batch_tokens,
        "accumulate_grad_batches": plan.accumulate_grad_batches,
        "accumulation": dict(zip(("min", "median", "max"), batches.accumulation, strict=True)) if plan.data else None,
        "padding_share": batches.padding_share,
        "devices": machine.devices,
        "num_nodes": machine.num_nodes,
        "strategy": machine.strategy,
        "precision": machine.precision,
        "attention": plan.execution.attention,
        "compiled": plan.execution.compiled,
        "checkpoint_bytes": plan.saves.num_bytes,
        "checkpoint_seconds": plan.saves.seconds,
        "steps": schedule.total_steps if schedule else None,
        "warmup_steps": schedule.warmup_steps if schedule else None,
        "tokens": plan.num_tokens if plan.data else None,
        "flops_per_token": plan.flops_per_token,
        "mfu": mfu,
        "seconds": plan.seconds(mfu) if plan.data else None,
        "not_checked": plan.not_checked,
        "findings": [asdict(finding) for finding in plan.findings],
    }


def show(plan: "RunPlan", remedies: "list[Remedy]", mfu: float, screen: Console) -> None:
    """Print the plan for a person."""
    machine = plan.machine
    on_host = ", optimizer on the host" if machine.offload_optimizer else ""
    compiled = ", layers compiled" if plan.execution.compiled else ""
    screen.print(f"[bold]{escape(str(plan.config.run.name))}[/]  on {machine.world_size} x {machine.device_name}")
    screen.print(
        f"  strategy {machine.strategy}, precision {machine.precision}, attention {plan.setup.attention}"
        f", activation checkpointing {machine.activation_checkpointing}{on_host}{compiled}"
    )
    _show_parameters(plan, screen)
    _show_memory(plan, remedies, screen)
    _show_steps(plan, mfu, screen)
    _show_findings(plan, screen)


def _show_parameters(plan: "RunPlan", screen: Console) -> None:
    trained = plan.setup.num_trainable
    total = plan.setup.num_parameters
    screen.print(f"\n[bold]parameters[/]  {total:,}; trainable {trained:,} ({trained / total:.2%})")
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for column in ("  group", "parameters", "lr", "weight decay"):
        table.add_column(column, justify="left" if column == "  group" else "right")
    for group in plan.setup.groups:
        table.add_row(f"  {group.name}", f"{group.size:,}", f"{group.lr:.3g}", f"{group.weight_decay:g}")
    screen.print(table)


def _show_memory(plan: "RunPlan", remedies: "list[Remedy]", screen: Console) -> None:
    memory, phases, peak = plan.memory, plan.bytes_by_phase, plan.peak_bytes
    device = f" of {memory.device / GIB:.1f}" if memory.device else ""
    verdict = {True: "[green]fits[/]", False: "[red]does not fit[/]", None: "device not known"}[plan.fits]
    fullest = max(phases, key=phases.__getitem__)
    at = f"peak at {memory.phase}" if fullest == "training" else f"peak in {fullest}, of training at {memory.phase}"
    screen.print(f"\n[bold]memory[/]  {peak / GIB:.2f}{device} GiB per device, {verdict}; {at}")
    scale = max(memory.device, peak)
    components = memory.components | ({"copy of a checkpoint": plan.copy_bytes} if plan.copy_bytes else {})
    for name, size in components.items():
        bar = "▇" * round(BAR_WIDTH * size / scale)
        screen.print(f"  {name:<22}{size / GIB:>8.2f} GiB  [cyan]{bar}[/]")
    whole_run = (f"{phase} {size / GIB:.2f}" for phase, size in phases.items())
    screen.print(f"  the whole run: {', '.join(whole_run)} GiB")
    if memory.host:
        screen.print(f"  the host's memory: {memory.host / GIB:.1f} GiB per device for the optimizer")
    if price := str(plan.price):
        screen.print(f"  costs in time: {price}")
    if plan.fits is False:
        screen.print(
            "  overrides that would fit, cheapest first:" if remedies else "  no override tried here would fit"
        )
        for overrides, needed in remedies:
            screen.print(f"    {' '.join(overrides):<58} {needed / GIB:.1f} GiB")


def _show_steps(plan: "RunPlan", mfu: float, screen: Console) -> None:
    config, batches, schedule = plan.config, plan.batches, plan.schedule
    machine, (max_samples, max_tokens) = plan.machine, config.hardware.micro_batch_limits
    limits = [f"{max_samples} samples"] if max_samples else []
    limits += [f"{max_tokens:,} tokens"] if max_tokens else []
    seen = f" ({'/'.join(f'{n:g}' for n in batches.accumulation)} min/median/max)" if plan.data else ""
    devices = f"{machine.world_size} device{'s' * (machine.world_size > 1)}"
    micro_batches = f"{plan.accumulate_grad_batches} micro-batch{'es' * (plan.accumulate_grad_batches > 1)}{seen}"
    size = f"at most {' or '.join(limits)}" if limits else "any number of samples"
    screen.print(
        f"\n[bold]steps[/]  {config.train.global_batch_size} samples per step: {devices} x {micro_batches} x {size}"
    )
    if schedule is None:
        screen.print(f"  number of steps not checked: {escape(plan.not_checked or '')}")
    else:
        assumed = "" if plan.data else ", if every row is used"
        screen.print(
            f"  {schedule.total_steps:,} steps{assumed}; warm-up {schedule.warmup_steps:,}, then {schedule.config.name}"
        )
        screen.print(f"  lr  [cyan]{_curve(schedule)}[/]  peak {config.optim.lr:g}")
    saves = plan.saves
    meanwhile = "the training goes on meanwhile" if saves.is_copied else "the training waits: no memory for a copy"
    screen.print(f"  checkpoints of {saves.num_bytes / 1e9:.2f} GB, about {saves.seconds:.0f} s to write; {meanwhile}")
    if plan.data is not None:
        padding = f", {batches.padding_share:.1%} padding" if batches.padding_share else ""
        screen.print(f"  data  {escape(plan.data.split.describe())}{padding}")
    elif schedule is not None:
        screen.print(f"  data not checked: {escape(plan.not_checked or '')}")
    screen.print(f"  {plan.flops_per_token / 1e9:.3f} GFLOP per token", end="")
    seconds = plan.seconds(mfu)
    if plan.num_tokens is not None:
        at_most = "" if plan.data else "at most "
        screen.print(f", {at_most}{plan.num_tokens:,.0f} tokens", end="")
    if seconds is not None:
        screen.print(f": {timedelta(seconds=round(seconds))} at {mfu:.0%} of the devices' peak", end="")
    screen.print()


def _curve(schedule: "Schedule") -> str:
    """Draw the learning rate over the run, one character per sampled step."""
    width = min(CURVE_WIDTH, schedule.total_steps)
    steps = [index * (schedule.total_steps - 1) // max(1, width - 1) for index in range(width)]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * schedule.lr_multiplier(step)))] for step in steps)


def _show_findings(plan: "RunPlan", screen: Console) -> None:
    for remark in plan.setup.composed.remarks:
        screen.print(f"\n[yellow]note[/]  {escape(remark)}")
    screen.print(f"\n[bold]preflight[/]  {len(plan.findings) or 'no'} finding{'s' * (len(plan.findings) != 1)}")
    for finding in plan.findings:
        colour = "red" if finding.severity == "error" else "yellow"
        screen.print(f"  [{colour}]{finding.severity}[/] {finding.name}: {escape(str(finding))}")
