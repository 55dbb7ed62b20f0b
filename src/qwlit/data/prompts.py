"""Prompts of a file: its rows without their last answer, which is what a good model would say."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwlit.core.errors import DataError
from qwlit.data.columns import ColumnRenamer
from qwlit.data.conversation import Conversation, Message, from_json_text
from qwlit.data.formats import RowParser
from qwlit.data.readers import RowReader
from qwlit.data.rows import Document, QuarantinedRow, RowError
from qwlit.data.sources import find_sources

EVAL_BATCH_SIZE, EVAL_BATCH_TOKENS = 50, 2048
"""Validation prompts that are answered together, and their tokens with padding: so few that answering takes less memory
than a step of training."""
UNKNOWN = "?"
"""Stands for the answer that a row does not have while the row is parsed."""
_ANSWER_KEYS = {"prompt": "completion", "instruction": "output"}
_parse = RowParser("auto", vocab_size=2**31, loss_on="assistant")


@dataclass(frozen=True)
class Prompt:
    """What a model is to answer."""

    conversation: Conversation
    """Without the next answer; of plain text, one message of the user."""
    expected: str | None = None
    """The answer in the row; None if it has none."""
    origin: str = ""
    """File and line."""


def one_question(text: str) -> Prompt:
    """Return the prompt that is one message of the user."""
    return Prompt(Conversation((Message("user", text),)))


def read_prompts(
    path: str, *, columns: Mapping[str, str] | None = None, origins: Container[str] | None = None
) -> Iterator[Prompt]:
    """Read the prompts of a file, a folder or a data set: conversations in any format, with or without an answer.

    A row of text is a question.

    Args:
        columns: see `data.columns`.
        origins: read only the rows with these origins, "file:line".

    Raises:
        DataError: there is no such file, or a row has no prompt; the message names file and line.
    """
    sources, rename = find_sources(path), ColumnRenamer(columns)
    for row in RowReader(sources, columns):
        origin = f"{sources[row.source]}:{row.line}"
        if origins is not None and origin not in origins:
            continue
        try:
            if isinstance(row, QuarantinedRow):
                raise RowError(row.reason)
            yield replace(parse_prompt(rename(row).content), origin=origin)
        except RowError as error:
            raise DataError(f"{origin}: {error}") from None


def parse_prompt(value: dict[str, Any] | Document) -> Prompt:
    """Take the prompt from a row.

    Raises:
        RowError: the row has none.
    """
    row, answered = ({"text": value.text}, False) if isinstance(value, Document) else _with_answer(value)
    parsed = _parse(row)
    if isinstance(parsed, Document):
        return one_question(parsed.text)
    if not isinstance(parsed, Conversation):
        raise RowError("rows of tokens are no prompts; give rows with 'prompt' or 'messages'")
    *before, last = parsed.messages
    if not before or last.role != "assistant":
        raise RowError("no message before the answer: there is no prompt")
    return Prompt(replace(parsed, messages=tuple(before)), last.split_thinking()[1] if answered else None)


def _with_answer(row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the row, with an answer if it has none, and whether it had one."""
    for key in ("messages", "conversations"):
        turns = from_json_text(row.get(key), f"'{key}'")
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            if (turns[-1].get("role") or turns[-1].get("from")) in ("assistant", "gpt", "model", "bot", "chatgpt"):
                return row, True
            form = (
                {"from": "gpt", "value": UNKNOWN} if "from" in turns[-1] else {"role": "assistant", "content": UNKNOWN}
            )
            return row | {key: [*turns, form]}, False
    for key, answer in _ANSWER_KEYS.items():
        if row.get(key) is not None and row.get(answer) is None and row.get("response") is None:
            return row | {answer: UNKNOWN}, False
    return row, True
