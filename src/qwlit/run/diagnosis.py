"""What went wrong in the step at which the guard stopped the run: module, samples, circumstances and remedies."""

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from rich.markup import escape

from qwlit.config.remedies import remedies
from qwlit.core.console import console
from qwlit.core.errors import QwlitError, first_line, one_line
from qwlit.data.batches import StepDataset
from qwlit.training.replay import Observation, first_nonfinite, largest, replay
from qwlit.training.resilience.rollback import lr_factor

if TYPE_CHECKING:
    from qwlit.run.training_run import TrainingRun

FILE = "diagnosis.json"
SAMPLES_SHOWN, LONGEST_TEXT = 4, 200


def try_to_diagnose(run: "TrainingRun", trainer: Trainer, step: int, reason: str) -> None:
    """Diagnose the step; where that fails, say so: the reason for which the run stopped is the error to report."""
    try:
        diagnose(run, trainer, step, reason)
    except (RuntimeError, OSError, QwlitError) as error:  # out of memory is a RuntimeError
        console().print(f"  [yellow]note[/]      no diagnosis: {escape(one_line(first_line(error), LONGEST_TEXT))}")


def diagnose(run: "TrainingRun", trainer: Trainer, step: int, reason: str) -> None:
    """Replay the step, print what was found, and write diagnosis.json. Every rank calls it.

    Args:
        step: counted from 1. A skipped step left the weights as they were, so it computes the same again.
    """
    observations = _observe(run, trainer, step)
    bad, size = _of_all_ranks(observations, run.plan.machine.world_size)
    report = {
        "step": step,
        "reason": reason,
        "module": asdict(bad) if bad else None,
        "largest": [asdict(found) for found in size],
        "samples": _samples(run, step),
        "precision": run.plan.machine.precision,
        "attention": run.plan.execution.attention,
        "learning_rate": run.config.optim.lr * lr_factor(run.rollbacks),
        "command": f"qwlit train config={shlex.quote(str(run.folder.config_file))} run.name={run.config.run.name}-2",
        "remedies": remedies("diverging", run.tried),
    }
    run.folder.write_json(FILE, report)
    if trainer.is_global_zero:
        _print(report, run)


def _observe(run: "TrainingRun", trainer: Trainer, step: int) -> list[Observation]:
    plan, device = run.data.steps.step_plan, trainer.strategy.root_device
    dataset = StepDataset(plan.train, plan, trainer.global_rank, run.data.pad_id)
    model = run.loss_model.train()
    # The trainer moved the model to the CPU when it ended.
    model.to(device)
    micro_batches = [micro.to(device) for micro in dataset[step - 1].micro_batches]
    with trainer.precision_plugin.forward_context():
        return replay(model, micro_batches, seed=run.config.seed, step=step - 1, rank=trainer.global_rank)


def _of_all_ranks(observations: list[Observation], world_size: int) -> tuple[Observation | None, list[Observation]]:
    """Return the first value of any rank that is not finite, and the largest output and gradient of all ranks."""
    everything: list[Any] = [observations]
    if world_size > 1:
        everything = [None] * world_size
        dist.all_gather_object(everything, observations)
    bad = next((found for own in everything if (found := first_nonfinite(own))), None)
    together = [observation for own in everything for observation in own]
    directions = (largest(together, "forward"), largest(together, "backward"))
    return bad, [found for found in directions if found]


def _samples(run: "TrainingRun", step: int) -> list[dict[str, Any]]:
    """Return origin, supervised tokens and text of the step's longest samples."""
    plan, tokenizer = run.data.steps.step_plan, run.data.tokenized.tokenizer
    ids = plan.samples(step - 1)
    longest = ids[plan.train.lengths(ids).argsort()[::-1]][:SAMPLES_SHOWN].tolist()
    found = []
    for sample in longest:
        tokens, mask = plan.train.read([sample])
        text = tokenizer.decode(tokens.tolist()) if tokenizer else " ".join(map(str, tokens.tolist()))
        found.append(
            {
                "origin": plan.train.origin(sample),
                "tokens": len(tokens),
                "supervised": int(mask.sum()),
                "text": one_line(text, LONGEST_TEXT),
            }
        )
    return found


def _print(report: dict[str, Any], run: "TrainingRun") -> None:
    bad, lines = report["module"], [f"\n[bold]diagnosis of step {report['step']}[/]"]
    if bad:
        lines.append(f"  first bad   {bad['module']}: its {_what(bad)} is not finite")
    lines += [
        f"  largest     {found['largest']:.3g}, {_what(found)} of {found['module']}" for found in report["largest"]
    ]
    lines += [
        f"  sample      {escape(sample['origin'])}, {sample['tokens']} tokens, {sample['supervised']} supervised:"
        f" {escape(sample['text'])}"
        for sample in report["samples"]
    ]
    lines.append(f"  computed    in {report['precision']} with {report['attention']} attention")
    lines.append(f"  try         {escape(report['command'])} with one or more of")
    lines += [f"              {remedy}" for remedy in report["remedies"]]
    lines.append(f"  all of it   {escape(str(run.folder.path / FILE))}")
    console().print("\n".join(lines))


def _what(observation: dict[str, Any]) -> str:
    return "output" if observation["direction"] == "forward" else "gradient"
