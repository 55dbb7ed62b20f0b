"""Render conversations in the format of a Qwen family, as a list of pieces.

A piece is text or a control token, and it is supervised or only read. Together, the texts of the pieces equal what the
official chat template of the family renders. Only a template makes control pieces: the content of a message is always
text, even if it looks like a control token.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from qwlit.data.conversation import END_THINK, THINK, Conversation, Message, ToolCall
from qwlit.data.rows import RowError

if TYPE_CHECKING:
    from qwlit.data.config import LossOn, Thinking

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_RESPONSE, END_TOOL_RESPONSE = "<tool_response>", "</tool_response>"


class Piece(NamedTuple):
    """A part of the rendered conversation."""

    text: str
    control: bool
    """Whether the text is one control token, if the vocabulary has it."""
    supervised: bool


@dataclass(frozen=True)
class Supervision:
    """What is supervised in a conversation; see the settings with the same names."""

    loss_on: "LossOn" = "assistant"
    thinking: "Thinking" = "mask_empty"


@dataclass(frozen=True)
class ChatTemplate(ABC):
    """What qwlit needs of a chat template: one of the families below, or a `JinjaTemplate`."""

    name: str
    """For people and for the manifest; of a family, the value of `data.template`."""
    default_system: str | None
    """The system text for a conversation without one."""

    @property
    @abstractmethod
    def turn_tokens(self) -> tuple[str, ...]:
        """The control tokens that the vocabulary must have; the last one ends an answer."""

    @property
    def end_of_turn(self) -> str:
        return self.turn_tokens[-1]

    def with_system(self, text: str) -> "ChatTemplate":
        """Return the template with another default system text.

        Raises:
            DataError: the template cannot write it.
        """
        return replace(self, default_system=text)

    @abstractmethod
    def render_all(
        self, conversations: Sequence[Conversation], supervision: Supervision
    ) -> list[list[Piece] | RowError]:
        """Render conversations. Return for each its pieces, or why the template cannot express it."""

    @abstractmethod
    def render_prompt(self, conversation: Conversation, *, thinking: bool) -> list[Piece]:
        """Render a conversation without its next answer, and the beginning of the assistant's turn.

        Raises:
            RowError: the template cannot express the conversation.
        """

    def render(self, conversation: Conversation, supervision: Supervision) -> list[Piece]:
        """Render a conversation.

        Raises:
            RowError: the template cannot express the conversation.
        """
        (rendered,) = self.render_all([conversation], supervision)
        if isinstance(rendered, RowError):
            raise rendered
        return rendered


@dataclass(frozen=True)
class ChatTemplateFamily(ChatTemplate):
    """The differences between the templates of the families, which are all ChatML."""

    tools: bool = False
    thinking: bool = False
    json_text_arguments: bool = False
    """True: write arguments that are JSON text unchanged. False: write them as a quoted JSON string, like the official
    template."""

    @property
    def turn_tokens(self) -> tuple[str, ...]:
        return IM_START, IM_END

    def render_all(
        self, conversations: Sequence[Conversation], supervision: Supervision
    ) -> list[list[Piece] | RowError]:
        return [self._attempt(conversation, supervision) for conversation in conversations]

    def render_prompt(self, conversation: Conversation, *, thinking: bool) -> list[Piece]:
        """See `ChatTemplate.render_prompt`. Without thinking, a family that can think begins with an empty block."""
        _check(conversation, self)
        pieces = [piece for _, turn in _turns(conversation, self, Supervision()) for piece in turn if piece.text]
        pieces += [_control(IM_START), _text("assistant\n")]
        if self.thinking and not thinking:
            pieces += [_control(THINK), _text("\n\n"), _control(END_THINK), _text("\n\n")]
        return pieces

    def _attempt(self, conversation: Conversation, supervision: Supervision) -> list[Piece] | RowError:
        try:
            return render(conversation, self, supervision)
        except RowError as error:
            return error


FAMILIES = {
    family.name: family
    for family in (
        ChatTemplateFamily("qwen3", None, tools=True, thinking=True, json_text_arguments=True),
        # Qwen3-…-Instruct-2507, the models without thinking. The thinking models of that date use the template qwen3.
        ChatTemplateFamily("qwen3_2507", None, tools=True, json_text_arguments=True),
        ChatTemplateFamily(
            "qwen2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", tools=True
        ),
        # The base models of Qwen2.5.
        ChatTemplateFamily("qwen2_5_base", "You are a helpful assistant.", tools=True),
        # Keep it last: it skips the tool probes, so the template of qwen2_5_base would match it too.
        ChatTemplateFamily("qwen2", "You are a helpful assistant."),
    )
}

TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def render(conversation: Conversation, family: ChatTemplateFamily, supervision: Supervision) -> list[Piece]:
    """Render the conversation with the template of the family.

    Raises:
        RowError: the template would leave out a tool or a whole answer.
    """
    conversation = drop_thinking(conversation, supervision)
    _check(conversation, family)
    # With loss_on=all, headers and other roles are in the loss too.
    supervises_all = supervision.loss_on == "all"
    return [
        piece._replace(supervised=True) if supervises_all and (message is None or message.is_supervised) else piece
        for message, turn in _turns(conversation, family, supervision)
        for piece in turn
        if piece.text
    ]


def drop_thinking(conversation: Conversation, supervision: Supervision) -> Conversation:
    """Remove the reasoning with data.thinking=drop.

    Raises:
        RowError: an answer is only reasoning.
    """
    if supervision.thinking != "drop":
        return conversation
    messages = tuple(message.without_thinking() for message in conversation.messages)
    if any(message.role == "assistant" and message.is_empty for message in messages):
        raise RowError("an assistant message has only reasoning, which data.thinking=drop removes")
    return replace(conversation, messages=messages)


def _check(conversation: Conversation, family: ChatTemplateFamily) -> None:
    messages = conversation.messages
    if not family.tools and (conversation.tools or any(m.role == "tool" or m.tool_calls for m in messages)):
        raise RowError(f"template {family.name} does not support tools")
    # The template writes reasoning only into answers after the last query; some families never write it.
    shown_after = last_query_index(messages) if family.thinking else len(messages)
    for message in messages[: shown_after + 1]:
        if message.role == "assistant" and not (message.split_thinking()[1].strip() or message.tool_calls):
            raise RowError(f"an assistant message has only reasoning, which template {family.name} leaves out")


def _text(text: str, supervised: bool = False) -> Piece:
    return Piece(text, control=False, supervised=supervised)


def _control(text: str, supervised: bool = False) -> Piece:
    return Piece(text, control=True, supervised=supervised)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"a tool or its arguments cannot be written as JSON: {error}") from None


def _turns(
    conversation: Conversation, family: ChatTemplateFamily, supervision: Supervision
) -> Iterator[tuple[Message | None, Iterator[Piece]]]:
    """Yield each message with its pieces. The message is None if the system turn is the template's own."""
    messages = conversation.messages
    # Empty roles at both ends: roles[index] is the role before message `index`, roles[index + 2] the role after it.
    roles = ["", *(message.role for message in messages), ""]
    last_query = last_query_index(messages)
    last_answer = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=None)
    yield (messages[0] if messages[0].role == "system" else None), _system_turn(conversation, family)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            supervised = message.is_supervised and (supervision.loss_on != "last_assistant" or index == last_answer)
            after_query, is_last = index > last_query, index == len(messages) - 1
            yield message, _answer_turn(message, family, after_query, is_last, supervised, supervision.thinking)
        elif message.role == "tool":
            # Consecutive tool responses share one turn of the user.
            yield message, _tool_response(message, opens=roles[index] != "tool", closes=roles[index + 2] != "tool")
        elif message.role == "user" or index > 0:
            yield message, _plain_turn(message)


def _plain_turn(message: Message) -> Iterator[Piece]:
    yield from (_control(IM_START), _text(f"{message.role}\n{message.content}"), _control(IM_END), _text("\n"))


def _tool_response(message: Message, *, opens: bool, closes: bool) -> Iterator[Piece]:
    yield from (_control(IM_START), _text("user")) if opens else ()
    yield from (_text("\n"), _control(TOOL_RESPONSE), _text(f"\n{message.content}\n"), _control(END_TOOL_RESPONSE))
    yield from (_control(IM_END), _text("\n")) if closes else ()


def last_query_index(messages: tuple[Message, ...]) -> int:
    """Return the index of the last user message; if there is none, of the last message."""
    return max((i for i, message in enumerate(messages) if message.role == "user"), default=len(messages) - 1)


def _system_turn(conversation: Conversation, family: ChatTemplateFamily) -> Iterator[Piece]:
    first = conversation.messages[0]
    system = first.content if first.role == "system" else family.default_system
    if system is None and not conversation.tools:
        return
    yield from (_control(IM_START), _text("system\n"))
    if system is not None:
        yield _text(system)
    if conversation.tools:
        yield _text("\n\n" if system is not None else "")
        yield from _template_text(TOOLS_HEAD)
        yield from (_text(f"\n{_json(tool)}") for tool in conversation.tools)
        yield from _template_text(TOOLS_TAIL)
    yield from (_control(IM_END), _text("\n"))


def _template_text(text: str) -> Iterator[Piece]:
    """Yield the template's own text: only here, the tag names are control tokens."""
    for part in re.split(f"({TOOL_CALL}|{END_TOOL_CALL})", text):
        yield Piece(part, control=part in (TOOL_CALL, END_TOOL_CALL), supervised=False)


def _answer_turn(
    message: Message,
    family: ChatTemplateFamily,
    after_query: bool,
    is_last: bool,
    supervised: bool,
    thinking: "Thinking",
) -> Iterator[Piece]:
    reasoning, content = message.split_thinking() if family.thinking else ("", message.content)
    shown = content
    yield from (_control(IM_START), _text("assistant\n"))
    # The template writes a block only after the last query, and an empty block only into the last message.
    if family.thinking and after_query and (is_last or reasoning):
        reasoning, shown = reasoning.strip("\n"), content.lstrip("\n")
        # At inference without thinking, the prompt has the empty block: the model reads it and does not write it.
        block = supervised and (reasoning != "" or thinking == "keep")
        yield from (_control(THINK, block), _text(f"\n{reasoning}\n", block))
        yield from (_control(END_THINK, block), _text("\n\n", block))
    yield _text(shown, supervised)
    for index, call in enumerate(message.tool_calls):
        yield _text("\n" if content or index else "", supervised)
        yield _control(TOOL_CALL, supervised)
        yield _text(f'\n{{"name": "{call.name}", "arguments": {_arguments(call, family)}}}\n', supervised)
        yield _control(END_TOOL_CALL, supervised)
    yield from (_control(IM_END, supervised), _text("\n"))


def _arguments(call: ToolCall, family: ChatTemplateFamily) -> str:
    if isinstance(call.arguments, str) and family.json_text_arguments:
        return call.arguments
    return _json(call.arguments)
