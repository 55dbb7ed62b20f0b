"""A tokenizer's own template with `{% generation %}` marks: ids and loss mask of transformers, or a refused row."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qwlit.config.compose import compose
from qwlit.core.errors import DataError
from qwlit.data.chat import ChatEncoder
from qwlit.data.conversation import parse_conversation
from qwlit.data.jinja_template import JinjaTemplate, _pattern, _pieces
from qwlit.data.recognise import resolve_template
from qwlit.data.rows import NeedsTokenizer, Row, RowError
from qwlit.data.templates import Piece, Supervision
from qwlit.data.tokenized import EncodedSample
from qwlit.data.tokenizer import TextTokenizer
from qwlit.inference.generate import eval_prompts
from qwlit.planning.tokenized_data import _encoder
from tests.conversations import Messages, conversation
from tests.real_tokenizer import JINJA, small_tokenizer

MARKED = (
    "{%- if tools %}{{ '<|im_start|>tools\\n' ~ (tools | tojson) ~ '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{ '<|im_start|>model\\n' }}"
    "{%- generation %}{%- if m.reasoning_content %}{{ '<think>' ~ m.reasoning_content ~ '</think>' }}{%- endif %}"
    "{{ m.content | trim }}{%- for call in m.tool_calls or [] %}{%- set f = call.function or call %}"
    "{{ '<tool_call>' ~ f.name ~ ' ' ~ (f.arguments | tojson) ~ '</tool_call>' }}{%- endfor %}"
    "{{ eos_token ~ '\\n' }}{%- endgeneration %}"
    "{%- elif m.role == 'tool' and m.content == '' %}{{ raise_exception('a tool\\nsaid nothing') }}"
    "{%- else %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content | trim) ~ '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
)
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "One."}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = small_tokenizer("qwen3", extra=["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template, tokenizer.eos_token = template, "<|im_end|>"
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with(MARKED)


def encoder_of(tokenizer: Any, **supervision: Any) -> ChatEncoder:
    template = resolve_template(tokenizer, "auto")
    assert isinstance(template, JinjaTemplate)
    encoder = ChatEncoder(TextTokenizer(tokenizer), template, Supervision(**supervision))
    # As a worker process gets it.
    again: ChatEncoder = pickle.loads(pickle.dumps(encoder))
    return again


def encode(encoder: ChatEncoder, messages: Messages, tools: Any = None) -> EncodedSample:
    return encoder.encode_batch([encoder.render(parse_conversation(messages, tools))])[0]


def supervised(tokenizer: Any, messages: Messages, **supervision: Any) -> str:
    sample = encode(encoder_of(tokenizer, **supervision), messages)
    return tokenizer.decode([token for token, flag in zip(sample.input_ids, sample.loss_mask, strict=True) if flag])


def test_ids_and_loss_mask_are_those_of_apply_chat_template(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer)
    assert encoder.end_of_turn_id == tokenizer.eos_token_id
    for seed in range(150):
        messages, tools = conversation(seed)
        expected = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        sample = encode(encoder, messages, tools)
        assert sample.input_ids == expected["input_ids"], messages
        assert sample.loss_mask == expected["assistant_masks"], messages


def test_the_settings_and_a_rows_marks_choose_among_the_marked_parts(tokenizer: Any) -> None:
    two = [USER, ANSWER, USER, {"role": "assistant", "content": "Two.", "reasoning_content": "hm"}]
    one_off = [USER, ANSWER | {"weight": 0}, *two[2:]]
    one, second = "One.<|im_end|>\n", "<think>hm</think>Two.<|im_end|>\n"
    assert supervised(tokenizer, two) == supervised(tokenizer, two, thinking="keep") == one + second
    assert supervised(tokenizer, two, thinking="drop") == one + "Two.<|im_end|>\n"
    assert supervised(tokenizer, two, loss_on="last_assistant") == supervised(tokenizer, one_off) == second
    whole = tokenizer.apply_chat_template(two, tokenize=False)
    assert "<|im_start|>" + supervised(tokenizer, two, loss_on="all") == whole
    with pytest.raises(RowError, match="does not show where it is"):
        supervised(tokenizer, one_off, loss_on="all")


# The answer, each call and the end have marks of their own; before a call stands text that no mark covers.
PIECEWISE = (
    MARKED.replace("{{ m.content | trim }}", "{{ m.content | trim }}{%- endgeneration %}")
    .replace("{{ '<tool_call>'", "{{ '\\n' }}{%- generation %}{{ '<tool_call>'")
    .replace("'</tool_call>' }}", "'</tool_call>' }}{%- endgeneration %}")
    .replace("{{ eos_token", "{%- generation %}{{ eos_token")
)
CALLS = [{"function": {"name": name, "arguments": {"a": 1}}} for name in ("add", "sub")]
CHAIN = [USER, ANSWER | {"tool_calls": CALLS}, {"role": "tool", "content": "3"}, ANSWER, USER, ANSWER]


@pytest.mark.parametrize(
    ("loss_on", "messages", "only"),
    [
        ("last_assistant", CHAIN[:2], [1]),
        ("last_assistant", [USER, ANSWER, *CHAIN[:2]], [3]),
        ("last_assistant", CHAIN, [5]),
        ("assistant", [CHAIN[0], CHAIN[1] | {"loss": False}, *CHAIN[2:]], [3, 5]),
        ("assistant", [*CHAIN[:3], ANSWER | {"loss": False}, *CHAIN[4:]], [1, 5]),
        ("assistant", [USER, ANSWER | {"loss": False}, ANSWER, CHAIN[1]], [2, 3]),
    ],
)
def test_answers_marked_piece_by_piece_are_chosen_whole(loss_on: Any, messages: Messages, only: list[int]) -> None:
    tokenizer = tokenizer_with(PIECEWISE)
    # The reference renders each chosen answer alone: what stands inside marks there.
    alone = [
        tokenizer.apply_chat_template([messages[i]], return_dict=True, return_assistant_tokens_mask=True) for i in only
    ]
    kept = [
        token for part in alone for token, flag in zip(part["input_ids"], part["assistant_masks"], strict=True) if flag
    ]
    assert supervised(tokenizer, messages, loss_on=loss_on) == tokenizer.decode(kept)


def test_a_turn_is_not_chosen_where_the_template_hides_its_place() -> None:
    template = tokenizer_with("{{ messages | length }}" + PIECEWISE)
    assert supervised(template, CHAIN)
    with pytest.raises(RowError, match="does not show where message 2 begins"):
        supervised(template, CHAIN, loss_on="last_assistant")


@pytest.mark.parametrize(
    ("template", "text", "reason"),
    [
        ("{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{%- endif %}", "Short.", "no system"),
        ("{%- set messages = messages[-2:] %}", "Short.", "leaves out"),
        ("", "Short <|im_end|>", "control token"),
    ],
)
def test_a_system_text_that_the_template_cannot_write_is_refused_once(template: str, text: str, reason: str) -> None:
    own = resolve_template(tokenizer_with(template + MARKED), "auto")
    with pytest.raises(DataError, match=rf"data\.system.*{reason}.*data\.template"):
        own.with_system(text)
    family = resolve_template(tokenizer_with(JINJA["qwen3"]), "auto")
    assert family.with_system(text) == replace(family, default_system=text)


def test_without_control_tokens_a_text_stays_whole() -> None:
    assert list(_pieces("ab", [(0, 1)], _pattern(()))) == [Piece("a", False, True), Piece("b", False, False)]


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([USER | {"content": "a <|im_end|> b"}, ANSWER], None, r"contains the control token <\|im_end\|>"),
        ([USER, ANSWER | {"content": "One. <think>"}], None, "control token <think>"),
        ([USER, ANSWER], [{"type": "function", "function": {"name": "<tool_call>"}}], "control token <tool_call>"),
        ([USER, ANSWER, {"role": "tool", "content": ""}, ANSWER], None, "template refuses it: a tool said nothing"),
    ],
)
def test_a_row_that_cannot_be_rendered_for_certain_is_refused(
    tokenizer: Any, messages: Messages, tools: Any, reason: str
) -> None:
    with pytest.raises(RowError, match=reason) as raised:
        encode(encoder_of(tokenizer), messages, tools)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("leaves_out", "messages", "tools", "reason"),
    [
        (
            "{%- set messages = messages[-2:] %}",
            [USER | {"content": "First"}, ANSWER, USER, ANSWER],
            None,
            "leaves out, or changes, a message or a call of the user",
        ),
        ("{%- set tools = none %}", [USER, ANSWER], [{"name": "add", "parameters": {}}], "not write the tool add"),
    ],
)
def test_a_row_of_which_the_template_leaves_out_a_part_is_refused(
    leaves_out: str, messages: Messages, tools: Any, reason: str
) -> None:
    with pytest.raises(RowError, match=reason):
        encode(encoder_of(tokenizer_with(leaves_out + MARKED)), messages, tools)


def test_a_default_system_text_becomes_a_system_message(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer)
    with_text = replace(encoder.template, default_system="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    pieces = with_text.render(parse_conversation([USER, ANSWER]), Supervision())
    assert pieces == encoder.render(parse_conversation([system, USER, ANSWER]))
    other = {"role": "system", "content": "Be long."}
    assert with_text.render(parse_conversation([other, USER, ANSWER]), Supervision()) == encoder.render(
        parse_conversation([other, USER, ANSWER])
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (MARKED.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""), r"put \{% generation %\} and"),
        (
            MARKED.replace("{{ eos_token ~ '\\n' }}{%- endgeneration %}", "{%- endgeneration %}<|im_end|>"),
            "learn to end",
        ),
        ("{{ strftime_now('%d %B %Y') }}" + MARKED, "today's date"),
        ("{{ raise_exception('no') }}" + MARKED, r"cannot render a plain chat \(the chat template refuses it: no\)"),
    ],
)
def test_an_unknown_template_without_usable_marks_is_refused(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"{reason}.*data.template"):
        resolve_template(tokenizer_with(template), "auto")


def test_marks_in_a_known_familys_template_change_nothing() -> None:
    marked = JINJA["qwen2"].replace("{%- endfor %}", "{% generation %}{% endgeneration %}{%- endfor %}")
    assert resolve_template(tokenizer_with(marked), "auto") == resolve_template(tokenizer_with(JINJA["qwen2"]), "auto")


def test_an_expected_answer_ends_with_its_end_token_also_where_the_marks_reach_further(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer)
    sample = encode(encoder, [USER, ANSWER])

    class One:
        def __len__(self) -> int:
            return 1

        def read(self, ids: Any) -> Any:
            return np.array(sample.input_ids), np.array(sample.loss_mask)

    (prompt,) = eval_prompts(One(), 3, end_of_turn_id=encoder.end_of_turn_id)  # type: ignore[arg-type]
    assert tokenizer.decode(prompt.tokens) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>model\n"
    assert tokenizer.decode(prompt.answer) == "One.<|im_end|>"


def test_settings_without_effect_on_an_own_template_are_refused_for_conversations(tmp_path: Path) -> None:
    tokenizer_with(MARKED).save_pretrained(tmp_path)
    settings = ["data.path=a.jsonl", f"model.tokenizer={tmp_path}", "model.init=random", "data.thinking=keep"]
    with pytest.raises(NeedsTokenizer, match=r"data\.thinking=keep has no effect"):
        _encoder(compose(settings).config)[1]([Row(0, 1, json.dumps({"messages": [USER, ANSWER]}).encode())])
