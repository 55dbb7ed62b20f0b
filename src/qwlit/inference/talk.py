"""Talk to a trained model in the terminal, and answer the prompts of a file."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TextStreamer

from qwlit.core.console import showing_progress
from qwlit.core.disk import naming_path
from qwlit.core.errors import ConfigError, DataError
from qwlit.core.files import resolve_path
from qwlit.data.conversation import END_THINK, THINK, Conversation, Message
from qwlit.data.prompts import Prompt, one_question, read_prompts
from qwlit.inference.answer import Answer, answers, has_thinking_switch, opens_thinking, remarks
from qwlit.inference.trained_model import TrainedModel

HELP = "[dim]an empty line or Ctrl-D ends, /new begins a new conversation, Ctrl-C stops an answer[/]"


def describe(model: TrainedModel, screen: Console) -> None:
    """Print which weights answer, and how."""
    settings = model.config.generation
    if settings.thinking and not settings.temperature:
        screen.print("[yellow]note[/]  greedy answers with thinking often repeat themselves; temperature 0.6 is usual")
    how = f"temperature {settings.temperature:g}" if settings.temperature else "greedy"
    if model.chat is None or not settings.chat:
        how = f"plain text, {how}"
    elif settings.thinking:
        how = f"thinking, {how}"
        if not has_thinking_switch(model):
            screen.print("[yellow]note[/]  the chat template has no switch for thinking, so the setting has no effect")
    screen.print(f"[bold]{escape(model.origin)}[/]  {how}, seed {model.config.seed}")


def talk(model: TrainedModel, screen: Console, *, show_thinking: bool) -> None:
    """Ask for messages and answer them until the user ends."""
    screen.print(HELP)
    torch.manual_seed(model.config.seed)
    messages: tuple[Message, ...] = ()
    while True:
        try:
            typed = screen.input("[bold cyan]> [/]").strip()
        except EOFError:
            return
        if not typed or typed in ("/exit", "/quit"):
            return
        if typed == "/new":
            messages = ()
            screen.print("[dim]a new conversation[/]")
            continue
        messages += (Message("user", typed),)
        try:
            answer = _print_answer(model, Prompt(Conversation(messages)), screen, show_thinking)
        except DataError as error:
            screen.print(f"[yellow]note[/]  {escape(str(error))}; the message is left out")
            messages = messages[:-1]
            continue
        except KeyboardInterrupt:
            screen.print("\n[yellow]note[/]  stopped; question and answer are left out of the conversation")
            messages = messages[:-1]
            continue
        # The next prompt has the answer as the model ended it. An empty one has nothing that a template could write.
        messages = (*messages, Message("assistant", answer.text)) if answer.text.strip() else messages[:-1]


def answer_one(model: TrainedModel, prompt: str, screen: Console, *, show_thinking: bool) -> None:
    """Print the answer to a prompt as it is generated."""
    torch.manual_seed(model.config.seed)
    _print_answer(model, one_question(prompt), screen, show_thinking)


def _print_answer(model: TrainedModel, prompt: Prompt, screen: Console, show_thinking: bool) -> Answer:
    settings = model.config.generation
    streamer = _Printer(model.tokenizer, screen, show_thinking)
    (answer,) = answers(model, [prompt], settings, streamer=streamer)
    for note in remarks(answer, settings):
        screen.print(f"[yellow]note[/]  {note}")
    return answer


class _Printer(TextStreamer):
    """Prints text as it is generated: thinking dim or not at all."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, screen: Console, show_thinking: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._screen, self._shows_thinking = screen, show_thinking
        self._is_thinking = False

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt:
            self._is_thinking = opens_thinking(self.tokenizer, value[0].tolist())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        for part in re.split(f"({THINK}|{END_THINK})", text):
            if part in (THINK, END_THINK):
                self._is_thinking = part == THINK
            elif self._shows_thinking or not self._is_thinking:
                self._screen.print(Text(part, style="dim" if self._is_thinking else ""), end="")
        if stream_end:
            self._screen.print()


def answer_file(model: TrainedModel, path: str, output: Path, screen: Console) -> None:
    """Answer the prompts of a file, one line of JSON for each, in their order.

    Raises:
        ConfigError: `output` is the file of the prompts.
        DataError: see `read_prompts`.
    """
    if output.exists() and output.samefile(resolve_path(path)):
        raise ConfigError(f"output={output} is the file of the prompts; name another one")
    prompts = list(read_prompts(path, columns=model.config.data.columns))
    with naming_path(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(model.config.seed)
    ends: Counter[str] = Counter()
    with naming_path(output), output.open("w", encoding="utf-8") as file, showing_progress("answering", screen) as show:
        for number, (prompt, answer) in enumerate(
            zip(prompts, answers(model, prompts, model.config.generation), strict=True), 1
        ):
            file.write(json.dumps(_record(prompt, answer), ensure_ascii=False) + "\n")
            ends["ended" if answer.ended else "cut"] += 1
            ends["repeats"] += answer.repeats_itself
            show(number, len(prompts), f"{number:,} of {len(prompts):,} prompts", finished=number == len(prompts))
    longest = model.config.generation.max_new_tokens
    cut = f", {ends['cut']:,} cut after at most {longest:,} tokens" if ends["cut"] else ""
    repeated = f", {ends['repeats']:,} repeat themselves" if ends["repeats"] else ""
    answered = "1 answer" if len(prompts) == 1 else f"{len(prompts):,} answers"
    screen.print(f"{answered}{cut}{repeated}: {escape(str(output))}")


def _record(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    messages = [{"role": message.role, "content": message.content} for message in prompt.conversation.messages]
    answered: dict[str, Any] = {"messages": messages, "answer": answer.text, "ended": answer.ended}
    if answer.thinking:
        answered["thinking"] = answer.thinking
    if prompt.expected is not None:
        answered["expected"] = prompt.expected
    return answered
