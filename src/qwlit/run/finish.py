"""After the last step: the best weights exported and put to the test, the summary, and where everything lies."""

import re
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qwlit.core.console import console
from qwlit.core.errors import DataError
from qwlit.core.files import resolve_path
from qwlit.data.chat import resolve_template
from qwlit.data.chat_template import chat_template
from qwlit.data.samples import supervises
from qwlit.data.templates import END as END_OF_TURN
from qwlit.data.tokenizer import END_OF_TEXT
from qwlit.inference.export import Origin, export_model
from qwlit.inference.export_settings import End
from qwlit.inference.generate import answer_greedily, questions
from qwlit.model.load import tokenizer_folder, weights_folder
from qwlit.model.loss_model import LossModel
from qwlit.planning.assemble import Job, load_model
from qwlit.training.checkpointing.checkpoint import read_weights, step_of
from qwlit.training.loop import Loop
from qwlit.training.tracking.run_folder import RunFolder

Record = dict[str, Any]
"""A row of samples.jsonl: prompt, answer, expected, exact."""
PLACES = {
    "export": "the trained model for from_pretrained, the best by val/loss (LoRA: the adapter, for peft)",
    "checkpoints/best": "its float32 weights and the optimizer's state",
    "checkpoints/last": "the newest ones",
    "samples.jsonl": "prompts, answers and what was expected",
    "metrics.jsonl": "loss, learning rate, gradient norm, tokens per second, by step",
    "trace.jsonl": "every step to the bit: samples, loss, gradient norm, weights",
    "events.jsonl": "checkpoints, skipped steps, notes",
    "summary.json": "the figures above",
    "manifest.json": "versions, device, seed, fingerprints",
    "config.yaml": "the settings; train config=FILE run.name=… runs them again",
}


def finish(job: Job, loss_model: LossModel, loop: Loop, folder: RunFolder) -> list[Record]:
    """Export the best weights and let them answer validation prompts; return what they said."""
    sharded = job.machine.strategy == "fsdp"
    if sharded:
        # The other ranks have left with their rows: the whole model is made anew, from the files.
        loss_model = load_model(job, leave_empty=all(p.requires_grad for p in loss_model.parameters()))
    _take_best_weights(loss_model, loop, always=sharded)
    export_model(loss_model.causal_lm, folder.path / "export", origin=_origin(job), end=end_of_answers(job))
    if not job.config.data.exact_match or job.data.validation is None:
        return []
    # The trainer has moved the model to the CPU when it ended.
    try:
        loss_model.to(loop.trainer.strategy.root_device)
        with loop.trainer.precision_plugin.forward_context():
            records = _answer(job, loss_model)
    except torch.OutOfMemoryError:
        message = "the device has no room for answering prompts; the run is done, and export/ whole"
        folder.append_event(loop.trainer.global_step, "finding", message=message)
        console().print(f"  [yellow]note[/]      {message}")
        return []
    folder.write_rows("samples.jsonl", records)
    folder.write_summary(exact_match=sum(record["exact"] for record in records) / len(records))
    return records


def _origin(job: Job) -> Origin:
    model = job.config.model
    base = None
    if model.init == "pretrained":
        base = str(resolve_path(model.path).resolve()) if model.path else model.hub_id
    tokenizer = tokenizer_folder(model)[0] if job.tokenizer is not None else None
    return Origin(model=weights_folder(model), tokenizer=tokenizer, base=base)


def end_of_answers(job: Job) -> End | None:
    """Return the token that the model learned to end its answers with; None where the base's own end stays.

    Conversations end with the template's end of turn, whatever the base ended with. Plain text ends with
    <|endoftext|>, which every base knows already unless it has no end at all.
    """
    tokenizer, chat = job.encoder.tokenizer, job.encoder.chat
    if tokenizer is None:
        return None
    end_of_text = tokenizer.control_ids.get(END_OF_TEXT)
    others = () if end_of_text is None else (end_of_text,)
    if chat is not None and supervises(job.data.train, chat.end_of_turn_id):
        return End(END_OF_TURN, chat.end_of_turn_id, others, _template_to_write(job))
    has_end = job.config.model.init == "pretrained"
    if has_end or end_of_text is None or not supervises(job.data.train, end_of_text):
        return None
    return End(END_OF_TEXT, end_of_text, (), None)


def _template_to_write(job: Job) -> str | None:
    """Return the template trained with, unless the tokenizer's folder has it already."""
    assert job.encoder.chat is not None
    try:
        own = resolve_template(job.tokenizer, "auto")
    except DataError:
        own = None
    return None if own == job.encoder.chat.family else chat_template(job.encoder.chat.family)


def _take_best_weights(loss_model: LossModel, loop: Loop, *, always: bool) -> None:
    best = loop.checkpointing.best_checkpoint or (loop.checkpointing.newest_checkpoint if always else None)
    if best is not None and (always or step_of(best) != loop.trainer.global_step):
        parameters = dict(loss_model.causal_lm.named_parameters())
        with torch.no_grad():
            for name, weight in read_weights(best):
                parameters[name].copy_(weight)


def _answer(job: Job, loss_model: LossModel) -> list[Record]:
    """Answer the first validation prompts, in the validation set's order."""
    assert job.data.validation is not None
    assert job.encoder.chat is not None and job.tokenizer is not None
    asked = questions(job.data.validation, job.config.data.exact_match)
    with console().status(f"answering {len(asked)} unseen prompts"):
        answers = list(
            answer_greedily(
                loss_model.causal_lm, asked, end_of_turn_id=job.encoder.chat.end_of_turn_id, pad_id=job.pad_id
            )
        )
    answers.sort(key=lambda a: a.question.sample)
    decode = job.tokenizer.decode
    return [
        {
            "prompt": decode(answer.question.prompt),
            "answer": decode(answer.tokens),
            "expected": decode(answer.question.answer),
            "exact": answer.exact,
        }
        for answer in answers
    ]


# Told by the answer: a Chinese character, or an English word and no such character.
LANGUAGES = {"English": r"^[^\u4e00-\u9fff]*[A-Za-z]{3,}[^\u4e00-\u9fff]*<", "Chinese": r"[\u4e00-\u9fff]"}


def show(loop: Loop, records: list[Record], folder: RunFolder) -> None:
    """Print the figures, an answer in each language, and where everything lies."""
    numbers: dict[str, Any] = loop.figures()
    if records:
        numbers["exact_match"] = folder.read_summary()["exact_match"]
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in numbers.items():
        if value is not None:
            table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    screen = console()
    screen.print("\n[bold]done[/]")
    screen.print(table)
    for language, pattern in LANGUAGES.items():
        example = next((r for r in records if re.search(pattern, r["expected"])), None)
        if example:
            screen.print(f"\n[bold]an answer in {language}[/]")
            screen.print(Text.assemble(example["prompt"], (example["answer"], "green")))
    screen.print(f"\n[bold]where everything lies[/]  {escape(str(folder.path))}")
    for name, what in PLACES.items():
        if (folder.path / name).exists():
            screen.print(f"  {name:<18} {what}")
