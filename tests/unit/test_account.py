import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwlit.data.chat import ChatEncoder
from tests.real_tokenizer import small_tokenizer
from tests.stores import VOCAB, build, messages, tokens, write

GOOD_ROWS = [
    messages("Yes."),
    tokens(3),
    messages("<think>\nhm\n</think>\n\n好。"),
    {"input_ids": [1, 2], "labels": [1, 2]},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=5,
)


@st.composite
def mutated_row(draw: st.DrawFn) -> bytes:
    """A good row with one place replaced by any JSON value, or its bytes cut, overwritten or left alone."""
    row = json.loads(json.dumps(draw(st.sampled_from(GOOD_ROWS))))
    place: Any = row
    for _ in range(draw(st.integers(0, 4))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        if draw(st.booleans()):
            place[key] = draw(JSON)
            break
        place = place[key]
    raw = bytearray(json.dumps(row).encode())
    match draw(st.sampled_from(["keep", "cut", "overwrite"])):
        case "cut":
            del raw[draw(st.integers(1, len(raw))) :]
        case "overwrite":
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255).filter(lambda byte: byte != 10))
    return bytes(raw)


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(small_tokenizer("qwen3"))


@settings(max_examples=150, deadline=None)
@given(st.lists(mutated_row(), min_size=1, max_size=12))
def test_the_account_stays_exact_under_any_mutation(
    tmp_path_factory: Any, encoder: ChatEncoder, rows: list[bytes]
) -> None:
    path = write(tmp_path_factory.mktemp("fuzz") / "rows.jsonl", [json.dumps(tokens(9)).encode(), *rows])
    num_rows = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    store = build(path, encoder, max_bad_ratio=1.0, max_seq_len=40)
    account = store.account
    assert account.read == num_rows == account.accepted + account.too_long + account.quarantined
    assert len(store) == account.accepted >= 1
    assert len(store.quarantine) == account.quarantined
    assert all(row["reason"] for row in store.quarantine)
    for index in range(len(store)):
        input_ids, mask = store.sample(index)
        assert 2 <= len(input_ids) <= 40
        assert 0 <= input_ids.min() <= input_ids.max() < VOCAB
        assert mask[0] == 0
        assert mask.sum() == store.num_supervised[index] > 0
