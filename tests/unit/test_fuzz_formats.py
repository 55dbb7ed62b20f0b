"""Random damage to good rows and files of every format: row counts stay exact, every sample can be trained on."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwlit.core.errors import DataError
from qwlit.data.store import SampleStore, build_store
from qwlit.data.tokenizer import TextTokenizer
from tests.broken import TAGS
from tests.formats import (
    FIXTURES,
    FORMATS,
    csv_bytes,
    parquet_bytes,
    talks,
    tokenized,
    with_tools,
)
from tests.real_tokenizer import small_tokenizer
from tests.stores import VOCAB, row_encoder

Row = dict[str, Any]
LIMIT = 150
GOOD = {"text": "Once upon a time."}
GOOD_ROWS: list[Row] = [
    *(make(talk) for make in FORMATS.values() for turns in (1, 2) for talk in talks(2, turns=turns)),
    with_tools(1),
    tokenized(3),
    {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]},
    {"text": "从前有座山，山上有座庙。"},
]
KEYS = ["role", "content", "from", "value", "name", "arguments", "text", "messages", "tool_calls", "labels", "x"]
KEYS += ["weight", "train", "label", "chosen", "images", "functions", "tools", "type", "system"]
ODD_TEXTS = [*TAGS, "<image>", "false", "\ud800", "user", "assistant", "gpt", "function_call", "[]", "{}", '["a"]']
TEXTS = st.text(st.characters(), max_size=6) | st.sampled_from(ODD_TEXTS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list inside the value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@st.composite
def mutated_row(draw: st.DrawFn) -> Row:
    """A good row with some places replaced, left out or wrapped, and perhaps a column of it as JSON text."""
    row = json.loads(json.dumps(draw(st.sampled_from(GOOD_ROWS))))
    for _ in range(draw(st.integers(1, 3))):
        if row:
            mutate(draw, *draw(st.sampled_from(list(places(row)))))
    if row and draw(st.booleans()):
        key = draw(st.sampled_from(list(row)))
        row[key] = json.dumps(row[key])
    return row


def mutate(draw: st.DrawFn, place: Any, key: Any) -> None:
    is_text = isinstance(place[key], str)
    match draw(st.sampled_from(["append"] * 8 * is_text + ["put beside", "replace", "leave out", "wrap", "as text"])):
        case "append":
            place[key] += draw(TEXTS)
        case "put beside" if isinstance(place, dict):
            place[draw(st.sampled_from(KEYS))] = draw(JSON)
        case "put beside" | "replace":
            place[key] = draw(JSON)
        case "leave out":
            del place[key]
        case "wrap":
            place[key] = [place[key], place[key]]
        case "as text":
            place[key] = json.dumps(place[key])


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few stretches cut out, overwritten or put in."""
    raw = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(raw)))
        length = draw(st.integers(0, 3) | st.integers(0, len(raw)))
        odd = st.sampled_from([b'"', b"\n", b"\r", b",", b"\x00", b"\xff", b"[", b"}", b'""', b"\\ud800"])
        raw[start : start + length] = draw(odd | st.binary(max_size=length + 3))
    return bytes(raw)


@st.composite
def mutated_line(draw: st.DrawFn) -> bytes:
    return draw(mutated_bytes(json.dumps(draw(mutated_row())).encode()))


SETTINGS = st.fixed_dictionaries(
    {
        "too_long": st.sampled_from(["auto", "drop", "truncate", "split"]),
        "loss_on": st.sampled_from(["assistant", "last_assistant", "all"]),
        "thinking": st.sampled_from(["keep", "drop", "mask_empty"]),
    }
)


@pytest.fixture(scope="module", autouse=True)
def unhurried() -> Iterator[None]:
    """Nothing here need survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer("qwen3", extra=["<think>", "</think>", "<tool_call>", "</tool_call>"]))


def assert_exact(store: SampleStore) -> None:
    """Each row read is accounted for, and each sample stored can be trained on."""
    row_counts = store.row_counts
    assert row_counts.read == row_counts.accepted + row_counts.too_long + row_counts.quarantined
    reasons = [row["reason"] for row in store.quarantine()]
    assert len(reasons) == row_counts.quarantined
    assert all(reason and len(reason.splitlines()) == 1 for reason in reasons)
    origins = {store.origin(index) for index in range(len(store))}
    assert len(origins) == row_counts.accepted <= len(store)
    for index in range(len(store)):
        input_ids, mask = store.read([index])
        assert 2 <= len(input_ids) == len(mask) <= LIMIT
        assert 0 <= input_ids.min() <= input_ids.max() < VOCAB
        assert mask[0] == 0 and mask.max() == 1 and mask.sum() > 0


def check(name: str, content: bytes, tokenizer: TextTokenizer, config: Row, num_rows: int | None = None) -> None:
    """Store the file's rows; where their number is known, every one must be counted."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        encoder = row_encoder(tokenizer, max_seq_len=LIMIT, **config)
        try:
            store = build_store(str(path), encoder, cache_root=Path(folder) / "cache")
        except DataError as error:
            assert num_rows is None, str(error)
            assert name in str(error) and len(str(error).splitlines()) == 1
            return
        assert_exact(store)
        assert num_rows in (None, store.row_counts.read)


@settings(max_examples=120, deadline=None)
@given(st.lists(mutated_row() | mutated_line(), max_size=12), SETTINGS)
def test_lines_with_any_mutation(tokenizer: TextTokenizer, mutated: list[Row | bytes], config: Row) -> None:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in [GOOD, *mutated, GOOD]]
    content = b"\n".join(lines)
    num_rows = sum(bool(line.strip()) for line in content.split(b"\n"))
    check("rows.jsonl", content, tokenizer, config, num_rows)


@settings(max_examples=80, deadline=None)
@given(st.lists(mutated_row(), max_size=8), SETTINGS)
def test_arrays_with_any_mutated_value(tokenizer: TextTokenizer, mutated: list[Row], config: Row) -> None:
    check("rows.json", json.dumps([GOOD, *mutated, GOOD]).encode(), tokenizer, config, len(mutated) + 2)


@st.composite
def mutated_table(draw: st.DrawFn) -> list[Row]:
    """Rows with the same columns, some of whose cells are anything."""
    base = draw(st.sampled_from([row for row in GOOD_ROWS if len(row) > 1]))
    rows = [json.loads(json.dumps(base)) for _ in range(draw(st.integers(1, 6)))]
    for row in rows[: draw(st.integers(0, len(rows)))]:
        mutate(draw, *draw(st.sampled_from(list(places(row)))))
    # A column left out is a null.
    columns = list(dict.fromkeys(key for row in (base, *rows) for key in row))
    return [{key: row.get(key) for key in columns} for row in rows]


def holds_half_characters(rows: list[Row]) -> bool:
    return any("\ud800" <= letter <= "\udfff" for row in rows for cell in row.values() for letter in str(cell))


@settings(max_examples=80, deadline=None)
@given(mutated_table(), SETTINGS)
def test_tables_of_text_with_any_mutated_cell(tokenizer: TextTokenizer, rows: list[Row], config: Row) -> None:
    # A cell that is not UTF-8 breaks off at its line, and its other lines are rows of their own.
    num_rows = None if holds_half_characters(rows) else len(rows)
    check("rows.csv", csv_bytes(rows), tokenizer, config, num_rows)


def is_typed(cells: list[Any]) -> bool:
    try:
        parquet_bytes([{"x": cell} for cell in cells])
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        return False
    return True


def typed_table(rows: list[Row]) -> bytes:
    """A Parquet table; what is not of one type with the cells above it becomes null."""
    for key in rows[0]:
        cells: list[Any] = []
        for row in rows:
            cells.append(row[key] if is_typed([*cells, row[key]]) else None)
        for row, cell in zip(rows, cells, strict=True):
            row[key] = cell
    return parquet_bytes(rows)


@settings(max_examples=80, deadline=None)
@given(mutated_table(), SETTINGS)
def test_typed_tables_with_any_mutated_cell(tokenizer: TextTokenizer, rows: list[Row], config: Row) -> None:
    check("rows.parquet", typed_table(rows), tokenizer, config, len(rows))


@pytest.mark.parametrize("name", [name for name in FIXTURES if not name.endswith(".parquet")])
def test_files_with_any_mutated_bytes(name: str, tokenizer: TextTokenizer) -> None:
    @settings(max_examples=40, deadline=None)
    @given(mutated_bytes(FIXTURES[name].content[:4000]), SETTINGS)
    def damaged(content: bytes, config: Row) -> None:
        check(name, content, tokenizer, config)

    damaged()
