import codecs
import json
from hashlib import sha256
from pathlib import Path

import pytest

from qwlit.core.errors import DataError
from qwlit.data.sources import MAX_ROW_BYTES, Reject, Row, find_files, read_rows

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
LINE = json.dumps(GOOD).encode()


def read(path: Path) -> list[Row | Reject]:
    return list(read_rows(find_files(str(path))))


def written(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


BROKEN_LINES = {
    "truncated": (LINE[:-9], "not valid JSON"),
    "two objects": (LINE + LINE, "not valid JSON: Extra data"),
    "invalid UTF-8": (b'{"messages": "\xff"}', "not valid UTF-8 at byte 15"),
    "UTF-16": (LINE.decode().encode("utf-16-le"), "not valid JSON"),
    "a list": (b"[1, 2]", "must be a JSON object, not a list"),
    "a string": (b'"text"', "not a string"),
    "a number": (b"3.5", "not a number"),
    "null": (b"null", "not null"),
    "NaN": (b'{"x": NaN}', "NaN"),
    "minus infinity": (b'{"x": -Infinity}', "-Infinity"),
    "lone surrogate": (b'{"x": "\\ud800"}', "surrogate"),
    "surrogate in a key": (b'{"\\udfff": 1}', "surrogate"),
    "deep nesting": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not readable as JSON"),
    "endless number": (b'{"x": ' + b"9" * 5000 + b"}", "not readable as JSON"),
    "control characters": (b'{"x": "a\x00b"}', "not valid JSON"),
    "10 MB": (b'{"x": "' + b"y" * 10_000_000 + b'"}', "10,000,010 bytes long"),
    "plain prose": (b"Es war einmal.", "not valid JSON"),
}


@pytest.mark.parametrize("kind", BROKEN_LINES)
def test_a_broken_line_is_one_reject_and_its_neighbours_are_read(kind: str, tmp_path: Path) -> None:
    broken, reason = BROKEN_LINES[kind]
    before, reject, after = read(written(tmp_path, LINE + b"\n" + broken + b"\n" + LINE))
    assert isinstance(before, Row)
    assert isinstance(reject, Reject)
    assert isinstance(after, Row)
    assert (before.value, after.value, after.line) == (GOOD, GOOD, 3)
    assert reason in reject.reason
    assert reject.line == 2
    assert len(reject.reason) < 200


def test_the_hash_of_a_reject_is_of_its_raw_line(tmp_path: Path) -> None:
    for broken in (b"{\n", b"x" * (2 * MAX_ROW_BYTES + 5) + b"\n"):
        reject, row = read(written(tmp_path, broken + LINE))
        assert isinstance(reject, Reject)
        assert reject.sha256 == sha256(broken).hexdigest()
        assert isinstance(row, Row)


def test_empty_lines_are_no_rows_and_do_not_move_line_numbers(tmp_path: Path) -> None:
    rows = read(written(tmp_path, b"\n  \n" + LINE + b"\r\n\n" + LINE + b"\n\n"))
    assert [row.line for row in rows] == [3, 5]
    assert all(isinstance(row, Row) for row in rows)


def test_byte_order_marks_are_ignored_even_where_files_were_joined(tmp_path: Path) -> None:
    content = codecs.BOM_UTF8 + LINE + b"\n" + codecs.BOM_UTF8 + LINE
    assert [row.value for row in read(written(tmp_path, content)) if isinstance(row, Row)] == [GOOD, GOOD]
    array = codecs.BOM_UTF8 + b"[" + LINE + b"]"
    assert [row.value for row in read(written(tmp_path, array, "a.json")) if isinstance(row, Row)] == [GOOD]


def test_json_may_be_an_array_or_an_object_per_line(tmp_path: Path) -> None:
    array = written(tmp_path, b" [\n" + LINE + b",\n" + LINE + b"\n]\n", "array.json")
    lines = written(tmp_path, LINE + b"\n" + LINE, "lines.json")
    for path in (array, lines):
        rows = read(path)
        assert [(row.line, row.value) for row in rows if isinstance(row, Row)] == [(1, GOOD), (2, GOOD)]


@pytest.mark.parametrize(
    ("array", "good", "reasons"),
    [
        (b"[%s, %s", 2, ["breaks off"]),
        (b'[%s, %s, {"messages": [', 2, ["breaks off"]),
        (b"[%s %s]", 1, ["breaks off"]),
        (b"[%s, %s] trailing", 2, ["text after"]),
        (b'[%s, NaN, {"x": NaN}, 3, %s]', 2, ["NaN", "NaN", "not a number"]),
        (b'[%s, {"x": "\xff"}, {"x": "\\ud800"}, %s]', 2, ["UTF-8", "surrogate"]),
        (b"[%s, %s,]", 2, []),
    ],
)
def test_a_damaged_array_loses_only_the_damaged_part(
    array: bytes, good: int, reasons: list[str], tmp_path: Path
) -> None:
    rows = read(written(tmp_path, array % (LINE, LINE), "array.json"))
    assert sum(isinstance(row, Row) for row in rows) == good
    rejects = [row.reason for row in rows if isinstance(row, Reject)]
    assert len(rejects) == len(reasons)
    assert all(part in reason for part, reason in zip(reasons, rejects, strict=True))


@pytest.mark.parametrize("content", [b"", b"\n\n \n", codecs.BOM_UTF8])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_without_rows_is_an_error(content: bytes, name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name}' has no rows"):
        read(written(tmp_path, content, name))
    with pytest.raises(DataError, match=r"empty\.json' has no rows"):
        read(written(tmp_path, b"[ ]", "empty.json"))


def test_a_folder_is_its_data_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.txt"):
        written(tmp_path, LINE, name)
    (tmp_path / "d.jsonl").mkdir()
    assert [file.name for file in find_files(str(tmp_path))] == ["a.json", "b.jsonl"]


def test_paths_that_lead_nowhere_are_errors_that_name_them(tmp_path: Path) -> None:
    written(tmp_path, LINE, "train.jsonl")
    written(tmp_path, LINE, "rows.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name, message in {
        "trian.jsonl": r"trian.jsonl' does not exist\. Did you mean 'train.jsonl'\?",
        "no/such/folder": "no/such/folder' does not exist",
        "rows.parquet": r"must end in \.jsonl or \.json",
        "folder": r"holds no \.jsonl or \.json file",
        "loop.jsonl": "loop.jsonl'",
    }.items():
        with pytest.raises(DataError, match=message):
            find_files(str(tmp_path / name))


def test_a_file_that_vanished_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows([tmp_path / "vanished.jsonl"]))
