"""What a careful reader of the data would remark on, row by row."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from qwlit.data.conversation import END_THINK, THINK, Conversation
from qwlit.data.meaning import holds_placeholder
from qwlit.data.templates import END_RESPONSE, END_TOOL_CALL, RESPONSE, TOOL_CALL, Family, Supervision, last_query_index
from qwlit.data.unread import message_key_remarks

HISTORY_THINKING = "reasoning in earlier turns, which the template takes out: those answers are learnt without it"
THINKING_LEFT_OUT = "reasoning_content, which the template has no place for"
TAGS_AS_TEXT = "<think> or <tool_call> tags inside a text, where they are letters and no structure"
QUOTED_ARGUMENTS = "tool arguments as JSON text, which this template writes in quotes, as the official one does"
NULLS_FROM_TABLE = "null in tool arguments or tools from a table, where missing and null are one: use JSON text there"
BARE_TOOLS = 'bare tool definitions, which are wrapped as {"type": "function", "function": …}, as servers do'
MARKED_QUESTION = "a mark to supervise a turn that is no answer: only answers are, with data.loss_on=all every turn"
ANSWERS_IN_A_ROW = "answers directly after one another: each ends its turn; join them if they are one answer"
ANSWER_FIRST = "an answer before any question: are the speakers swapped?"
PLACEHOLDER_AS_TEXT = "<image>, <video> or <audio> inside a text, where it is letters: training reads text alone"
WRITTEN_OUT = (
    "control tokens such as <|im_start|> written out in a text: the model is trained on their letters, not on the"
    " tokens; give the conversation as messages, or the tokens as input_ids"
)
NO_EMPTY_BLOCK = (
    "answers or calls without reasoning before the last one: training has no empty think block before them, inference"
    " with thinking off has one; data.loss_on=last_assistant supervises only the last answer"
)
_TAGS = re.compile("|".join((THINK, END_THINK, TOOL_CALL, END_TOOL_CALL, RESPONSE, END_RESPONSE)))


def remarks(conversation: Conversation, family: Family, supervision: Supervision, *, from_table: bool) -> Iterator[str]:
    """Yield what a careful reader would want to know of how the template takes this conversation."""
    if from_table and (conversation.tools or any(m.tool_calls for m in conversation.messages)):
        arguments = [call.arguments for message in conversation.messages for call in message.tool_calls]
        if _holds_null([*arguments, *conversation.tools]):
            yield NULLS_FROM_TABLE
    yield from message_key_remarks(key for message in conversation.messages for key in message.not_read)
    yield from _what_was_done(conversation, supervision)
    if not family.json_text_arguments and any(
        isinstance(call.arguments, str) for message in conversation.messages for call in message.tool_calls
    ):
        yield QUOTED_ARGUMENTS
    answers = [(i, m, *m.split_thinking()) for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    if family.thinking:
        yield from _without_block(conversation, supervision)
    if not family.thinking and any(message.reasoning for _, message, _, _ in answers):
        yield THINKING_LEFT_OUT
    texts = [message.content for message in conversation.messages if message.role != "assistant"]
    texts += [answer if family.thinking else message.content for _, message, _, answer in answers]
    if any(map(_holds_tags, texts)):
        yield TAGS_AS_TEXT


def _what_was_done(conversation: Conversation, supervision: Supervision) -> Iterator[str]:
    """Yield how the row was read where another reader would read it otherwise."""
    if conversation.has_bare_tools:
        yield BARE_TOOLS
    if supervision.loss_on != "all" and any(m.mark and m.role != "assistant" for m in conversation.messages):
        yield MARKED_QUESTION
    roles = [message.role for message in conversation.messages]
    if any(pair == ("assistant", "assistant") for pair in pairwise(roles)):
        yield ANSWERS_IN_A_ROW
    if next(role for role in roles if role != "system") == "assistant":
        yield ANSWER_FIRST
    if any(holds_placeholder(message.content) for message in conversation.messages):
        yield PLACEHOLDER_AS_TEXT


def _without_block(conversation: Conversation, supervision: Supervision) -> Iterator[str]:
    """Yield whether supervised answers have no think block, with reasoning that the template takes out or with none."""
    messages = conversation.messages
    last_query = last_query_index(messages)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    supervised = answers[-1:] if supervision.loss_on == "last_assistant" else answers
    dropped = supervision.thinking == "drop"
    reasons = {i: not dropped and bool(messages[i].split_thinking()[0]) for i in supervised}
    unmarked = [i for i in supervised if messages[i].is_supervised]
    if any(reasons[i] and i <= last_query for i in unmarked):
        yield HISTORY_THINKING
    if any(not reasons[i] and (i <= last_query or i < len(messages) - 1) for i in unmarked):
        yield NO_EMPTY_BLOCK


def document_remarks(text: str) -> Iterator[str]:
    """Yield what a careful reader would want to know of a document."""
    if holds_placeholder(text):
        yield PLACEHOLDER_AS_TEXT
    if _holds_tags(text):
        yield TAGS_AS_TEXT


def _holds_tags(text: str) -> bool:
    return "<" in text and _TAGS.search(text) is not None


def _holds_null(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(item is None or _holds_null(item) for item in items)
