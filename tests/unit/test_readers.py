import codecs
import csv
import gzip
import io
import json
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qwlit.core.errors import DataError
from qwlit.data.csv_files import MAX_CSV_ROW_BYTES
from qwlit.data.readers import RowReader
from qwlit.data.rows import MAX_ROW_BYTES, Document, QuarantinedRow, Row, RowError
from qwlit.data.sources import File, find_sources
from qwlit.data.text_files import TEXT_BLOCK_BYTES
from qwlit.data.tokenizer import TextTokenizer
from tests.conversations import FRAGMENTS
from tests.real_tokenizer import small_tokenizer

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, 二"}]}
LINE = json.dumps(GOOD, ensure_ascii=False).encode()


def written(folder: Path, content: bytes, name: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    return path


def read(path: Path | str) -> list[Row | QuarantinedRow]:
    return list(RowReader(find_sources(str(path))))


def seen(row: Row | QuarantinedRow) -> Any:
    """What a row turns out to be, or the reason why it cannot be used."""
    if isinstance(row, QuarantinedRow):
        return row.reason
    try:
        return row.value()
    except RowError as error:
        return str(error)


def values(folder: Path, content: bytes, name: str) -> list[tuple[int, Any]]:
    return [(row.line, seen(row)) for row in read(written(folder, content, name))]


BROKEN_LINES = {
    "truncated": (LINE[:-9], "not valid JSON"),
    "two objects": (LINE + LINE, "not valid JSON: Extra data"),
    "invalid UTF-8": (b'{"messages": "\xff"}', "not valid UTF-8 at byte 15"),
    "UTF-16": (LINE.decode().encode("utf-16-le"), "not valid"),
    "a list": (b"[1, 2]", "must be a JSON object, not a list"),
    "a key twice": (b'{"x": 1, "x": 2}', "appears twice"),
    "an endless number": (b'{"x": 1e999}', "too large"),
    "deep nesting": (b'{"x": ' + b"[" * 99_000 + b"]" * 99_000 + b"}", "not readable as JSON"),
    "too long": (b'{"x": "' + b"y" * MAX_ROW_BYTES + b'"}', f"{MAX_ROW_BYTES + 10:,} bytes long"),
    "plain prose": (b"Es war einmal.", "not valid JSON"),
}


@pytest.mark.parametrize("kind", BROKEN_LINES)
def test_a_broken_line_is_one_bad_row_and_its_neighbours_are_read(kind: str, tmp_path: Path) -> None:
    broken, reason = BROKEN_LINES[kind]
    rows = read(written(tmp_path, LINE + b"\n" + broken + b"\n" + LINE, "rows.jsonl"))
    assert [row.line for row in rows] == [1, 2, 3]
    assert (seen(rows[0]), seen(rows[2])) == (GOOD, GOOD)
    assert reason in seen(rows[1])
    assert len(seen(rows[1])) < 200


def test_the_hash_of_a_bad_line_is_of_its_raw_bytes(tmp_path: Path) -> None:
    for broken in (b"{\n", b"x" * (2 * MAX_ROW_BYTES + 5) + b"\n"):
        bad, good = read(written(tmp_path, broken + LINE, "rows.jsonl"))
        assert (bad if isinstance(bad, QuarantinedRow) else bad.quarantined("")).sha256 == sha256(broken).hexdigest()
        assert seen(good) == GOOD


def test_a_line_of_the_most_bytes_is_a_row_and_one_more_is_not(tmp_path: Path) -> None:
    line = b'{"x": "' + b"y" * (MAX_ROW_BYTES - 9) + b'"}'
    for more, kind in ((b"", Row), (b" ", QuarantinedRow)):
        (row,) = read(written(tmp_path, line + more, "rows.jsonl"))
        assert type(row) is kind


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
def test_empty_lines_are_no_rows_and_do_not_move_line_numbers(name: str, tmp_path: Path) -> None:
    content = b"\n  \n" + LINE + b"\r\n\n" + LINE + b"\n\n"
    assert values(tmp_path, content, name) == [(3, GOOD), (5, GOOD)]


def test_byte_order_marks_are_ignored_even_where_files_were_joined(tmp_path: Path) -> None:
    content = codecs.BOM_UTF8 + LINE + b"\n" + codecs.BOM_UTF8 + LINE
    assert values(tmp_path, content, "rows.jsonl") == [(1, GOOD), (2, GOOD)]
    assert values(tmp_path, codecs.BOM_UTF8 + b"[" + LINE + b"]", "rows.json") == [(1, GOOD)]
    assert values(tmp_path, codecs.BOM_UTF8 + b"text\n" + LINE.replace(b"\n", b" "), "rows.csv")[0][0] == 2
    assert values(tmp_path, codecs.BOM_UTF8 + b"Es war", "rows.txt") == [(1, Document("Es war"))]


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
def test_json_is_an_array_an_object_a_line_or_one_object_over_many_lines(name: str, tmp_path: Path) -> None:
    two = [(1, GOOD), (2, GOOD)]
    assert values(tmp_path, b" [\n" + LINE + b",\n" + LINE + b"\n]\n", name) == two
    assert values(tmp_path, json.dumps([GOOD, GOOD], indent=2).encode(), name) == two
    assert values(tmp_path, LINE + b"\n" + LINE, name) == two
    assert values(tmp_path, LINE, name) == [(1, GOOD)]
    for indent in (0, 2, "\t"):
        assert values(tmp_path, b"\n" + json.dumps(GOOD, indent=indent).encode(), name) == [(1, GOOD)]
    opened = LINE.replace(b"[{", b"[{\n", 1)
    assert values(tmp_path, opened, name) == [(1, GOOD)]


def test_a_broken_first_line_does_not_make_one_object_of_all_lines(tmp_path: Path) -> None:
    for broken in (LINE + LINE, b'{"x": tru}', b'{"messages": "abc', b'{"x": NaN}'):
        rows = values(tmp_path, broken + b"\n" + LINE + b"\n" + LINE, "rows.json")
        assert rows[1:] == [(2, GOOD), (3, GOOD)]


def test_a_first_line_longer_than_the_look_ahead_is_a_line(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 70_000}]}
    content = json.dumps(long).encode() + b"\n" + LINE
    assert values(tmp_path, content, "rows.json") == [(1, long), (2, GOOD)]


@pytest.mark.parametrize("digits", range(1, 4))
def test_a_first_line_of_numbers_longer_than_the_look_ahead_is_a_line(digits: int, tmp_path: Path) -> None:
    long = json.dumps({"input_ids": [10**digits] * (70_000 // (digits + 3))}).encode()
    rows = values(tmp_path, long + b"\n" + LINE, "rows.json")
    assert [line for line, _ in rows] == [1, 2]
    assert rows[1][1] == GOOD


def test_an_object_over_many_lines_may_be_as_large_as_a_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one JSON object of over 8,388,608 bytes; write one object per line"):
        read(written(tmp_path, b'{\n"x": "' + b"y" * MAX_ROW_BYTES + b'"}', "rows.json"))


@pytest.mark.parametrize(
    ("array", "good", "reasons"),
    [
        (b"[%s, %s", 2, ["is not valid from here on"]),
        (b'[%s, %s, {"messages": [', 2, ["is not valid from here on"]),
        (b"[%s %s]", 1, ["is not valid from here on"]),
        (b"[%s, %s] trailing", 2, ["text after"]),
        (b'[%s, NaN, {"x": NaN}, 3, %s]', 2, ["NaN", "NaN", "not a number"]),
        (b'[%s, {"x": "\xff"}, {"x": "\\ud800"}, %s]', 2, ["UTF-8", "surrogate"]),
        (b'[%s, {"x": 1, "x": 2}, {"x": 1e999}, %s]', 2, ["twice", "too large"]),
        (b'[%s, {"x": "' + b"y" * MAX_ROW_BYTES + b'"}, %s]', 2, ["bytes long"]),
        (b"[%s, %s,]", 2, []),
    ],
)
def test_a_damaged_array_loses_only_the_damaged_part(
    array: bytes, good: int, reasons: list[str], tmp_path: Path
) -> None:
    rows = [value for _, value in values(tmp_path, array.replace(b"%s", LINE), "array.json")]
    assert rows.count(GOOD) == good
    bad = [value for value in rows if value != GOOD]
    assert len(bad) == len(reasons)
    assert all(part in reason for part, reason in zip(reasons, bad, strict=True))


def test_csv_gives_texts_by_the_names_of_the_first_row(tmp_path: Path) -> None:
    content = b'instruction , output\r\nOne?,Eins\r\n\r\n"a, ""b""",\r\n'
    expected = [(2, {"instruction": "One?", "output": "Eins"}), (4, {"instruction": 'a, "b"', "output": ""})]
    assert values(tmp_path, content, "rows.csv") == values(tmp_path, content, "rows.csv.gz") == expected


def test_quoted_cells_may_hold_line_breaks_and_anything_else(tmp_path: Path) -> None:
    rows = [[text, json.dumps(GOOD)] for text in (*FRAGMENTS, "\n\n\na\n", '"', '""', "x" * 300_000, "\x00")]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["text", "row"], *rows])
    found = values(tmp_path, text.getvalue().encode(), "rows.csv")
    assert [value for _, value in found] == [{"text": a, "row": b} for a, b in rows]
    starts = [2]
    for a, _ in rows:
        starts.append(starts[-1] + 1 + a.count("\n"))
    assert [line for line, _ in found] == starts[:-1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'1,"x', "not valid CSV"),
        (b'1,"x" y', "not valid CSV: ',' expected after"),
        (b'1,""x""', "not valid CSV: ',' expected after"),
        (b"1,\xff", "not valid UTF-8 at byte 3"),
        (b"1", "1 cells, but the first row names 2 columns"),
        (b"1,2,3", "3 cells, but the first row names 2 columns"),
        (b"1,2\r3,4", "not valid CSV: new-line character"),
        (b"1," + b"y" * MAX_ROW_BYTES, "bytes long"),
    ],
)
@pytest.mark.parametrize("following", [b"5,6\n7,8\n", b'5,"6"\n7,8\n', b'5,"6\n6"\n7,"8"', b'"5",6\n"7",8\n'])
def test_a_broken_row_loses_one_line_and_no_other(line: bytes, reason: str, following: bytes, tmp_path: Path) -> None:
    alone = [(number + 2, row) for number, row in values(tmp_path, b"a,b\n" + following, "rows.csv")]
    first, second, *others = values(tmp_path, b"a,b\n3,4\n" + line + b"\n" + following, "rows.csv")
    assert first == (2, {"a": "3", "b": "4"})
    assert second[0] == 3
    assert reason in second[1]
    assert others == alone


def test_a_quote_that_is_never_closed_loses_one_line_of_a_large_file(tmp_path: Path) -> None:
    many = b"".join(b"%d,%s\n" % (number, b"z" * 1000) for number in range(MAX_CSV_ROW_BYTES // 500))
    rows = values(tmp_path, b'a,b\n1,"x\n' + many, "rows.csv")
    assert len(rows) == 1 + many.count(b"\n")
    assert [line for line, value in rows if isinstance(value, str)] == [2]


def test_quotes_inside_a_cell_are_letters(tmp_path: Path) -> None:
    content = b'a,b\n1,x "y" z\n2, "q"\n3,it\'s\n'
    assert [row["b"] for _, row in values(tmp_path, content, "rows.csv")] == ['x "y" z', ' "q"', "it's"]


def test_the_hash_of_a_broken_row_is_of_its_raw_line(tmp_path: Path) -> None:
    (bad,) = read(written(tmp_path, b'a,b\n1,"x\n', "rows.csv"))
    assert isinstance(bad, QuarantinedRow)
    assert bad.sha256 == sha256(b'1,"x\n').hexdigest()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"a,a", "the first row must name the columns, each once, but it is b'a,a"),
        (b'a,"b', "the first row must name the columns, but it is not valid CSV: .*; save it in UTF-8"),
        (b"a,b\r1,2", "the first row must name the columns, but it is not valid CSV: .*; save it in UTF-8"),
        (
            "问题,答案".encode("gbk"),
            "the first row must name the columns, but it is not valid UTF-8 at byte 1; save it in UTF-8",
        ),
        (b"question;answer", "its columns are separated by ';'; save it with commas"),
        (b"question\tanswer", r"its columns are separated by '\\t'; save it with commas"),
    ],
)
def test_a_first_row_that_names_no_columns_is_an_error(header: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"rows\.csv': {message}"):
        read(written(tmp_path, header + b"\n1,2\n", "rows.csv"))


ENGLISH = "It was the best of times, it was the worst of times; don't ask!  (1859)\n\n  And so on...\n\tYes.\n"
CHINESE = (
    "\u3000\u3000话说天下大势，分久必合，合久必分。\n\u3000\u3000周末七国分争，并入于秦。“是么？”\n\n"
    "\u3000后汉朝统一天下……\n"
)
SPACES = [*"\n\n \r\t\v\f\x85\xa0\u1680\u2003\u2028\u3000", "\n\n", "\r\n", "  "]
ODD = [*"a1!'é’（二😀\u200b\u0301\u0e33\ufeff\x1c", "e\u0301", "'s", "𓀀", "각", "\u1112\u1161\u11ab", "<|im_end|>"]


def texts_of_blocks(path: Path, text: str) -> list[str]:
    path.write_bytes(text.encode())
    rows = read(path)
    documents = [row.value() for row in rows if isinstance(row, Row)]
    texts = [document.text for document in documents if isinstance(document, Document)]
    assert "".join(texts) == text
    ends = [(number == 0, number == len(rows) - 1) for number in range(len(rows))]
    assert [(document.is_first, document.is_last) for document in documents] == ends
    assert [row.line for row in rows] == [1 + "".join(texts[:number]).count("\n") for number in range(len(rows))]
    return texts


@pytest.mark.parametrize("line_breaks", ["lines", "no lines"])
@pytest.mark.parametrize("language", ["English", "Chinese"])
def test_blocks_of_a_long_text_have_exactly_the_tokens_of_the_whole(
    language: str, line_breaks: str, tmp_path: Path
) -> None:
    unit = ENGLISH if language == "English" else CHINESE
    if line_breaks == "no lines":
        unit = unit.replace("\n", " " if language == "English" else "")
    numbers = range(int(1.2 * TEXT_BLOCK_BYTES) // len(unit.encode()))
    text = "".join(f"{unit[:9]}{number}{unit[9:]}" for number in numbers)
    texts = texts_of_blocks(tmp_path / "book.txt", text)
    assert len(texts) == (2 if line_breaks == "lines" else 1)
    whole, *blocks = TextTokenizer(small_tokenizer("qwen3", as_qwen=True)).encode([text, *texts])
    assert [token for ids in blocks for token in ids] == whole


def test_blocks_part_where_words_part_whatever_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwlit.data.text_files.TEXT_BLOCK_BYTES", 64)
    qwen = small_tokenizer("qwen3", as_qwen=True).backend_tokenizer

    def words(text: str) -> list[str]:
        return [word for word, _ in qwen.pre_tokenizer.pre_tokenize_str(qwen.normalizer.normalize_str(text))]

    rng = random.Random(0)
    num_blocks = 0
    for fragments in [[ENGLISH], [CHINESE], FRAGMENTS, *[SPACES * share + ODD for share in (1, 2, 4)] * 30]:
        text = "x" + "".join(rng.choices(fragments, k=4000 // len(max(fragments, key=len))))
        texts = texts_of_blocks(tmp_path / "book.txt", text)
        num_blocks += len(texts)
        assert [word for block in texts for word in words(block)] == words(text)
    assert num_blocks > 500


def test_a_text_of_one_block_is_whole(tmp_path: Path) -> None:
    for size in (1, 100, TEXT_BLOCK_BYTES - 1, TEXT_BLOCK_BYTES):
        assert values(tmp_path, b"x\n" * (size // 2) + b"x" * (size % 2), "book.txt")[0][1].is_whole
    ((_, document),) = values(tmp_path, ENGLISH.encode(), "book.txt.gz")
    assert document == Document(ENGLISH)


def test_a_text_without_line_breaks_beyond_a_rows_size_is_cut_between_characters(tmp_path: Path) -> None:
    text = "天下大势。" * (MAX_ROW_BYTES * 2 // 15)
    documents = [value for _, value in values(tmp_path, b"x" + text.encode(), "book.txt")]
    assert "".join(d.text for d in documents) == "x" + text
    assert len(documents) == 2
    assert all(len(d.text.encode()) <= MAX_ROW_BYTES + 2 * TEXT_BLOCK_BYTES for d in documents)


def test_a_block_that_is_no_utf_8_is_one_bad_row_and_the_others_are_read(tmp_path: Path) -> None:
    content = (b"x" * 99 + b"\n") * (TEXT_BLOCK_BYTES // 40)
    broken = bytearray(content)
    broken[len(content) // 2] = 0xFF
    rows = values(tmp_path, bytes(broken), "book.txt")
    bad = [value for _, value in rows if isinstance(value, str)]
    assert len(rows) == 3
    assert len(bad) == 1
    assert "not valid UTF-8 at byte" in bad[0]
    assert "UTF-16" not in bad[0]


def test_utf_16_is_named(tmp_path: Path) -> None:
    ((_, reason),) = values(tmp_path, "Es war".encode("utf-16"), "book.txt")
    assert reason == "not valid UTF-8 at byte 1, but it looks like UTF-16"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    call = {"name": "add", "arguments": '{"a": 1}'}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [{"messages": [GOOD["messages"][0], answer], "id": number} for number in range(2500)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=700)
    return tmp_path / "rows.parquet"


def test_parquet_gives_nested_messages_row_by_row(table: Path) -> None:
    rows = read(table)
    assert [row.line for row in rows] == list(range(1, 2501))
    user, answer = seen(rows[1233])["messages"]
    assert user == {"role": "user", "content": "Hi", "tool_calls": None}
    assert answer["tool_calls"] == [{"name": "add", "arguments": '{"a": 1}'}]
    # Of columns that no format knows nothing is read.
    assert set(seen(rows[1233])) == {"messages"}


def test_a_table_without_a_known_column_names_those_it_has(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"], "answer": ["b"]}), tmp_path / "rows.parquet")
    (row,) = read(tmp_path / "rows.parquet")
    assert seen(row) == {"question": None, "answer": None}


def test_a_wide_row_of_a_table_counts_as_long_as_it_is(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "x" * size}] for size in (10, MAX_ROW_BYTES + 1)]
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "rows.parquet")
    short, long = read(tmp_path / "rows.parquet")
    assert isinstance(short, Row) and 10 < short.num_bytes() < 100
    assert isinstance(long, QuarantinedRow) and "a row may have" in long.reason


def test_a_damaged_table_is_an_error(table: Path) -> None:
    whole = table.read_bytes()
    for damaged in (b"", whole[:-20], b"PAR1 no more", whole[:300] + bytes(900) + whole[1200:]):
        table.write_bytes(damaged)
        with pytest.raises(
            DataError, match=r"rows\.parquet' is not a complete Parquet file \(error after row \d+\): [^\n]+$"
        ):
            read(table)


@pytest.mark.parametrize("content", [b"", b"\n\n \n", codecs.BOM_UTF8])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".jsonl.gz", ".txt.gz"])
def test_a_file_without_rows_is_an_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"rows{suffix}' has no rows"):
        read(written(tmp_path, content, f"rows{suffix}"))


@pytest.mark.parametrize(("name", "content"), [("empty.json", b"[ ]"), ("empty.csv", b"a,b\n")])
def test_a_frame_without_rows_is_an_error(name: str, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read(written(tmp_path, content, name))


def test_a_compressed_file_that_is_cut_or_damaged_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, b"".join(b'{"text": "%d"}\n' % (n * n) for n in range(9000)), "rows.jsonl.gz")
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:200] + b"damage" + whole[206:], LINE):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz' is damaged after row \d+: .*; make it again"):
            read(path)


def test_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    written(tmp_path, LINE + b"\n" + LINE, "a.jsonl")
    written(tmp_path, LINE, "b.jsonl")
    rows = read(tmp_path)
    assert [(row.source, row.line) for row in rows] == [(0, 1), (0, 2), (1, 1)]
    written(tmp_path, b"", "c.jsonl")
    with pytest.raises(DataError, match=r"c\.jsonl' has no rows"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.txt", "rows.parquet"])
def test_the_reader_knows_how_far_it_is(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if name == "rows.parquet":
        request.getfixturevalue("table")
    else:
        written(tmp_path, b"a,b\n" + b"1,2\n" * 999, name)
    other = tmp_path / ("more" + "".join(Path(name).suffixes))
    other.write_bytes((tmp_path / name).read_bytes())
    reader = RowReader(find_sources(str(tmp_path / f"*{''.join(Path(name).suffixes)}")))
    assert reader.num_bytes_read == 0
    read_so_far = [reader.num_bytes_read for _ in reader]
    assert read_so_far == sorted(read_so_far)
    assert read_so_far[-1] <= reader.num_bytes_read == reader.num_bytes == 2 * other.stat().st_size


def test_a_file_that_vanished_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, LINE, "rows.jsonl")
    reader = RowReader([File(path)])
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl' cannot be read: No such file"):
        list(reader)


def test_rows_of_a_folder_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    (tmp_path / "rows").mkdir()
    written(tmp_path / "rows", LINE + b"\n" + LINE, "train.jsonl")
    reader = RowReader(find_sources(f"hf:{tmp_path}/rows"))
    assert [(row.source, row.line, seen(row)) for row in reader] == [(0, 1, GOOD), (0, 2, GOOD)]
    assert reader.num_bytes == reader.num_bytes_read == 0


def test_a_text_that_ends_in_blank_blocks_still_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"once upon a time" + b"\n" * (11 * 2**20))
    documents = [row.content for row in RowReader(find_sources(str(path))) if isinstance(row, Row)]
    assert all(isinstance(document, Document) for document in documents)
    assert "".join(document.text for document in documents) == path.read_text()  # type: ignore[union-attr]
    assert [document.is_last for document in documents] == [False] * (len(documents) - 1) + [True]  # type: ignore[union-attr]


def test_text_of_nul_characters_is_quarantined(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("plain text".encode("utf-16-le"))
    (row,) = RowReader(find_sources(str(tmp_path / "a.txt")))
    assert isinstance(row, QuarantinedRow)
    assert "NUL" in row.reason


CASES = Path(__file__).parent.parent / "cases"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_an_array_called_json_lines_is_an_array(name: str, tmp_path: Path) -> None:
    content = (CASES / "array_called.jsonl").read_bytes()
    expected = json.loads(content)
    spellings = [content, json.dumps(expected).encode(), codecs.BOM_UTF8 + b"\n \n" + content, b"[\n" + content[2:]]
    for spelling in [*spellings, json.dumps(expected, indent=1).encode().replace(b"[\n", b"[ ", 1)]:
        found = values(tmp_path, spelling, name)
        assert [value for _, value in found] == expected
        assert [line for line, _ in found] == [1, 2]


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 64, 1000])
def test_an_array_read_in_pieces_has_the_elements_that_json_reads(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwlit.data.json_array.PIECE_BYTES", piece_bytes)
    rng = random.Random(piece_bytes)
    odd = [*FRAGMENTS, "\\", '\\"', '"', "[", "]", "{", "},", ",", "\\u00e9", "\n"]
    for indent in (None, 0, 3):
        texts = ["".join(rng.choices(odd, k=rng.randrange(6))) for _ in range(40)]
        rows = [{text: [text, {"x": [[], {}, number, None]}]} for number, text in enumerate(texts)]
        content = json.dumps(rows, indent=indent, ensure_ascii=rng.random() < 0.5).encode()
        assert values(tmp_path, content, "rows.json") == list(enumerate(json.loads(content), start=1))


def test_an_element_that_is_too_long_costs_no_other_and_is_hashed(tmp_path: Path) -> None:
    long = b'{"x": [' + b'"a]}", ' * (MAX_ROW_BYTES // 7) + b"1]}"
    for elements in ([LINE, long, LINE], [long, LINE], [LINE, long]):
        rows = read(written(tmp_path, b"[" + b",".join(elements) + b"]", "rows.json"))
        assert [isinstance(row, Row) for row in rows] == [element == LINE for element in elements]
        (bad,) = [row for row in rows if isinstance(row, QuarantinedRow)]
        assert bad.sha256 == sha256(long).hexdigest()
        assert bad.reason.startswith(f"{len(long):,} bytes long")


def test_an_array_in_one_long_line_is_an_array(tmp_path: Path) -> None:
    rows = [{"text": "x" * (MAX_ROW_BYTES // 3)} for _ in range(4)]
    assert [value for _, value in values(tmp_path, json.dumps(rows).encode(), "rows.jsonl")] == rows


@pytest.mark.parametrize("first", [b"[1, 2]", b"[{}]", b"[]", b'["a', b"[1,", b'[{"role": "user", "content": "x"}]'])
def test_a_list_on_a_line_of_its_own_costs_no_other_row(first: bytes, tmp_path: Path) -> None:
    found = values(tmp_path, first + b"\n" + LINE + b"\n" + LINE, "rows.jsonl")
    assert [line for line, _ in found] == [1, 2, 3]
    assert [value for _, value in found[1:]] == [GOOD, GOOD]
    assert isinstance(found[0][1], str)
