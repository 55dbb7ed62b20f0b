"""A tokenizer's own chat template of no known family, used through its `{% generation %}` marks.

The marks say which parts of the rendered text the assistant writes.
"""

import hashlib
import json
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

from qwlit.core.errors import DataError
from qwlit.data.conversation import Conversation, Message, parse_conversation
from qwlit.data.rows import RowError
from qwlit.data.template_process import REMEDY, Rendered, Span, render_all
from qwlit.data.templates import ChatTemplate, Piece, Supervision, drop_thinking
from qwlit.data.tokenizer import control_token_ids

Result = TypeVar("Result")
ANSWER = "An answer."
Steps = Generator[list[Conversation], Any, Result]
"""Yields conversations that it needs rendered, gets `Rendered | RowError` for each, and returns the result."""
_PROBE = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": ANSWER}]


@dataclass(frozen=True)
class JinjaTemplate(ChatTemplate):
    """A Jinja template with the variables that a tokenizer passes to it. It can be pickled, for worker processes."""

    source: str
    variables: dict[str, Any] = field(hash=False)
    """Names of special tokens, such as eos_token, and their texts."""
    folder: str
    """Where the template is from, for errors."""
    control_tokens: tuple[str, ...]
    """The texts that become control tokens where the template writes them."""
    end: str
    """The control token that ends an answer."""

    @property
    def turn_tokens(self) -> tuple[str, ...]:
        return (self.end,)

    def render_all(
        self, conversations: Sequence[Conversation], supervision: Supervision
    ) -> list[list[Piece] | RowError]:
        """Render conversations; see `ChatTemplate.render_all`.

        A row that spells out a control token is refused: in rendered text, its token could not be told from the
        template's own.

        Raises:
            DataError: the template needs more time or memory than it may.
        """
        outcomes: dict[int, list[Piece] | RowError] = {}
        rows = {index: self._render_row(conversation, supervision) for index, conversation in enumerate(conversations)}
        answers: dict[int, list[Rendered | RowError] | None] = dict.fromkeys(rows)
        # One message to the rendering process has what all rows need next.
        while answers:
            needed: dict[int, list[Conversation]] = {}
            for index, answer in answers.items():
                try:
                    needed[index] = rows[index].send(answer)
                except StopIteration as end:
                    outcomes[index] = end.value
                except RowError as error:
                    outcomes[index] = error
            rendered = iter(self._rendered([conversation for each in needed.values() for conversation in each]))
            answers = {index: [next(rendered) for _ in each] for index, each in needed.items()}
        return [outcomes[index] for index in rows]

    def _rendered(self, conversations: Sequence[Conversation]) -> list[Rendered | RowError]:
        return render_all(self.source, self.variables, list(map(_as_dict, conversations)), folder=self.folder)

    def _render_row(self, conversation: Conversation, supervision: Supervision) -> Steps[list[Piece]]:
        conversation = drop_thinking(conversation, supervision)
        conversation = self._with_default_system(conversation)
        self._refuse_control_tokens(conversation)
        (rendered,) = yield [conversation]
        if isinstance(rendered, RowError):
            raise rendered
        _refuse_missing_parts(conversation, rendered.text)
        supervised = yield from _supervised_spans(conversation, rendered.text, _joined(rendered.marked), supervision)
        return list(_pieces(rendered.text, supervised, _pattern(self.control_tokens)))

    def render_prompt(self, conversation: Conversation, *, thinking: bool) -> list[Piece]:
        """See `ChatTemplate.render_prompt`."""
        conversation = self._with_default_system(conversation)
        self._refuse_control_tokens(conversation)
        asked = _as_dict(conversation) | {"add_generation_prompt": True, "enable_thinking": thinking}
        (rendered,) = render_all(self.source, self.variables, [asked], folder=self.folder)
        if isinstance(rendered, RowError):
            raise rendered
        return list(_pieces(rendered.text, [], _pattern(self.control_tokens)))

    def with_system(self, text: str) -> "JinjaTemplate":
        """See `ChatTemplate.with_system`. One probe replaces an error for each row."""
        changed = replace(self, default_system=text)
        try:
            changed.render(parse_conversation(_PROBE), Supervision())
        except RowError as error:
            raise DataError(
                f"data.system cannot be used with the tokenizer's own chat template ({error}); leave it out, or set"
                " data.template to a known one"
            ) from None
        return changed

    def _with_default_system(self, conversation: Conversation) -> Conversation:
        if self.default_system is None or conversation.messages[0].role == "system":
            return conversation
        return replace(conversation, messages=(Message("system", self.default_system), *conversation.messages))

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        calls = [(call.name, call.arguments) for message in conversation.messages for call in message.tool_calls]
        texts = [part for message in conversation.messages for part in message.split_thinking()]
        found = _pattern(self.control_tokens).search("\n".join([*texts, _json([calls, conversation.tools])]))
        if found:
            raise RowError(
                f"a text contains the control token {found[0]}, which could not be told from the template's own"
            )


def _supervised_spans(
    conversation: Conversation, text: str, marked: list[Span], supervision: Supervision
) -> Steps[list[Span]]:
    """Return the parts of the text in the loss.

    Raises:
        RowError: only some turns are in the loss, and it is not certain where they are.
    """
    messages = conversation.messages
    if supervision.loss_on == "all":
        if all(message.is_supervised for message in messages):
            return [(0, len(text))]
        raise RowError("a turn is marked as not supervised, and the chat template does not show where it is")
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    candidates = answers[-1:] if supervision.loss_on == "last_assistant" else answers
    chosen = [index for index in candidates if messages[index].is_supervised]
    if chosen == answers:
        return marked
    if len(marked) == len(answers) and all(
        messages[index].split_thinking()[1].strip() in text[start:end]
        for index, (start, end) in zip(answers, marked, strict=True)
    ):
        return [marked[answers.index(index)] for index in chosen]
    # An answer's marked parts are those between its first character and the next answer's.
    edges = [*(yield from _starts_of_answers(conversation, answers, text)), len(text)]
    regions = dict(zip(answers, pairwise(edges), strict=True))
    parts = [(max(start, regions[index][0]), min(end, regions[index][1])) for index in chosen for start, end in marked]
    return [(start, end) for start, end in parts if start < end]


def _starts_of_answers(conversation: Conversation, answers: list[int], text: str) -> Steps[list[int]]:
    """Return where the messages before each answer end in the text: they are rendered alone for it."""
    later = [index for index in answers if index > 0]
    before = yield [replace(conversation, messages=conversation.messages[:index]) for index in later]
    starts = [0] * (len(answers) - len(later))
    for index, rendered in zip(later, before, strict=True):
        if isinstance(rendered, RowError) or not text.startswith(rendered.text):
            raise RowError(
                f"only some answers are supervised, and the chat template does not show where message {index + 1}"
                " begins: it writes the messages before it in another way if they are alone"
            )
        starts.append(len(rendered.text))
    return starts


def has_marks(source: str) -> bool:
    """Whether the template has `{% generation %}` marks."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


def jinja_template(tokenizer: Any, source: str) -> JinjaTemplate:
    """Return the tokenizer's template `source`; find in a rendered probe how it ends an answer.

    Raises:
        DataError: it cannot be rendered, or its marks do not contain an answer with its end.
    """
    variables, folder = dict(tokenizer.special_tokens_map), str(tokenizer.name_or_path)
    control_tokens = tuple(control_token_ids(tokenizer))
    (probe,) = render_all(source, variables, [_as_dict(parse_conversation(_PROBE))], folder=folder)
    if isinstance(probe, RowError):
        raise DataError(f"the tokenizer's chat template cannot render a plain chat ({probe}); {REMEDY}")
    text, marked = probe.text, _joined(probe.marked)
    start, stop = next(((a, b) for a, b in marked if ANSWER in text[a:b]), (0, 0))
    end = _pattern(control_tokens).search(text, text.rfind(ANSWER, start, stop) + len(ANSWER), stop)
    if end is None:
        raise DataError(
            "the tokenizer's chat template does not have an answer and the special token that ends it inside"
            f" {{% generation %}} marks without a gap, so the model would not learn to end its answers; {REMEDY}"
        )
    digest = hashlib.sha256(json.dumps([source, variables], sort_keys=True).encode()).hexdigest()
    name = f"the tokenizer's own ({digest[:12]})"
    return JinjaTemplate(name, None, source, variables, folder, control_tokens, end[0])


def unmarked_template(tokenizer: Any) -> JinjaTemplate | None:
    """Return the tokenizer's own template for prompts, also without marks; None if it has none.

    Its answers end with the tokenizer's end token.
    """
    source, end = tokenizer.chat_template, tokenizer.eos_token
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str) or end is None:
        return None
    variables, folder = dict(tokenizer.special_tokens_map), str(tokenizer.name_or_path)
    return JinjaTemplate(
        "the tokenizer's own", None, source, variables, folder, tuple(control_token_ids(tokenizer)), end
    )


def _joined(spans: list[Span]) -> list[Span]:
    """Join spans without a gap between them: a template may mark an answer's text and its end one by one."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif start < end:
            joined.append((start, end))
    return joined


def _as_dict(conversation: Conversation) -> dict[str, Any]:
    """Return the conversation as transformers passes it to a template: without keys that have no value."""
    return {"messages": list(map(_message, conversation.messages)), "tools": list(conversation.tools) or None}


def _message(message: Message) -> dict[str, Any]:
    calls = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    values = {"role": message.role, "content": message.content, "reasoning_content": message.reasoning}
    return {key: value for key, value in values.items() if value is not None} | ({"tool_calls": calls} if calls else {})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@lru_cache
def _pattern(control_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of control tokens. As in the tokenizer, of two that begin at one place the longer counts."""
    # "(?!)" matches nowhere; an empty pattern would match everywhere.
    return re.compile("(" + ("|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))) or "(?!)") + ")")


def _refuse_missing_parts(conversation: Conversation, text: str) -> None:
    """Refuse a row of which the template leaves out a message, a call or a tool. Reasoning it may leave out."""
    for message in conversation.messages:
        parts = (message.split_thinking()[1].strip(), *(call.name for call in message.tool_calls))
        if not all(part in text for part in parts):
            raise RowError(f"the chat template leaves out, or changes, a message or a call of the {message.role}")
    names = [str(tool.get("function", tool).get("name", "")) for tool in conversation.tools]
    if missing := [name for name in names if name not in text]:
        raise RowError(f"the chat template does not write the tool {missing[0]}")


def _pieces(text: str, supervised: list[Span], control_tokens: re.Pattern[str]) -> Iterator[Piece]:
    edges = sorted({0, len(text), *(edge for span in supervised for edge in span)})
    for start, end in pairwise(edges):
        is_supervised = any(first <= start and end <= last for first, last in supervised)
        # The pattern's group makes `split` return the control tokens too, at the odd places.
        for place, part in enumerate(control_tokens.split(text[start:end])):
            if part:
                yield Piece(part, control=place % 2 == 1, supervised=is_supervised)
