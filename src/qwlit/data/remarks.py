"""Remarks on rows that are used, but may not mean what the user expects."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from qwlit.data.conversation import END_THINK, THINK, Conversation
from qwlit.data.row_labels import holds_placeholder
from qwlit.data.templates import (
    END_TOOL_CALL,
    END_TOOL_RESPONSE,
    TOOL_CALL,
    TOOL_RESPONSE,
    ChatTemplate,
    ChatTemplateFamily,
    Supervision,
    last_query_index,
)
from qwlit.data.unread import unread_key_remarks

HISTORY_THINKING = "reasoning in earlier turns, which the template removes: those answers are supervised without it"
THINKING_LEFT_OUT = "reasoning_content, which this template cannot write: it is left out"
TAGS_AS_TEXT = "<think> or <tool_call> tags inside a text: they are encoded as plain text, not as control tokens"
QUOTED_ARGUMENTS = "tool arguments as JSON text, which this template writes in quotes, like the official template"
NULLS_FROM_TABLE = (
    "null in tool arguments or tools from a table, which cannot mark a key as missing: use JSON text there"
)
BARE_TOOLS = 'bare tool definitions, which are wrapped as {"type": "function", "function": …}, as inference servers do'
MARKED_QUESTION = "a mark to supervise a turn that is not an answer: qwlit ignores it unless data.loss_on=all"
CONSECUTIVE_ANSWERS = "consecutive answers: each becomes a turn with its own end; join them if they are one answer"
ANSWER_FIRST = "an answer before any question: are the speakers swapped?"
PLACEHOLDER_AS_TEXT = (
    "<image>, <video> or <audio> inside a text: it is encoded as plain text, because training reads only text"
)
CONTROL_TOKENS_AS_TEXT = (
    "control tokens such as <|im_start|> inside a text: they are encoded as plain text, not as control tokens;"
    " give the conversation as messages, or the tokens as input_ids"
)
NO_EMPTY_BLOCK = (
    "answers or calls without reasoning before the last one: training puts no empty think block before them, but"
    " inference with thinking off does; data.loss_on=last_assistant supervises only the last answer"
)
_TAGS = re.compile("|".join((THINK, END_THINK, TOOL_CALL, END_TOOL_CALL, TOOL_RESPONSE, END_TOOL_RESPONSE)))


def remarks(
    conversation: Conversation, template: ChatTemplate, supervision: Supervision, *, from_table: bool
) -> Iterator[str]:
    """Yield remarks on the conversation and on how a template of a known family writes it."""
    arguments = [call.arguments for message in conversation.messages for call in message.tool_calls]
    if from_table and _holds_null([*arguments, *conversation.tools]):
        yield NULLS_FROM_TABLE
    yield from unread_key_remarks("message", [key for message in conversation.messages for key in message.unread_keys])
    yield from _reading_remarks(conversation, supervision)
    if isinstance(template, ChatTemplateFamily):
        yield from _writing_remarks(conversation, template, supervision, arguments)


def _writing_remarks(
    conversation: Conversation, family: ChatTemplateFamily, supervision: Supervision, arguments: list[Any]
) -> Iterator[str]:
    """Yield remarks on what the family's template writes in another way than a user may expect."""
    if not family.json_text_arguments and any(isinstance(value, str) for value in arguments):
        yield QUOTED_ARGUMENTS
    answers = [message for message in conversation.messages if message.role == "assistant"]
    if family.thinking:
        yield from _think_block_remarks(conversation, supervision)
    elif any(message.reasoning for message in answers):
        yield THINKING_LEFT_OUT
    texts = [message.content for message in conversation.messages if message.role != "assistant"]
    # In a family with thinking, a <think> block at the start is reasoning, so check only the answer after it.
    texts += [message.split_thinking()[1] if family.thinking else message.content for message in answers]
    if any(map(_holds_tags, texts)):
        yield TAGS_AS_TEXT


def _reading_remarks(conversation: Conversation, supervision: Supervision) -> Iterator[str]:
    """Yield remarks on a row that other tools may read differently."""
    if conversation.has_bare_tools:
        yield BARE_TOOLS
    if supervision.loss_on != "all" and any(m.mark and m.role != "assistant" for m in conversation.messages):
        yield MARKED_QUESTION
    roles = [message.role for message in conversation.messages]
    if any(pair == ("assistant", "assistant") for pair in pairwise(roles)):
        yield CONSECUTIVE_ANSWERS
    if next(role for role in roles if role != "system") == "assistant":
        yield ANSWER_FIRST
    if any(holds_placeholder(message.content) for message in conversation.messages):
        yield PLACEHOLDER_AS_TEXT


def _think_block_remarks(conversation: Conversation, supervision: Supervision) -> Iterator[str]:
    """Yield remarks on supervised answers that the template writes without a think block."""
    messages = conversation.messages
    last_query = last_query_index(messages)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    supervised = answers[-1:] if supervision.loss_on == "last_assistant" else answers
    drops_thinking = supervision.thinking == "drop"
    has_reasoning = {i: not drops_thinking and bool(messages[i].split_thinking()[0]) for i in supervised}
    # A turn that the row marks as not supervised needs no remark.
    in_loss = [i for i in supervised if messages[i].is_supervised]
    if any(has_reasoning[i] and i <= last_query for i in in_loss):
        yield HISTORY_THINKING
    if any(not has_reasoning[i] and (i <= last_query or i < len(messages) - 1) for i in in_loss):
        yield NO_EMPTY_BLOCK


def document_remarks(text: str) -> Iterator[str]:
    """Yield remarks on a document."""
    if holds_placeholder(text):
        yield PLACEHOLDER_AS_TEXT
    if _holds_tags(text):
        yield TAGS_AS_TEXT


def _holds_tags(text: str) -> bool:
    return "<" in text and _TAGS.search(text) is not None


def _holds_null(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(item is None or _holds_null(item) for item in items)
