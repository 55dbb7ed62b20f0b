"""A tokenizer's own template with `{% generation %}` marks: ids and loss mask of transformers, or a refused row."""

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qwlit.core.errors import DataError
from qwlit.data.chat import ChatEncoder
from qwlit.data.conversation import parse_conversation
from qwlit.data.jinja_template import JinjaTemplate
from qwlit.data.recognise import resolve_template
from qwlit.data.rows import RowError
from qwlit.data.templates import Supervision
from qwlit.data.tokenized import EncodedSample
from qwlit.data.tokenizer import TextTokenizer
from qwlit.inference.generate import eval_prompts
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

        def sample(self, index: int) -> Any:
            return np.array(sample.input_ids), np.array(sample.loss_mask)

    (prompt,) = eval_prompts(One(), 3, end_of_turn_id=encoder.end_of_turn_id)  # type: ignore[arg-type]
    assert tokenizer.decode(prompt.tokens) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>model\n"
    assert tokenizer.decode(prompt.answer) == "One.<|im_end|>"
