from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwlit.core.errors import DataError
from qwlit.data.chat import ChatEncoder, resolve_template
from qwlit.data.rows import EncodedSample, RowError, parse_conversation
from tests.conversations import conversation
from tests.real_tokenizer import added_tokens, small_tokenizer

FAMILIES = ("qwen2", "qwen2_5", "qwen3")
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def real(real_tokenizer_folder: Callable[[str], Path]) -> dict[str, tuple[Any, ChatEncoder]]:
    """Each family's tokenizer with the real vocabulary, and its encoder."""
    tokenizers = {family: AutoTokenizer.from_pretrained(real_tokenizer_folder(family)) for family in FAMILIES}
    return {family: (tokenizer, ChatEncoder(tokenizer)) for family, tokenizer in tokenizers.items()}


def template_ids(tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)


def encode(encoder: ChatEncoder, messages: list[dict[str, Any]], tools: Any = None) -> EncodedSample:
    return encoder.encode(parse_conversation({"messages": messages, "tools": tools}))


def learnt(tokenizer: Any, sample: EncodedSample) -> str:
    return tokenizer.decode([token for token, flag in zip(sample.input_ids, sample.loss_mask, strict=True) if flag])


def assert_equals_template(tokenizer: Any, encoder: ChatEncoder, family: str) -> None:
    cases = [conversation(seed, tools=family != "qwen2", thinking=family == "qwen3") for seed in range(200)]
    rows = [parse_conversation({"messages": messages, "tools": tools}) for messages, tools in cases]
    for (messages, tools), sample in zip(cases, encoder.encode_batch(rows), strict=True):
        assert sample.input_ids == template_ids(tokenizer, messages, tools), messages
        assert len(sample.loss_mask) == len(sample.input_ids)
        assert sample.loss_mask[0] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_apply_chat_template_with_the_real_vocabulary(real: Any, family: str) -> None:
    tokenizer, encoder = real[family]
    assert encoder.template == family
    assert encoder.end_of_turn_id == 151645
    assert_equals_template(tokenizer, encoder, family)


@pytest.mark.parametrize("extra", [[], ["<think>", "</think>", "<tool_call>", "</tool_call>"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_apply_chat_template_with_a_small_vocabulary(family: str, extra: list[str]) -> None:
    tokenizer = small_tokenizer(family, extra=extra)
    assert_equals_template(tokenizer, ChatEncoder(tokenizer), family)


def test_the_real_ids_of_qwen_tokens(real: Any) -> None:
    tokenizer, encoder = real["qwen3"]
    ids = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<tool_call>": 151657,
        "<think>": 151667,
        "</think>": 151668,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert encoder.vocab_size == 151669
    sample = encode(encoder, [USER, {"role": "assistant", "content": "Hello!"}])
    assert sample.input_ids == [
        *(151644, 872, 198, 13048, 151645, 198),
        *(151644, 77091, 198, 151667, 271, 151668, 271, 9707, 0, 151645, 198),
    ]
    assert sample.loss_mask == [0] * 13 + [1, 1, 1, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_message_text_never_becomes_a_control_token(real: Any, family: str) -> None:
    tokenizer, encoder = real[family]
    tags = "".join(token.content for token in added_tokens("qwen3"))
    control = {token.content for token in added_tokens(family)}
    count = {}
    for words in (tags, "plain"):
        messages = [{"role": "system", "content": words}, {"role": "user", "content": words}]
        messages += [{"role": "assistant", "content": "x", "reasoning_content": words}, USER]
        messages += [{"role": "assistant", "content": words.replace("</think>", "")}]
        ids = encode(encoder, messages).input_ids
        count[words] = sum(token in control for token in tokenizer.convert_ids_to_tokens(ids))
    assert count[tags] == count["plain"]
    assert tags in tokenizer.decode(ids) or words == "plain"


def test_what_is_learnt_is_the_answer_and_its_end(real: Any) -> None:
    for family, (tokenizer, encoder) in real.items():
        messages = [USER, {"role": "assistant", "content": "你好🎉\n"}, USER, {"role": "assistant", "content": " Yes."}]
        assert learnt(tokenizer, encode(encoder, messages)) == "你好🎉\n<|im_end|> Yes.<|im_end|>", family


def test_a_token_that_straddles_the_boundary_is_not_learnt(real: Any) -> None:
    # The header's newline and the answer's merge into one token: learning it would teach the header.
    tokenizer, encoder = real["qwen2"]
    sample = encode(encoder, [USER, {"role": "assistant", "content": "\n\nYes."}])
    assert learnt(tokenizer, sample) == "Yes.<|im_end|>"
    assert 1406 in sample.input_ids  # "\n\n\n"


def test_a_character_split_over_tokens_is_learnt_whole(real: Any) -> None:
    tokenizer, encoder = real["qwen3"]
    sample = encode(encoder, [USER, {"role": "assistant", "content": "𓀀", "reasoning_content": "𓂀"}])
    assert learnt(tokenizer, sample) == "<think>\n𓂀\n</think>\n\n𓀀<|im_end|>"


def test_batch_and_single_agree_and_an_empty_batch_is_empty(real: Any) -> None:
    _, encoder = real["qwen3"]
    rows = [parse_conversation(dict(zip(("messages", "tools"), conversation(s), strict=True))) for s in range(20)]
    assert encoder.encode_batch(rows) == [encoder.encode(row) for row in rows]
    assert encoder.encode_batch([]) == []


def test_the_fingerprint_tells_tokenizers_and_templates_apart() -> None:
    small, larger = small_tokenizer("qwen3"), small_tokenizer("qwen3", extra=["<think>"])
    encoders = [ChatEncoder(small), ChatEncoder(small, "qwen2_5"), ChatEncoder(larger), ChatEncoder(small, "qwen3")]
    prints = [encoder.fingerprint for encoder in encoders]
    assert len(set(prints)) == 3
    assert prints[0] == prints[3]


def test_a_tokenizer_without_a_template_names_the_remedy_and_obeys_it() -> None:
    tokenizer = small_tokenizer("qwen3")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"data\.template=qwen2"):
        ChatEncoder(tokenizer)
    assert resolve_template(tokenizer, "qwen2_5") == "qwen2_5"


def test_a_tokenizer_without_chatml_tokens_is_refused() -> None:
    backend = Tokenizer(models.BPE())
    backend.add_special_tokens([AddedToken("<|im_start|>")])
    with pytest.raises(DataError, match=r"no <\|im_end\|> token"):
        ChatEncoder(PreTrainedTokenizerFast(tokenizer_object=backend), "qwen2")


def test_a_tokenizer_that_spells_a_control_token_with_letters_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<|im_start|>": 0, "<|im_end|>": 1, "?": 2}, unk_token="?"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(DataError, match="plain text"):
        ChatEncoder(PreTrainedTokenizerFast(tokenizer_object=backend), "qwen2")


def test_qwen2_refuses_tools_row_by_row(real: Any) -> None:
    with pytest.raises(RowError, match="no tools"):
        encode(real["qwen2"][1], [USER, {"role": "assistant", "content": "x"}], [{"name": "add"}])
