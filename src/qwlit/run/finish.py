"""After the last step: export the best weights, answer validation prompts with them, and print the summary."""

import math
import shlex
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qwlit.core.console import console
from qwlit.core.errors import ConfigError
from qwlit.core.files import read_json_lines
from qwlit.core.metric import number_or_none
from qwlit.inference.export import export_model
from qwlit.inference.export_settings import GENERATION_CONFIG, EndToken
from qwlit.inference.generate import answer_greedily, eval_prompts
from qwlit.inference.trained_model import fill_from_checkpoint
from qwlit.model.folder import ADAPTER_CONFIG
from qwlit.model.loss_model import LossModel
from qwlit.run.callbacks import TrainerWithCallbacks
from qwlit.run.exported import answers_end, end_token, export_sources
from qwlit.run.modules import load_model
from qwlit.training.checkpointing.folder import list_checkpoints
from qwlit.training.checkpointing.manifest import step_of
from qwlit.training.resilience.rollback import lr_factor
from qwlit.training.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from qwlit.run.training_run import TrainingRun

Record = dict[str, Any]
"""An answer of the trained model in samples.jsonl: prompt, answer, expected, exact."""
FILES = {
    "export": "the trained model for from_pretrained{best} (LoRA: the adapter, see docs/models.md)",
    "checkpoints/best": "the same model: float32 weights and optimizer state",
    "checkpoints/last": "the newest checkpoint",
    "samples.jsonl": "prompts and answers, in training and after it",
    "metrics.jsonl": "loss, learning rate, gradient norm, tokens per second, by step",
    "trace.jsonl": "every step to the bit: samples, loss, gradient norm, weights",
    "events.jsonl": "checkpoints, skipped steps, rollbacks, notes",
    "summary.json": "the results above",
    "manifest.json": "versions, device, seed, fingerprints",
    "config.yaml": "the settings; train config=FILE run.name=… trains with them again",
}


def finish(run: "TrainingRun", training: TrainerWithCallbacks) -> list[Record]:
    """Export the best weights and answer validation prompts with them; return the records of samples.jsonl."""
    folder, loss_model = run.folder, run.loss_model
    sharded = run.plan.machine.strategy == "fsdp"
    if sharded:
        # The other ranks have ended, and their shard slices with them: build the whole model again, from the files.
        loss_model = load_model(run.plan, leave_empty=all(p.requires_grad for p in loss_model.parameters()))
    _load_best_weights(loss_model, training, folder, always=sharded)
    sources = export_sources(run.config.model, has_tokenizer=run.data.tokenized.tokenizer is not None)
    export_model(loss_model.causal_lm, folder.path / "export", sources=sources, end=end_of_answers(run))
    if not run.config.data.exact_match or run.data.split.validation is None:
        return []
    # The trainer moved the model to the CPU when it ended.
    try:
        loss_model.to(training.trainer.strategy.root_device)
        with training.trainer.precision_plugin.forward_context():
            records = _answer(run, loss_model)
    except torch.OutOfMemoryError:
        message = "too little device memory to answer prompts; the run is done and export/ is complete"
        folder.append_event(training.trainer.global_step, "finding", message=message)
        console().print(f"  [yellow]note[/]      {message}")
        return []
    folder.write_answers(records)
    folder.write_summary(exact_match=sum(record["exact"] for record in records) / len(records))
    return records


def end_of_answers(run: "TrainingRun") -> EndToken | None:
    """Return the token that the model was trained to end its answers with, see `answers_end`."""
    encoder, tokenizer = run.data.tokenized.encoder, run.data.tokenized.tokenizer
    return end_token(run.config, answers_end(run), encoder.chat, encoder.tokenizer, tokenizer)


def _load_best_weights(
    loss_model: LossModel, training: TrainerWithCallbacks, folder: RunFolder, *, always: bool
) -> None:
    """Fill in the weights with the lowest val/loss, or with the next best ones if their checkpoint is damaged.

    Args:
        always: read them also if they are those of the last step, which `loss_model` has.

    Raises:
        ConfigError: no checkpoint is good.
    """
    best, held = training.checkpointing.best_step, None if always else training.trainer.global_step
    rows = read_json_lines(folder.path / "metrics.jsonl")
    measured = [row for row in rows if number_or_none(row.get("val/loss")) is not None]
    validations = {row["step"]: row for row in measured if isinstance(row.get("step"), int)}
    others = {step_of(checkpoint) for checkpoint in list_checkpoints(folder)} - {best}
    by_loss = sorted(others, key=lambda step: (validations.get(step, {}).get("val/loss", math.inf), -step))
    candidates = [held] if best is None and held is not None else [*([] if best is None else [best]), *by_loss]
    damaged = []
    for step in candidates:
        if step != held:
            try:
                fill_from_checkpoint(loss_model, training.checkpointing.path(step))
            except ConfigError as error:
                damaged.append(str(error))
                continue
        if damaged:
            _record_next_best(training, folder, step, validations.get(step, {}), damaged)
        return
    raise ConfigError(f"nothing is exported, because no checkpoint is good: {'; '.join(damaged)}")


def _record_next_best(
    training: TrainerWithCallbacks, folder: RunFolder, step: int, validation: Record, damaged: list[str]
) -> None:
    """Say that another checkpoint than the best is exported, and make it the best of summary.json."""
    loss = validation.get("val/loss")
    message = f"{'; '.join(damaged)}: exported is step {step}" + (f", val/loss {loss:.4f}" if loss is not None else "")
    folder.append_event(training.trainer.global_step, "damaged", message=message)
    console().print(f"  [yellow]note[/]      {escape(message)}")
    training.checkpointing.replace_best(step, validation)
    folder.write_summary(**training.results())


def _answer(run: "TrainingRun", loss_model: LossModel) -> list[Record]:
    """Answer the first validation prompts, in the validation set's order."""
    validation, tokenizer = run.data.split.validation, run.data.tokenized.tokenizer
    chat = run.data.tokenized.encoder.chat
    assert validation is not None and tokenizer is not None and chat is not None
    prompts = eval_prompts(validation, run.config.data.exact_match, end_of_turn_id=chat.end_of_turn_id)
    with console().status(f"answering {len(prompts)} unseen prompts"):
        answers = list(
            answer_greedily(loss_model.causal_lm, prompts, end_of_turn_id=chat.end_of_turn_id, pad_id=run.data.pad_id)
        )
    answers.sort(key=lambda a: a.prompt.sample)
    return [
        {
            "prompt": tokenizer.decode(answer.prompt.tokens),
            "answer": tokenizer.decode(answer.tokens),
            "expected": tokenizer.decode(answer.prompt.answer),
            "exact": answer.exact,
        }
        for answer in answers
    ]


ANSWERS_SHOWN = 2
NEXT = {
    "generate": "talk to the model",
    "evaluate": "loss, accuracy and quality of its answers",
    "export": "write the model for other tools, and prove it",
}
"""Subcommand after a training → what it does."""


def print_summary(training: TrainerWithCallbacks, records: list[Record], folder: RunFolder) -> None:
    """Print the results of summary.json, the first answers, and the files of the run."""
    summary = folder.read_summary()
    numbers = {name: summary.get(name) for name in (*training.results(), "exact_match")}
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in numbers.items():
        if value is not None:
            table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    screen = console()
    screen.print("\n[bold]done[/]")
    screen.print(table)
    rollbacks = training.guard.rollbacks
    times = "once" if len(rollbacks) == 1 else f"{len(rollbacks)} times"
    if (factor := lr_factor(rollbacks)) < 1:
        screen.print(
            f"\n[yellow]the run went back {times}[/] and ended at {factor:g} times optim.lr: begin the next"
            " one with that rate or less"
        )
    for record in records[:ANSWERS_SHOWN]:
        screen.print(f"\n[bold]an answer[/], {'as' if record['exact'] else 'not as'} expected")
        screen.print(Text.assemble(record["prompt"], (record["answer"], "green")))
        if not record["exact"]:
            screen.print(Text.assemble("expected: ", record["expected"]))
    screen.print(f"\n[bold]where the files are[/]  {escape(str(folder.path))}")
    best = ", the best by val/loss" if summary.get("val_loss_best") is not None else ""
    for name, what in FILES.items():
        if (folder.path / name).exists():
            screen.print(f"  {name:<18} {what.format(best=best)}")
    run = escape(shlex.quote(f"run={folder.path}"))
    screen.print("\n[bold]what you can do next[/]")
    for command, what in NEXT.items():
        screen.print(f"  qwlit {command:<8} {run}  {what}")
    export = folder.path / "export"
    if (export / ADAPTER_CONFIG).is_file() and (export / GENERATION_CONFIG).is_file():
        # peft and transformers read the base model's generation configuration, which may have another end token.
        screen.print(
            f"\nto end answers as trained, generate with GenerationConfig.from_pretrained('{escape(str(export))}')"
        )
