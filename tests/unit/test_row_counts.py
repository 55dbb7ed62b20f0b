import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwlit.data.tokenizer import TextTokenizer
from tests.real_tokenizer import small_tokenizer
from tests.stores import VOCAB, build, messages, num_supervised, tokens, write

CALL = {"name": "add", "arguments": '{"a": 1}'}
GOOD_ROWS: list[Any] = [
    messages("Yes."),
    messages("<think>\nhm\n</think>\n\n好。"),
    {"messages": [*messages("x")["messages"], {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    tokens(3),
    {"input_ids": [1, 2], "labels": [1, 2]},
    {"input_ids": "[1, 2, 3]", "loss_mask": "[0, 1, 1]"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}], "system": "Be brief."},
    {"instruction": "Hi", "input": "", "output": "Yes.", "history": [["One?", "Eins."]]},
    {"prompt": "Hi", "completion": [{"role": "assistant", "content": "Yes."}]},
    {"text": "It was the best of times, it was the worst of times; so much like the present period. " * 2},
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
def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer("qwen3"))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(mutated_row(), min_size=1, max_size=12),
    too_long=st.sampled_from(["auto", "drop", "truncate", "split"]),
    loss_on=st.sampled_from(["assistant", "last_assistant", "all"]),
    thinking=st.sampled_from(["mask_empty", "keep", "drop"]),
)
def test_the_account_stays_exact_under_any_mutation(
    tmp_path_factory: Any, tokenizer: TextTokenizer, rows: list[bytes], too_long: str, loss_on: str, thinking: str
) -> None:
    path = write(tmp_path_factory.mktemp("fuzz") / "rows.jsonl", [json.dumps(tokens(9)).encode(), *rows])
    num_rows = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    store = build(path, tokenizer, max_seq_len=40, too_long=too_long, loss_on=loss_on, thinking=thinking)
    row_counts = store.row_counts
    assert row_counts.read == num_rows == row_counts.accepted + row_counts.too_long + row_counts.quarantined
    assert row_counts.truncated + row_counts.split <= row_counts.accepted <= len(store)
    assert len({store.origin(index) for index in range(len(store))}) == row_counts.accepted >= 1
    assert len(store) == row_counts.accepted or row_counts.split
    if too_long in ("truncate", "split"):
        assert row_counts.too_long == 0
    quarantine = list(store.quarantine())
    assert len(quarantine) == row_counts.quarantined
    assert all(row["reason"] for row in quarantine)
    distinct = set()
    for index, supervised in enumerate(num_supervised(store)):
        input_ids, mask = store.read([index])
        assert 2 <= len(input_ids) == len(mask) <= 40
        assert 0 <= input_ids.min() <= input_ids.max() < VOCAB
        assert mask[0] == 0
        assert mask.sum() == supervised > 0
        distinct.add((input_ids.tobytes(), mask.tobytes()))
    assert row_counts.duplicates == len(store) - len(distinct)
    assert len(np.unique(store.digests(np.arange(len(store))))) == len(distinct)
