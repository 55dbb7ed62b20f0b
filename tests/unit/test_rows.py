import json
from hashlib import sha256
from typing import Any

import pytest

from qwlit.data.rows import Document, QuarantinedRow, Row, RowError, parse_json_object

LINE = b'{"a": 1, "b": [{"c": null}]}'


@pytest.mark.parametrize(
    "raw",
    [
        LINE,
        b"\xef\xbb\xbf" + LINE,
        b"  " + LINE + b"\r\n",
        b'{"a":"\\ud83c\\udf89"}',
        b'{"a": 1e308, "b": -0.0}',
        b"{}",
    ],
)
def test_one_json_object_is_read_as_json_reads_it(raw: bytes) -> None:
    assert parse_json_object(raw) == json.loads(raw.removeprefix(b"\xef\xbb\xbf"))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (LINE[:-5], "not valid JSON"),
        (LINE + LINE, "not valid JSON: Extra data at column 29"),
        (b'{"messages": "\xff"}', "not valid UTF-8 at byte 15"),
        (LINE.decode().encode("utf-16-le"), "not valid JSON"),
        (b"[1, 2]", "must be a JSON object, not a list"),
        (b'"text"', "not a string"),
        (b"3.5", "not a number"),
        (b"null", "not null"),
        (b"true", "not true or false"),
        (b'{"x": NaN}', "NaN is not a JSON value"),
        (b'{"x": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"x": [1e999]}', "the number 1e999 is too large"),
        (b'{"x": -1e999}', "the number -1e999 is too large"),
        (b'{"x": 1, "y": 2, "x": 1}', "the key 'x' appears twice"),
        (b'{"y": [{"x": 1, "\\u0078": 2}]}', "the key 'x' appears twice"),
        (b'{"x": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b'{"x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "not readable as JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b'{"x": "a\x00b"}', "not valid JSON"),
        (b"Es war einmal.", "not valid JSON"),
        (b'{"' + b"k" * 900 + b'": 1, "' + b"k" * 900 + b'": 2}', "appears twice"),
    ],
)
def test_anything_else_is_refused_with_a_short_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(RowError) as raised:
        parse_json_object(raw)
    assert reason in str(raised.value)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("content", "raw"),
    [
        (LINE, LINE),
        (Document("二\n"), "二\n".encode()),
        ({"text": "二", "n": 1}, '{"text": "二", "n": 1}'.encode()),
        ({"text": "\ud800"}, b'{"text": "\xed\xa0\x80"}'),
    ],
)
def test_a_row_put_aside_is_known_by_the_hash_of_what_it_was(content: Any, raw: bytes) -> None:
    assert Row(2, 7, content).quarantined("why") == QuarantinedRow(2, 7, "why", sha256(raw).hexdigest())


def test_a_tables_row_and_a_text_have_their_value_at_once() -> None:
    document = Document("x", is_last=False)
    assert Row(0, 1, {"a": 1}).value() == {"a": 1}
    assert Row(0, 1, document).value() is document
    assert not document.is_whole
    assert Document("x").is_whole
