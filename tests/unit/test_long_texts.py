"""Long texts are cut for the tokenizer, and have the tokens of the whole."""

import random

import pytest

from qwlit.data.long_texts import cut_text, group_texts, refuse_long_word
from qwlit.data.rows import RowError
from qwlit.data.tokenizer import TextTokenizer
from tests.conversations import FRAGMENTS
from tests.real_tokenizer import small_tokenizer

WORDS = [
    "It's",
    " was",
    " 12",
    "345",
    ",",
    ". ",
    "\n",
    "\n\n  ",
    "天下",
    "。",
    "；",
    "e\u0301",
    "\u00e9",
    " A",
    "1b2",
    "!?",
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer("qwen3", as_qwen=True))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("long_texts", "tokenizer"):
        monkeypatch.setattr(f"qwlit.data.{module}.PIECE_CHARACTERS", 64)
    monkeypatch.setattr("qwlit.data.long_texts.LONGEST_WORD", 100)


@pytest.mark.parametrize("seed", range(40))
def test_a_text_in_pieces_has_the_tokens_and_places_of_the_whole(seed: int, tokenizer: TextTokenizer) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(WORDS if seed % 2 else [*WORDS, *FRAGMENTS], k=300))
    (whole,) = tokenizer._plain.encode_batch([text], add_special_tokens=False)
    (cut,) = tokenizer.encode_with_offsets([text])
    assert list(cut.ids) == whole.ids == tokenizer.encode([text])[0]
    assert list(cut.offsets) == whole.offsets
    assert "".join(cut_text(text)) == text and len(list(cut_text(text))) > 5


def test_texts_in_groups_keep_their_order(tokenizer: TextTokenizer) -> None:
    texts = ["", "a", "b c " * 100, "d", "e f " * 50, "g h " * 3, ""]
    assert [text for group in group_texts(texts) for text in group] == texts
    alone = [tokenizer.encode([text])[0] for text in texts]
    assert tokenizer.encode(texts) == alone == [list(each.ids) for each in tokenizer.encode_with_offsets(texts)]


def test_tokens_of_many_texts_are_those_of_few(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number} of many texts." for number in range(50)]
    few = tokenizer.encode_with_offsets(texts)
    monkeypatch.setattr("qwlit.data.tokenizer.MANY_CHARACTERS", 10)
    many = tokenizer.encode_with_offsets(texts)
    assert [(list(a.ids), list(a.offsets)) for a in many] == [(b.ids, b.offsets) for b in few]


def test_only_a_word_without_end_is_refused() -> None:
    for good in (
        "a" * 100,
        "ab " * 99,
        "a1" * 99,
        "字。" * 99,
        "\n" * 300 + "a",
        "!!! ???" * 50,
        "x" * 90 + "." + "y" * 90,
    ):
        refuse_long_word(good)
    for bad in ("a" * 101, "ok. " * 50 + "!" * 101, "<|im_start|>" * 20):
        with pytest.raises(RowError, match="are one word"):
            refuse_long_word(bad)
