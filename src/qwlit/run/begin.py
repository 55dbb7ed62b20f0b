"""Before the first step: prepare the run folder, write config, manifest and quarantine, and print what runs."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from qwlit.config.compose import compose, dump
from qwlit.config.run import RunConfig, recipe_settings
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, GuardStop, Interrupted, Preempted, Pruned, reason_of
from qwlit.core.files import read_json, resolve_path
from qwlit.core.ranks import is_rank_zero
from qwlit.core.signals import HANDLED_SIGNALS, handling
from qwlit.data.samples import sample_statistics
from qwlit.data.store import REASONS_NAMED, quarantine_reasons
from qwlit.model.config import ModelConfig
from qwlit.model.folder import named_base
from qwlit.model.quantize import num_elements
from qwlit.run.exported import answers_end
from qwlit.run.resume import (
    ResumePoint,
    prepare_folder,
    refuse_changed_content,
    refuse_changed_recipe,
    refuse_changed_validation,
)
from qwlit.run.verify import differing_entries
from qwlit.training.checkpointing.folder import newest
from qwlit.training.tracking.manifest import build_manifest
from qwlit.training.tracking.run_folder import FINISHED, RunFolder

if TYPE_CHECKING:
    from qwlit.run.training_run import TrainingRun


def refuse_changes(run: "TrainingRun") -> None:
    """Refuse to resume an unfinished run of this name with another recipe or other data. For rank 0.

    Raises:
        ConfigError: naming what changed.
    """
    config, folder = run.config, run.folder
    if config.resume == "auto" and not config.run.overwrite and newest(folder):
        _compare_with_earlier_launch(run)


def _compare_with_earlier_launch(run: "TrainingRun") -> None:
    earlier = compose([f"config={run.folder.config_file}"]).config
    refuse_changed_recipe(recipe_settings(earlier), recipe_settings(run.config))
    refuse_changed_validation(run.folder, run.data.split.contents)
    refuse_changed_content(run.folder, data=run.data.split.fingerprint, base=run.base)


def begin(run: "TrainingRun") -> ResumePoint:
    """Prepare the run folder and write config, manifest and quarantine; other ranks only look up where to start."""
    config, folder = run.config, run.folder
    if not is_rank_zero():
        return ResumePoint(newest(folder))
    start = prepare_folder(folder, resume=config.resume, overwrite=config.run.overwrite)
    folder.drop_records_after(start.step)
    if start.checkpoint is None and folder.config_file.exists():
        try:
            _compare_with_earlier_launch(run)
        except ConfigError:
            # Another run begins: the decisions to go back to the start were about other settings or data.
            folder.drop_records_after(-1)
    manifest = build_manifest(run.plan.machine, **_manifest_facts(run))
    changed = _not_as_in_source(run, manifest)
    folder.write_text("config.yaml", dump(config))
    folder.write_json("manifest.json", manifest)
    folder.write_records("quarantine.jsonl", run.data.split.quarantine())
    folder.write_summary(resumed_from=start.step if start.checkpoint else None, rows=run.data.split.totals)
    _print_start(run, manifest, start, changed)
    return start


def _not_as_in_source(run: "TrainingRun", manifest: dict[str, Any]) -> list[str]:
    """Return in words what is not as in the run whose config.yaml `config=` names. Call it before manifest.json is
    replaced: that run may be this one."""
    source = run.plan.setup.composed.source
    if source is None:
        return []
    earlier = read_json(source.with_name("manifest.json"))
    return [f"not as in {source.parent.name}: {entry}" for entry in differing_entries(earlier, manifest)]


def _manifest_facts(run: "TrainingRun") -> dict[str, Any]:
    groups = run.plan.setup.groups
    return {
        "choices": run.plan.setup.composed.choices,
        "seed": run.config.seed,
        "determinism": run.config.determinism,
        "attention": run.plan.execution.attention,
        "compiled": run.plan.execution.compiled,
        "template": run.data.tokenized.encoder.chat.template.name if run.data.tokenized.encoder.chat else None,
        "answers_end": answers_end(run),
        "tokenizer": run.data.tokenized.encoder.tokenizer.fingerprint if run.data.tokenized.encoder.tokenizer else None,
        "data": run.data.split.fingerprint,
        "contents": run.data.split.contents,
        "data_files": run.data.split.file_digests(),
        "samples": sample_statistics(run.data.split.train),
        "plan": run.plan.expected(),
        "base": run.base,
        "parameters": {
            "total": sum(num_elements(p) for p in run.loss_model.parameters()),
            "trainable": run.plan.setup.num_trainable,
        },
        "groups": [
            {
                "name": group.name,
                "algorithm": group.algorithm,
                "parameters": group.size,
                "tensors": len(group.parameters),
                "lr": group.lr,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
    }


STRAYS_NAMED = 5


def _print_start(run: "TrainingRun", manifest: dict[str, Any], start: ResumePoint, changed: list[str]) -> None:
    """Print model, machine, data, schedule and findings in a few lines; record the findings as events."""
    config, steps, machine, folder = run.config, run.data.steps, run.plan.machine, run.folder
    limited = config.hardware.micro_batch_size or config.hardware.micro_batch_tokens
    accumulation = f", accumulation {run.plan.accumulate_grad_batches}" if limited else ""
    level = machine.activation_checkpointing
    checkpointing = f", activation checkpointing {level}" if level != "none" else ""
    on_host = ", optimizer on the host" if machine.offload_optimizer else ""
    parameters = manifest["parameters"]
    lines = [
        f"[bold]{escape(str(folder.path))}[/]: {steps.total_steps} steps of {config.train.global_batch_size} samples",
        f"  model     {escape(_model_name(config.model))}, {parameters['total']:,} parameters,"
        f" {parameters['trainable']:,} trained",
        *(f"  adapter   {escape(line)}" for line in _adapter_lines(config)),
        f"  machine   {machine.world_size} x {machine.device_name}, {machine.precision}, attention "
        + run.plan.setup.attention
        + (", compiled" if run.plan.execution.compiled else "")
        + accumulation
        + checkpointing
        + on_host,
        f"  data      {escape(run.data.split.describe())}",
        *(f"  template  {chat.template.name}" for chat in [run.data.tokenized.encoder.chat] if chat),
        f"  schedule  {config.scheduler.name}, peak lr {config.optim.lr:g}"
        f" after {steps.schedule.warmup_steps} steps of warm-up",
        *_group_lines(manifest["groups"]),
    ]
    if start.renamed_to:
        lines.append(f"  kept      the unfinished run of this name is now {escape(str(start.renamed_to))}")
    for damage in start.damaged:
        lines.append(f"  [yellow]note[/]      {escape(damage)}")
        folder.append_event(start.step, "damaged", message=damage)
    if start.strays:
        lines.append(
            f"  [yellow]note[/]      no checkpoints, passed over: {escape(', '.join(start.strays[:STRAYS_NAMED]))}"
        )
    if start.checkpoint:
        lines.append(f"  resuming  from step {start.step}")
        folder.append_event(start.step, "resumed", device=machine.device_name, devices=machine.world_size)
    lines += [f"  share     {escape(share)}" for share in run.data.split.describe_shares(config.seed)]
    for reason in quarantine_reasons(run.data.split.stores)[:REASONS_NAMED]:
        lines.append(f"  [yellow]note[/]      quarantined: {escape(str(reason))}")
    notes = [*run.plan.setup.composed.remarks, *changed]
    lines += [f"  [yellow]note[/]      {escape(remark)}" for remark in notes]
    for remark in run.data.split.remarks:
        lines.append(f"  [yellow]note[/]      {escape(remark)}")
        folder.append_event(start.step, "finding", name="data", severity="note", message=remark)
    for finding in run.plan.findings:
        lines.append(f"  [yellow]{finding.name}[/]  {escape(str(finding))}")
        folder.append_event(start.step, "finding", **asdict(finding))
    console().print("\n".join(lines))


def _model_name(model: ModelConfig) -> str:
    """Return the model's path or id, with a remark where its weights are random."""
    name = model.path or model.hub_id or "random weights"
    return f"{name}, random weights" if model.init == "random" and name != "random weights" else name


def _adapter_lines(config: RunConfig) -> list[str]:
    """Return how the run uses model.adapter_path, and a warning where the adapter names another base model."""
    if config.model.adapter_path is None:
        return []
    what = "merged into the model" if config.adapter.kind == "none" else "trained further"
    named = named_base(resolve_path(config.model.adapter_path))
    base = str(config.model.path or config.model.hub_id)
    lines = [f"{config.model.adapter_path}, {what}"]
    if named and Path(named).name != Path(base).name:
        lines.append(f"it names the base {named}, but the run uses {base}")
    return lines


# manifest.json lists all groups.
SHOWN_GROUPS = 8


def _group_lines(groups: list[dict[str, Any]]) -> list[str]:
    """Return a line for each parameter group, with its peak learning rate and weight decay."""
    lines = [
        f"  group     {group['name']:<20} {group['parameters']:>14,} parameters  {group['algorithm']:<5}"
        f"  lr {group['lr']:<8.3g}  weight decay {group['weight_decay']:g}"
        for group in groups[:SHOWN_GROUPS]
    ]
    if len(groups) > SHOWN_GROUPS:
        lines.append(f"            … and {len(groups) - SHOWN_GROUPS} more groups, in manifest.json")
    return lines


STATUS_OF_ERROR: dict[type[BaseException], str] = {
    Interrupted: "interrupted",
    KeyboardInterrupt: "interrupted",
    Preempted: "preempted",
    Pruned: "pruned",
    GuardStop: "stopped",
}


@contextmanager
def recording_status(folder: RunFolder) -> Iterator[None]:
    """Write into summary.json how the training ended, also where it failed.

    Raises:
        OSError: the training is done, but summary.json or another record cannot be written.
    """
    began = time.perf_counter()
    status = "failed"
    try:
        yield
        folder.write_kept_records()
        status = FINISHED
    except BaseException as error:
        status = STATUS_OF_ERROR.get(type(reason_of(error)), "failed")
        raise
    finally:
        # A second Ctrl-C must not leave the status "running".
        with handling(HANDLED_SIGNALS, signal.SIG_IGN):
            # Else `prepare_folder` has not come to it.
            if folder.has_begun:
                earlier = folder.read_summary().get("wall_seconds") or 0.0
                write = folder.write_summary if status == FINISHED else folder.try_write_summary
                write(status=status, wall_seconds=round(earlier + time.perf_counter() - began, 1))
