"""Limits on what is read of a file. tests/faults/test_bombs.py measures what they are for."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwlit.core.errors import DataError
from qwlit.data.readers import RowReader
from qwlit.data.rows import MAX_OBJECTS, MAX_ROW_BYTES, QuarantinedRow, Row, RowError, parse_json
from qwlit.data.sources import find_sources
from tests.stores import build

GOOD = b'{"input_ids": [1, 2], "loss_mask": [0, 1]}\n'


def read(path: Path) -> list[Row | QuarantinedRow]:
    return list(RowReader(find_sources(str(path))))


def texts(*values: str, places: list[int]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), pa.array(values))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.txt.gz", "a.json.gz"])
def test_a_gzip_file_may_expand_to_its_limit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    content = b'[{"text": "a"},' + b" " * 99_000 + b"\n1]" if ".json." in name else b"text,b\n" + b"a,b\n" * 25_000
    path.write_bytes(gzip.compress(content))
    monkeypatch.setattr("qwlit.data.gzip_file.MOST_EXPANSION", 10)
    assert read(path)
    monkeypatch.setattr("qwlit.data.gzip_file.FREE_BYTES", len(content) - 1)
    with pytest.raises(DataError, match=rf"{name}' expands to more than .* unpack it with gunzip"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_blank_lines_without_end_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lines", "json_files", "csv_files"):
        monkeypatch.setattr(f"qwlit.data.{module}.MAX_BLANK_LINES", 50)
    path = tmp_path / name
    start = b"a,b\n" if name == "a.csv" else b""
    path.write_bytes(start + b"\n" * 49 + b"1,2\n" + b"\n" * 49 + b"3,4\n")
    assert [row.line for row in read(path)] == [len(start) // 4 + 50, len(start) // 4 + 100]
    path.write_bytes(start + b"1,2\n" + b"\n" * 60 + b"3,4\n")
    with pytest.raises(DataError, match=r"blank lines from line [23]"):
        read(path)


def test_a_csv_file_of_unclosed_quotes_is_refused_and_not_parsed_for_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n" + b'b","\n' * 300)
    assert len(read(path)) == 300
    monkeypatch.setattr("qwlit.data.csv_files.MAX_BYTES_AGAIN", 5 * 299 * 10)
    with pytest.raises(DataError, match=r"to line 1\d have a quote that is never closed"):
        read(path)


def test_a_file_in_which_nothing_is_good_stops_with_its_first_reasons(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = b'{"x": 1}\n{\n' + b"[]\n" * 3000
    path.write_bytes(GOOD * 4 + bad)
    store = build(path, None, cache_root=tmp_path / "cache")
    assert (store.row_counts.accepted, store.row_counts.quarantined) == (4, 3002)
    for good in (0, 1):
        path.write_bytes(GOOD * good + bad)
        with pytest.raises(
            DataError, match=rf"rows cannot be used \(row {good + 1}: unknown format.*; row {good + 2}: "
        ):
            build(path, None, cache_root=tmp_path / "cache")


def test_each_file_is_judged_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 3000)
    (tmp_path / "b.jsonl").write_bytes(b"{}\n" * 1001)
    with pytest.raises(DataError, match=r"b\.jsonl': 1,00\d of its first 1,00\d rows"):
        build(tmp_path, None, cache_root=tmp_path / "cache")


def test_rows_of_a_dictionary_lose_nothing_however_far_they_expand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwlit.data.table_process.FREE_BYTES", 2**30)
    long, longer = "x" * (3 * 2**20), "y" * (MAX_ROW_BYTES + 1)
    table = pa.table({"text": texts(long, longer, "z", places=[0, 0, 0, 1, 2, 0, 1] * 6)})
    for name, options in (("a", {"store_schema": False}), ("b", {}), ("c", {"row_group_size": 9})):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, compression="zstd", **options)
        rows = read(path)
        assert [row.line for row in rows] == list(range(1, 43))
        for row, text in zip(rows, table["text"].to_pylist(), strict=True):
            assert isinstance(row, QuarantinedRow) if text == longer else row.content == {"text": text}


def test_every_kind_of_column_has_the_rows_that_pyarrow_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    messages = [[{"role": "user", "content": "a" * int(n)}] * int(n % 3) for n in rng.integers(0, 50, 3000)]
    table = pa.table(
        {
            "messages": messages,
            "tools": [[("k", [n, None]), ("l", [])] if n % 2 else None for n in range(3000)],
            "system": pa.array([f"{n % 7}" for n in range(3000)]).dictionary_encode(),
            "input_ids": pa.array([[n, n] for n in range(3000)], pa.list_(pa.int32(), 2)),
            "label": [None if n % 3 else {"x": {"y": [True]}} for n in range(3000)],
            "text": pa.array([b"\x00\xff" * (n % 5) for n in range(3000)], pa.binary()),
        },
        schema=pa.schema(
            {
                "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.large_string()})),
                "tools": pa.map_(pa.string(), pa.list_(pa.int32())),
                "system": pa.dictionary(pa.int32(), pa.string()),
                "input_ids": pa.list_(pa.int32(), 2),
                "label": pa.struct({"x": pa.struct({"y": pa.list_(pa.bool_())})}),
                "text": pa.binary(),
            }
        ),
    )
    for number, options in enumerate(({}, {"row_group_size": 7, "compression": "gzip"}, {"data_page_version": "2.0"})):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(table, path, **options)
        assert [row.content for row in read(path)] == pq.read_table(path).to_pylist()


def test_a_row_may_have_so_many_objects() -> None:
    assert parse_json(json.dumps(["{[" * MAX_OBJECTS]))
    assert len(parse_json("[" + "{}," * (MAX_OBJECTS - 2) + "{}]")) == MAX_OBJECTS - 1
    with pytest.raises(RowError, match="has 100,001 objects and lists; a row may have 100,000"):
        parse_json("[" + "{}," * (MAX_OBJECTS - 1) + "{}]")
