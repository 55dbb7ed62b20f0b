"""`data.max_samples`: a store of the first samples is the store of the file cut by hand."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwlit.core.errors import DataError
from qwlit.data import store_writer
from qwlit.data.encoded_batch import RowCounts
from qwlit.data.store import SampleStore
from qwlit.data.tokenizer import TextTokenizer
from tests.real_tokenizer import small_tokenizer
from tests.stores import build, first_tokens, lengths, messages, tokens, write
from tests.unit.test_splits import load

LONG = {"text": "It was the best of times. " * 9}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer("qwen3"))


def content(store: SampleStore) -> Any:
    samples = [[array.tolist() for array in store.read([index])] for index in range(len(store))]
    origins = [store.origin(index).rpartition(":")[2] for index in range(len(store))]
    quarantine = [row["line"] for row in store.quarantine()]
    return samples, origins, quarantine, store.row_counts, store.remarks


def read_all_first(function: Callable[[Any], Any], items: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """Give the results as workers that read far ahead do."""
    yield from list(map(function, list(items)))


ROWS = [messages("One."), b"{", messages("a </think> b"), tokens(1, 80), tokens(2), messages("One."), tokens(3), b"[]"]
ROWS += [messages(f"{number} times") for number in range(4)]


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("batch_rows", [2000, 3])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("number", range(1, 11))
def test_the_first_samples_are_those_of_the_file_cut_by_hand(
    number: int,
    ahead: bool,
    batch_rows: int,
    drop: bool,
    tmp_path: Path,
    tokenizer: TextTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_writer, "BATCH_ROWS", batch_rows)
    if ahead:
        monkeypatch.setattr(store_writer, "map_in_order", read_all_first)
    path = write(tmp_path / "rows.jsonl", ROWS)
    options: dict[str, Any] = {"max_seq_len": 64, "too_long": "drop", "drop_duplicates": drop}
    store = build(path, tokenizer, max_samples=number, **options)
    # Lines (from 1) of the rows that are samples; line 6 is a copy of line 1.
    sampled = [line for line in (1, 3, 5, 6, 7, 9, 10, 11, 12) if not (drop and line == 6)]
    end = sampled[number - 1] if number <= len(sampled) else len(ROWS)
    expected = build(write(tmp_path / "cut" / "rows.jsonl", ROWS[:end]), tokenizer, **options)
    assert content(store) == content(expected)
    assert len(store) == min(number, len(sampled))
    assert store.stopped_early == (end < len(ROWS))


def test_of_a_long_text_only_the_first_pieces_are_kept(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(1), LONG, tokens(2)])
    whole = build(path, tokenizer, max_seq_len=20)
    store = build(path, tokenizer, max_seq_len=20, max_samples=3)
    assert content(store)[:2] == tuple(part[:3] for part in content(whole)[:2])
    assert store.row_counts == RowCounts(read=2, accepted=2, split=1)


def test_reading_stops_before_what_is_broken_behind_the_last_sample(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "a.jsonl", [tokens(number) for number in range(5)])
    (tmp_path / "rows" / "b.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="has no rows"):
        build(tmp_path / "rows", cache_root=tmp_path / "cache")
    store = build(tmp_path / "rows", cache_root=tmp_path / "cache", max_samples=5)
    assert first_tokens(store) == [0, 1, 2, 3, 4] and store.stopped_early


@pytest.mark.parametrize("number", [4, 5])
def test_a_file_with_just_as_many_samples_is_read_whole(number: int, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(i) for i in range(5)])
    remarks = load(tmp_path, path=str(path), max_samples=number).remarks
    assert remarks == [f"{path}: only the first 4 rows are read, for data.max_samples=4"] * (number == 4)


def test_real_workers_stop_where_one_process_does(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", [messages(f"{number} times") for number in range(90)])
    alone = build(path, tokenizer, cache_root=tmp_path / "alone", max_samples=25)
    for name, value in {"BYTES_WORTH_WORKERS": 0, "BATCH_ROWS": 10, "num_cores": lambda: 2}.items():
        monkeypatch.setattr(store_writer, name, value)
    assert content(build(path, tokenizer, cache_root=tmp_path / "two", max_samples=25)) == content(alone)


def test_each_part_is_limited_and_the_data_say_how_many_rows_are_read(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [tokens(0), b"{", *(tokens(number) for number in range(1, 9))])
    b = write(tmp_path / "b.jsonl", [tokens(number) for number in range(10, 12)])
    val = write(tmp_path / "val.jsonl", [tokens(number) for number in range(20, 29)])
    data = load(tmp_path, path=[str(a), str(b)], val_path=str(val), max_samples=3)
    assert first_tokens(data.train) == [0, 1, 2, 10, 11]
    assert data.validation is not None and lengths(data.validation) == [6] * 3
    assert data.totals["read"] == 4 + 2 + 3
    assert data.remarks == [
        f"{a}: only the first 4 rows are read, for data.max_samples=3",
        f"{val}: only the first 3 rows are read, for data.max_samples=3",
    ]
    assert data.fingerprint != load(tmp_path, path=[str(a), str(b)], val_path=str(val), max_samples=4).fingerprint
