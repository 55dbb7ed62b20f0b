import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwlit.core.errors import DataError
from qwlit.data import templates
from qwlit.data.chat import ChatEncoder
from qwlit.data.conversation import parse_conversation
from qwlit.data.formats import EncodedSample
from qwlit.data.recognise import resolve_template
from qwlit.data.rows import RowError
from qwlit.data.templates import Supervision
from qwlit.data.tokenizer import TextTokenizer
from tests.conversations import Messages, conversation, supervised_spans, without_reasoning
from tests.real_tokenizer import JINJA, added_tokens, small_tokenizer

FAMILIES = tuple(JINJA)
USER = {"role": "user", "content": "Hi"}
SUPERVISIONS = [
    Supervision(loss_on, thinking)
    for loss_on, thinking in product(("assistant", "last_assistant", "all"), ("mask_empty", "keep", "drop"))
]

Real = dict[str, tuple[Any, TextTokenizer]]


@pytest.fixture(scope="module")
def real(real_tokenizer_folder: Callable[[str], Path]) -> Real:
    """Each family's tokenizer with the real vocabulary."""
    tokenizers = {family: AutoTokenizer.from_pretrained(real_tokenizer_folder(family)) for family in FAMILIES}
    return {family: (tokenizer, TextTokenizer(tokenizer)) for family, tokenizer in tokenizers.items()}


def encoder_of(tokenizer: TextTokenizer, family: str, supervision: Supervision | None = None) -> ChatEncoder:
    return ChatEncoder(tokenizer, templates.FAMILIES[family], supervision or Supervision())


def encode(encoder: ChatEncoder, messages: Messages, tools: Any = None) -> EncodedSample:
    return encoder.encode_batch([encoder.render(parse_conversation(messages, tools))])[0]


def supervised_text(tokenizer: Any, sample: EncodedSample) -> str:
    return tokenizer.decode([token for token, flag in zip(sample.input_ids, sample.loss_mask, strict=True) if flag])


def generated(family: str, seeds: range) -> list[tuple[Messages, Any]]:
    return [conversation(seed, tools=family != "qwen2", thinking=family == "qwen3") for seed in seeds]


def assert_equals_template(tokenizer: Any, text_tokenizer: TextTokenizer, family: str) -> None:
    encoder = encoder_of(text_tokenizer, family)
    cases = generated(family, range(150))
    rendered = [encoder.render(parse_conversation(messages, tools)) for messages, tools in cases]
    for (messages, tools), sample in zip(cases, encoder.encode_batch(rendered), strict=True):
        assert sample.input_ids == tokenizer.apply_chat_template(messages, tools=tools, return_dict=False), messages
        assert len(sample.loss_mask) == len(sample.input_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_apply_chat_template_with_the_real_vocabulary(real: Real, family: str) -> None:
    tokenizer, text_tokenizer = real[family]
    assert resolve_template(tokenizer, "auto") == templates.FAMILIES[family]
    assert encoder_of(text_tokenizer, family).end_of_turn_id == 151645
    assert_equals_template(tokenizer, text_tokenizer, family)


@pytest.mark.parametrize("extra", [[], ["<think>", "</think>", "<tool_call>", "</tool_call>"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_apply_chat_template_with_a_small_vocabulary(family: str, extra: list[str]) -> None:
    tokenizer = small_tokenizer(family, extra=extra)
    assert_equals_template(tokenizer, TextTokenizer(tokenizer), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_supervised_where_the_settings_say_so_of_all_its_characters(real: Real, family: str) -> None:
    tokenizer, text_tokenizer = real[family]
    for messages, tools in generated(family, range(40)):
        kept, dropped = (
            tokenizer.apply_chat_template(rows, tools=tools, tokenize=False)
            for rows in (messages, without_reasoning(messages))
        )
        for text in {kept, dropped}:
            whole = tokenizer(text, return_offsets_mapping=True)
            offsets = np.array(whole.offset_mapping)
            for supervision in (s for s in SUPERVISIONS if text == (dropped if s.thinking == "drop" else kept)):
                sample = encode(encoder_of(text_tokenizer, family, supervision), messages, tools)
                letters = np.zeros(len(text) + 1, dtype=int)
                for start, end in supervised_spans(text, supervision.loss_on, supervision.thinking):
                    letters[start:end] = 1
                mask = [int(letters[start:end].all()) for start, end in offsets]
                assert sample == EncodedSample(whole.input_ids, [0, *mask[1:]]), (supervision, messages)


@pytest.mark.parametrize("thinking", ["mask_empty", "keep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_before_the_last_answer_is_the_prompt_of_inference(real: Real, family: str, thinking: Any) -> None:
    tokenizer, text_tokenizer = real[family]
    encoder = encoder_of(text_tokenizer, family, Supervision("last_assistant", thinking))
    seen = set()
    for messages, tools in generated(family, range(200)):
        *before, last = messages
        reasons = _reasons(last)
        # Where the answer itself begins with space, that merges with the header's line break.
        if without_reasoning([last])[0]["content"][0].isspace() and not reasons:
            continue
        sample = encode(encoder, messages, tools)
        # A model that was trained to write the empty block gets the prompt of a model with thinking.
        enabled = reasons or thinking == "keep"
        prompt = tokenizer.apply_chat_template(
            before, tools=tools, add_generation_prompt=True, enable_thinking=enabled, return_dict=False
        )
        assert sample.input_ids[: sample.loss_mask.index(1)] == prompt, messages
        seen.add((reasons, bool(tools)))
    assert len(seen) == {"qwen2": 1, "qwen3": 4}.get(family, 2)


def _reasons(answer: dict[str, Any]) -> bool:
    content = answer["content"]
    apart = answer.get("reasoning_content")
    inline = content.partition("</think>")[0].removeprefix("<think>") if content.startswith("<think>") else ""
    return bool((inline if apart is None else apart).strip("\n"))


def test_the_real_ids_of_qwen_tokens(real: Real) -> None:
    tokenizer, text_tokenizer = real["qwen3"]
    ids = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<tool_call>": 151657,
        "<think>": 151667,
        "</think>": 151668,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert {token: text_tokenizer.control_ids[token] for token in ids} == ids
    assert len(tokenizer) == 151669
    assert text_tokenizer.end_of_text_id == 151643
    sample = encode(encoder_of(text_tokenizer, "qwen3"), [USER, {"role": "assistant", "content": "Hello!"}])
    assert sample.input_ids == [
        *(151644, 872, 198, 13048, 151645, 198),
        *(151644, 77091, 198, 151667, 271, 151668, 271, 9707, 0, 151645, 198),
    ]
    assert sample.loss_mask == [0] * 13 + [1, 1, 1, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_message_text_never_becomes_a_control_token(real: Real, family: str) -> None:
    tokenizer, text_tokenizer = real[family]
    tags = "".join(token.content for token in added_tokens("qwen3"))
    control = {token.content for token in added_tokens(family)}
    encoder = encoder_of(text_tokenizer, family)
    count = {}
    for words in (tags, "plain"):
        messages = [{"role": "system", "content": words}, {"role": "user", "content": words}]
        messages += [{"role": "assistant", "content": "x", "reasoning_content": words}, USER]
        messages += [{"role": "system", "content": words}, {"role": "assistant", "content": words}]
        ids = encode(encoder, messages).input_ids
        count[words] = sum(token in control for token in tokenizer.convert_ids_to_tokens(ids))
        assert tokenizer.decode(ids).count(words) == 4
    assert count[tags] == count["plain"]


def test_what_is_supervised_is_the_answer_and_its_end(real: Real) -> None:
    for family, (tokenizer, text_tokenizer) in real.items():
        messages = [USER, {"role": "assistant", "content": "你好🎉\n"}, USER, {"role": "assistant", "content": " Yes."}]
        sample = encode(encoder_of(text_tokenizer, family), messages)
        assert supervised_text(tokenizer, sample) == "你好🎉\n<|im_end|> Yes.<|im_end|>", family


def test_a_token_that_straddles_the_boundary_is_not_supervised(real: Real) -> None:
    # The header's newline and the answer's merge into one token: learning it would teach the header.
    tokenizer, text_tokenizer = real["qwen2"]
    sample = encode(encoder_of(text_tokenizer, "qwen2"), [USER, {"role": "assistant", "content": "\n\nYes."}])
    assert supervised_text(tokenizer, sample) == "Yes.<|im_end|>"
    assert 1406 in sample.input_ids  # "\n\n\n"


def test_a_character_split_over_tokens_is_supervised_whole(real: Real) -> None:
    tokenizer, text_tokenizer = real["qwen3"]
    messages = [USER, {"role": "assistant", "content": "𓀀", "reasoning_content": "𓂀"}]
    sample = encode(encoder_of(text_tokenizer, "qwen3"), messages)
    assert supervised_text(tokenizer, sample) == "<think>\n𓂀\n</think>\n\n𓀀<|im_end|>"


def test_with_loss_on_all_every_token_but_the_first_is_supervised(real: Real) -> None:
    for family, (_, text_tokenizer) in real.items():
        encoder = encoder_of(text_tokenizer, family, Supervision("all"))
        sample = encode(encoder, [USER, {"role": "assistant", "content": "Yes."}])
        assert sample.loss_mask == [0] + [1] * (len(sample.input_ids) - 1)


def test_batch_and_single_agree_and_an_empty_batch_is_empty(real: Real) -> None:
    encoder = encoder_of(real["qwen3"][1], "qwen3")
    rows = [parse_conversation(*conversation(seed)) for seed in range(20)]
    alone = [sample for row in rows for sample in encoder.encode_batch([encoder.render(row)])]
    assert encoder.encode_batch(encoder.render(row) for row in rows) == alone
    assert encoder.encode_batch([]) == []


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    families = [("qwen3", []), ("qwen3", []), ("qwen2", []), ("qwen3", ["<think>"])]
    prints = [TextTokenizer(small_tokenizer(family, extra=extra)).fingerprint for family, extra in families]
    assert prints[0] == prints[1] == prints[2] != prints[3]
    otherwise = TextTokenizer(small_tokenizer("qwen3", as_qwen=True))
    assert otherwise.fingerprint not in prints


ADDED = [
    "zyxw",
    AddedToken("<brand>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("wort", single_word=True, normalized=True),
    AddedToken("café", normalized=True),
    AddedToken("<|mine|>", normalized=False),
]
WITH_ADDED = [
    "zyxw",
    "a zyxwzyxw, <brand> \n wort, wortlos ab-wort\nwort",
    "cafe\u0301 café <|mine|><|mine|>",
    "你好zyxw世界<brand><brand>  zyxw ",
    "No such token: zyx w, < brand>.",
]


@pytest.fixture(params=["real", "small"])
def with_added(request: pytest.FixtureRequest, real_tokenizer_folder: Callable[[str], Path]) -> Any:
    """A tokenizer to which its user has added tokens that are not special, between others that are."""
    if request.param == "real":
        tokenizer = AutoTokenizer.from_pretrained(real_tokenizer_folder("qwen3"))
    else:
        tokenizer = small_tokenizer("qwen3", extra=["<think>", "</think>"])
    tokenizer.add_tokens(ADDED[:2])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|secret|>"]})
    tokenizer.add_tokens(ADDED[2:])
    return tokenizer


def test_tokens_that_a_user_added_are_vocabulary_with_the_tokenizers_own_ids(with_added: Any) -> None:
    text_tokenizer = TextTokenizer(with_added)
    sent = pickle.loads(pickle.dumps(text_tokenizer))
    expected = [with_added(text, add_special_tokens=False).input_ids for text in WITH_ADDED]
    assert {with_added.convert_tokens_to_ids(str(token)) for token in ADDED} <= {i for ids in expected for i in ids}
    for tokenizer in (text_tokenizer, sent):
        assert tokenizer.encode(WITH_ADDED) == expected
        assert [encoding.ids for encoding in tokenizer.encode_with_offsets(WITH_ADDED)] == expected
    messages = [{"role": "user", "content": WITH_ADDED[1]}, {"role": "assistant", "content": WITH_ADDED[2]}]
    for tokenizer in (text_tokenizer, sent):
        sample = encode(encoder_of(tokenizer, "qwen3"), messages)
        assert sample.input_ids == with_added.apply_chat_template(messages, return_dict=False)


def test_beside_added_tokens_control_tokens_are_never_made_from_text(with_added: Any) -> None:
    text_tokenizer = TextTokenizer(with_added)
    assert "<|secret|>" in text_tokenizer.control_ids and "<|mine|>" not in text_tokenizer.control_ids
    control = {"<|im_end|>", "<|endoftext|>", "<|secret|>", "<think>", "</think>"}
    text = "".join(f"zyxw{token}" for token in sorted(control))
    for tokenizer in (text_tokenizer, pickle.loads(pickle.dumps(text_tokenizer))):
        (ids,) = tokenizer.encode([text])
        assert not set(ids) & set(tokenizer.control_ids.values())
        assert ids.count(with_added.convert_tokens_to_ids("zyxw")) == len(control)
        assert with_added.decode(ids) == text


def test_added_tokens_and_their_flags_are_in_the_fingerprint() -> None:
    prints = set()
    for token in (None, "zyxw", AddedToken("zyxw", lstrip=True), AddedToken("zyxw", special=True)):
        tokenizer = small_tokenizer("qwen3")
        tokenizer.add_tokens([token] if token else [])
        prints.add(TextTokenizer(tokenizer).fingerprint)
    assert len(prints) == 4


def test_a_tokenizer_without_a_template_names_the_remedy_and_obeys_it() -> None:
    tokenizer = small_tokenizer("qwen3")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"data\.template=qwen2"):
        resolve_template(tokenizer, "auto")
    assert resolve_template(tokenizer, "qwen2_5") == templates.FAMILIES["qwen2_5"]


def test_a_tokenizer_without_chatml_tokens_is_refused_for_conversations() -> None:
    backend = Tokenizer(models.BPE())
    backend.add_special_tokens([AddedToken("<|im_start|>")])
    tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(DataError, match=r"no <\|im_end\|> token"):
        encoder_of(tokenizer, "qwen2")
    with pytest.raises(DataError, match=r"no <\|endoftext\|> and no other end-of-text token"):
        _ = tokenizer.end_of_text_id


def test_without_endoftext_documents_end_with_the_tokenizers_own_end() -> None:
    backend = Tokenizer(models.BPE())
    backend.add_special_tokens([AddedToken("<a>"), AddedToken("</s>")])
    tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert tokenizer.end_of_text_id == 1


def test_a_tokenizer_that_spells_a_control_token_with_letters_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<|im_start|>": 0, "<|im_end|>": 1, "?": 2}, unk_token="?"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(DataError, match="plain text"):
        TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_qwen2_refuses_tools_row_by_row(real: Real) -> None:
    with pytest.raises(RowError, match="does not support tools"):
        encode(encoder_of(real["qwen2"][1], "qwen2"), [USER, {"role": "assistant", "content": "x"}], [{"name": "add"}])
