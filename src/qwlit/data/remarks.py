"""What a careful reader of the data would remark on, row by row."""

import re
from collections.abc import Iterator
from typing import Any

from qwlit.data.conversation import END_THINK, THINK, Conversation
from qwlit.data.templates import END_TOOL_CALL, TOOL_CALL, Family, Supervision, last_query_index

HISTORY_THINKING = "reasoning in earlier turns, which the template takes out: those answers are learnt without it"
THINKING_LEFT_OUT = "reasoning_content, which the template has no place for"
TAGS_AS_TEXT = "<think> or <tool_call> tags inside a text, where they are letters and no structure"
QUOTED_ARGUMENTS = "tool arguments as JSON text, which this template writes in quotes, as the official one does"
NULLS_FROM_TABLE = "null in tool arguments or tools from a table, where missing and null are one: use JSON text there"
_TAGS = re.compile("|".join((THINK, END_THINK, TOOL_CALL, END_TOOL_CALL)))


def remarks(conversation: Conversation, family: Family, supervision: Supervision, *, from_table: bool) -> Iterator[str]:
    """Yield what a careful reader would want to know of how the template takes this conversation."""
    if from_table and (conversation.tools or any(m.tool_calls for m in conversation.messages)):
        arguments = [call.arguments for message in conversation.messages for call in message.tool_calls]
        if _holds_null([*arguments, *conversation.tools]):
            yield NULLS_FROM_TABLE
    for key in sorted({key for message in conversation.messages for key in message.not_read}):
        yield f"a message key that is not read: '{key}'"
    if not family.json_text_arguments and any(
        isinstance(call.arguments, str) for message in conversation.messages for call in message.tool_calls
    ):
        yield QUOTED_ARGUMENTS
    answers = [(i, m, *m.split_thinking()) for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    last_query = last_query_index(conversation.messages)
    learns_history = supervision.loss_on != "last_assistant" and supervision.thinking != "drop"
    if learns_history and family.thinking and any(r and index <= last_query for index, _, r, _ in answers):
        yield HISTORY_THINKING
    if not family.thinking and any(message.reasoning for _, message, _, _ in answers):
        yield THINKING_LEFT_OUT
    if any(_TAGS.search(answer if family.thinking else message.content) for _, message, _, answer in answers):
        yield TAGS_AS_TEXT


def _holds_null(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(item is None or _holds_null(item) for item in items)
