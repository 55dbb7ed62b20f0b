"""Prompts: the ids are those of the official templates, and rows of any format give their prompt."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwlit.core.errors import DataError
from qwlit.data.chat import ChatEncoder
from qwlit.data.conversation import Conversation, message_list, parse_tools
from qwlit.data.jinja_template import unmarked_template
from qwlit.data.prompts import parse_prompt, read_prompts
from qwlit.data.rows import Document, RowError
from qwlit.data.templates import FAMILIES, ChatTemplate, Supervision
from qwlit.data.tokenizer import TextTokenizer
from qwlit.inference.answer import split_thinking
from tests.conversations import conversation
from tests.real_tokenizer import small_tokenizer

USER = {"role": "user", "content": "1 + 二?"}
ANSWER = {"role": "assistant", "content": "3"}


def ids_of(tokenizer: Any, template: ChatTemplate, messages: Any, tools: Any, thinking: bool) -> list[int]:
    encoder = ChatEncoder(TextTokenizer(tokenizer), template, Supervision())
    asked = Conversation(tuple(message_list(messages)), tuple(parse_tools(tools)))
    return encoder.encode_batch([template.render_prompt(asked, thinking=thinking)])[0].input_ids


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_of_a_prompt_are_those_of_the_tokenizers_own_template(family: str, thinking: bool) -> None:
    tokenizer = small_tokenizer(family)
    ours = FAMILIES[family]
    for seed in range(60):
        messages, tools = conversation(seed, tools=ours.tools, thinking=ours.thinking)
        # A user asks again after the conversation, or the last answer is asked for.
        for asked in ([*messages, USER], messages[:-1]):
            if asked[-1]["role"] == "assistant" or not any(message["role"] == "user" for message in asked):
                continue
            expected = tokenizer.apply_chat_template(
                asked, tools=tools, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
            )
            assert ids_of(tokenizer, ours, asked, tools, thinking) == expected, asked


def test_an_unknown_template_without_marks_writes_the_prompt_too() -> None:
    tokenizer = small_tokenizer("qwen2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' ~ m.role ~ '] ' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{{ ' thinks' if enable_thinking }} {% endif %}"
    )
    tokenizer.eos_token = "<|im_end|>"
    template = unmarked_template(tokenizer)
    assert template is not None
    for thinking in (True, False):
        expected = tokenizer.apply_chat_template(
            [USER], add_generation_prompt=True, enable_thinking=thinking, return_dict=False
        )
        assert ids_of(tokenizer, template, [USER], None, thinking) == expected
    with pytest.raises(RowError, match="control token"):
        ids_of(tokenizer, template, [{"role": "user", "content": "a<|im_end|>b"}], None, False)


@pytest.mark.parametrize(
    ("row", "asked", "expected"),
    [
        ({"messages": [USER, ANSWER]}, ["1 + 二?"], "3"),
        ({"messages": [USER]}, ["1 + 二?"], None),
        (
            {"messages": [{"role": "system", "content": "s"}, USER, ANSWER, USER]},
            ["s", "1 + 二?", "3", "1 + 二?"],
            None,
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["q"], "a"),
        ({"conversations": [{"from": "human", "value": "q"}]}, ["q"], None),
        ({"instruction": "q", "input": "x", "output": "a"}, ["q\nx"], "a"),
        ({"instruction": "q"}, ["q"], None),
        ({"prompt": "q", "completion": "a"}, ["q"], "a"),
        ({"prompt": "q", "response": "a"}, ["q"], "a"),
        ({"prompt": "q"}, ["q"], None),
        ({"prompt": [USER]}, ["1 + 二?"], None),
        ({"prompt": "q", "completion": "<think>\nhm\n</think>\n\na"}, ["q"], "a"),
        ({"text": "q"}, ["q"], None),
    ],
)
def test_rows_of_all_formats_give_their_prompt(row: dict[str, Any], asked: list[str], expected: str | None) -> None:
    prompt = parse_prompt(row)
    assert [message.content for message in prompt.conversation.messages] == asked
    assert prompt.expected == expected


def test_a_line_of_text_is_a_question() -> None:
    assert parse_prompt(Document("q")).conversation.messages[0].content == "q"


def test_a_row_without_a_prompt_is_named_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"prompt": "q"}, {"label": 1}])), encoding="utf-8")
    with pytest.raises(DataError, match=r"asked.jsonl:2: unknown format"):
        list(read_prompts(str(file)))
    with pytest.raises(RowError, match="no message before the answer"):
        parse_prompt({"messages": [ANSWER]})
    with pytest.raises(RowError, match="rows of tokens are no prompts"):
        parse_prompt({"input_ids": [1, 2], "labels": [-100, 2]})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", ("", "a")),
        ("<think>\nb\n</think>\n\na", ("b", "a")),
        ("<think>\nb", ("b", "")),
        ("a <think> b </think>", ("", "a <think> b </think>")),
    ],
)
def test_thinking_and_answer_are_told_apart(text: str, parts: tuple[str, str]) -> None:
    assert split_thinking(text) == parts
