"""The rows of data files, one reader a kind of file. Every row comes out, as a row or with the reason why not."""

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, BinaryIO, cast

from qwlit.core.errors import DataError
from qwlit.data.formats import KEYS, OTHER_KEYS
from qwlit.data.rows import BOM, MAX_ROW_BYTES, Document, Reject, Row
from qwlit.data.sources import File, HubData, Source

SPACE = re.compile(r"\s*")
SPACES = b" \t\r\n" + BOM
# A quoted cell may hold line breaks; one that goes on for longer was never closed.
MAX_CSV_ROW_BYTES = 2**20
TEXT_BLOCK_BYTES = 2**20
PARQUET_ROWS, PARQUET_BYTES = 1000, 16 * 2**20
KNOWN_COLUMNS = {key for groups in KEYS.values() for group in groups for key in group} | OTHER_KEYS


class RowReader:
    """Yields every row of every source in order; empty lines are no rows."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self.num_bytes = sum(source.num_bytes() for source in sources if isinstance(source, File))
        self.estimated_bytes = sum(source.estimated_bytes() for source in sources)
        """Of the rows, where they are compressed on disk."""
        self._finished_bytes = 0
        self._handle: BinaryIO | None = None

    @property
    def num_bytes_read(self) -> int:
        """How far into the files the reader is, in bytes on disk."""
        return self._finished_bytes + (self._handle.tell() if self._handle else 0)

    def __iter__(self) -> Iterator[Row | Reject]:
        """Read.

        Raises:
            DataError: a file cannot be read to its end, or has no rows at all.
        """
        for number, source in enumerate(self._sources):
            empty = True
            for row in self._read_hub(number, source) if isinstance(source, HubData) else self._read(number, source):
                empty = False
                yield row
            if empty:
                raise DataError(f"data file '{source}' has no rows")

    def _read_hub(self, number: int, source: HubData) -> Iterator[Row | Reject]:
        for line, columns in enumerate(source.load(), start=1):
            row = Row(number, line, columns)
            yield row.reject(_too_long(row.num_bytes())) if row.num_bytes() > MAX_ROW_BYTES else row

    def _read(self, number: int, file: File) -> Iterator[Row | Reject]:
        line = 0
        try:
            with file.path.open("rb") as raw:
                self._handle = raw
                handle = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if file.is_compressed else raw
                for row in READERS[file.suffix](number, file, handle):
                    line = row.line
                    yield row
                self._handle = None
                self._finished_bytes += file.num_bytes()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"data file '{file}' is damaged after row {line}: {error}; make it again") from None
        except OSError as error:
            raise DataError(f"data file '{file}' cannot be read: {error.strerror or error}") from None


def read_json_lines(number: int, file: File, handle: BinaryIO) -> Iterator[Row | Reject]:
    for line in count(1):
        raw = handle.readline(MAX_ROW_BYTES + 1)
        if not raw:
            return
        if len(raw) > MAX_ROW_BYTES:
            yield _skip_long_line(number, line, raw, handle)
        elif raw.removeprefix(BOM).strip():
            yield Row(number, line, raw)


def _skip_long_line(number: int, line: int, head: bytes, handle: BinaryIO) -> Reject:
    """Read to the line's end in pieces, so that no line can fill the memory."""
    digest, size, piece = hashlib.sha256(head), len(head), head
    while piece and not piece.endswith(b"\n"):
        piece = handle.readline(MAX_ROW_BYTES)
        digest.update(piece)
        size += len(piece)
    return Reject(number, line, _too_long(size), digest.hexdigest())


def _too_long(size: int) -> str:
    return f"{size:,} bytes long; a row may have {MAX_ROW_BYTES:,}"


def read_json(number: int, file: File, handle: BinaryIO) -> Iterator[Row | Reject]:
    """Read an array, an object a line, or one object over many lines."""
    first_line = next((line for line in iter(lambda: handle.readline(MAX_ROW_BYTES), b"") if line.strip(SPACES)), b"")
    first_line = first_line.strip(SPACES)
    handle.seek(0)
    if first_line.startswith(b"["):
        yield from _read_array(number, handle)
    elif len(first_line) < MAX_ROW_BYTES // 2 and _opens_an_object(first_line):
        content = handle.read(MAX_ROW_BYTES + 1)
        if len(content) > MAX_ROW_BYTES:
            raise DataError(f"data file '{file}' is one JSON object of over {MAX_ROW_BYTES:,} bytes; write one a line")
        yield Row(number, 1, content)
    else:
        yield from read_json_lines(number, file, handle)


def _opens_an_object(first_line: bytes) -> bool:
    """Whether the line begins an object that goes on in the next: `{`, or `{"messages": [`."""
    text = first_line.decode("utf-8", "replace")
    if not text.startswith("{"):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


def _read_array(number: int, handle: BinaryIO) -> Iterator[Row | Reject]:
    # Bytes that are not UTF-8 survive the round trip, so that only the element that holds them is rejected.
    text = handle.read().removeprefix(BOM).decode("utf-8", "surrogateescape")
    for index, (element, broken) in enumerate(_array_elements(text), start=1):
        row = Row(number, index, element.encode("utf-8", "surrogateescape"))
        reason = broken or (_too_long(row.num_bytes()) if row.num_bytes() > MAX_ROW_BYTES else None)
        yield row.reject(reason) if reason else row


def _array_elements(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield the raw text of each element, and where the array breaks off its rest with the reason."""
    # Only where an element ends matters here, not what its numbers are: Python refuses to read very long ones.
    decoder = json.JSONDecoder(parse_int=len, parse_float=len)
    position = _after_space(text, _after_space(text, 0) + 1)
    while text[position : position + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield text[position:], f"the JSON array breaks off here: {getattr(error, 'msg', 'not readable')}"
            return
        yield text[position:end], None
        position = _after_space(text, end)
        if text[position : position + 1] not in {",", "]"}:
            yield text[position:], "the JSON array breaks off here: ',' or ']' expected"
            return
        if text[position] == ",":
            position = _after_space(text, position + 1)
    if rest := text[position + 1 :].strip():
        yield rest, "text after the JSON array"


def _after_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def read_csv(number: int, file: File, handle: BinaryIO) -> Iterator[Row | Reject]:
    """Read a table of texts whose first row names the columns. A row that cannot be read costs no other one."""
    rows = _csv_rows(handle)
    first = next(rows, None)
    if first is None:
        return
    # An index that pandas has written has no name.
    header = [name.strip() or f"column {number}" for number, name in enumerate(first[1], start=1)]
    if first[3] or len(set(header)) < len(header):
        raise DataError(
            f"data file '{file}': the first row must name the columns, each once; it reads {first[2][:80]!r}"
        )
    for line, cells, raw, broken in rows:
        if broken:
            yield Row(number, line, raw).reject(broken)
        elif len(cells) != len(header):
            counts = f"{len(cells)} cells, but the first row names {len(header)} columns"
            yield Row(number, line, raw).reject(counts)
        else:
            yield Row(number, line, dict(zip(header, cells, strict=True)))


def _csv_rows(handle: BinaryIO) -> Iterator[tuple[int, list[str], bytes, str | None]]:
    """Yield (line, cells, raw bytes, what is wrong). After a broken row reading goes on with the very next line."""
    ahead: deque[bytes] = deque()
    line = 1
    while ahead or (more := handle.readline()):
        if not ahead:
            ahead.append(more)
        if line == 1:
            ahead[0] = ahead[0].removeprefix(BOM)
        if not ahead[0].strip():
            ahead.popleft()
            line += 1
            continue
        cells, num_lines, reason = _csv_row(ahead, handle)
        raw = b"".join(ahead.popleft() for _ in range(num_lines))
        yield line, cells, raw, reason
        line += num_lines


def _csv_row(ahead: deque[bytes], handle: BinaryIO) -> tuple[list[str], int, str | None]:
    """Parse the row that begins with the first line of `ahead`, reading on into `ahead` as far as its quotes go."""
    if len(ahead[0]) > MAX_ROW_BYTES:
        return [], 1, _too_long(len(ahead[0]))
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_lines(ahead, handle), strict=True)
    try:
        return next(reader), reader.line_num, None
    except UnicodeDecodeError as error:
        return [], 1, f"not valid UTF-8 at byte {error.start + 1}"
    except (csv.Error, StopIteration) as error:
        return [], 1, f"not valid CSV: {str(error) or 'a quote is never closed'}"


def _lines(ahead: deque[bytes], handle: BinaryIO) -> Iterator[str]:
    size = 0
    for position in count():
        if position == len(ahead):
            if size > MAX_CSV_ROW_BYTES or not (more := handle.readline()):
                return
            ahead.append(more)
        size += len(ahead[position])
        yield ahead[position].decode("utf-8")


def read_text(number: int, file: File, handle: BinaryIO) -> Iterator[Row | Reject]:
    """Read a document; a long one comes in blocks that begin with a line, where no token straddles."""
    line, is_first = 1, True
    block, following = handle.read(TEXT_BLOCK_BYTES).removeprefix(BOM), handle.read(TEXT_BLOCK_BYTES)
    while block:
        cut = _last_cut(block) if following else len(block)
        if cut is None:
            block, following = block + following, handle.read(TEXT_BLOCK_BYTES)
            continue
        block, rest = block[:cut], block[cut:]
        if block.strip() or not is_first:
            yield _text_row(number, line, block, is_first=is_first, is_last=not following)
            is_first = False
        line += block.count(b"\n")
        block, following = rest + following, handle.read(TEXT_BLOCK_BYTES)


# After a line break and before a character that is no space (but an ideographic one, with which Chinese paragraphs
# begin) the pre-tokenizers of Qwen always part.
LINE_START = re.compile(rb"\n(?=(?:\xe3\x80\x80)*(?:[^\s\x80-\xff]|[\xc3-\xe0\xe4-\xf4]|\xe3(?!\x80\x80|\x80?\Z)))")
CHARACTER_START = re.compile(rb"[\x00-\x7f\xc2-\xf4]")


def _last_cut(block: bytes) -> int | None:
    """Return where the block's last line starts; in text without lines, after many blocks, its last character."""
    starts = [match.end() for match in LINE_START.finditer(block, len(block) - TEXT_BLOCK_BYTES // 2)]
    if not starts and len(block) > MAX_ROW_BYTES:
        starts = [match.start() for match in CHARACTER_START.finditer(block, len(block) - 8)]
    return starts[-1] if starts else None


def _text_row(number: int, line: int, block: bytes, *, is_first: bool, is_last: bool) -> Row | Reject:
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        kind = ", but it looks like UTF-16" if block[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        return Row(number, line, block).reject(f"not valid UTF-8 at byte {error.start + 1}{kind}")
    if "\0" in text:
        return Row(number, line, block).reject("holds NUL characters, as UTF-16 does; write it as UTF-8")
    return Row(number, line, Document(text, is_first, is_last))


def read_parquet(number: int, file: File, handle: BinaryIO) -> Iterator[Row | Reject]:
    """Read a Parquet table row by row, and of its columns only those that formats know.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        table = pyarrow.parquet.ParquetFile(handle)
        names = table.schema_arrow.names
        known = [name for name in names if name in KNOWN_COLUMNS]
        if not known:
            # Every row will be refused for its columns' names: there is nothing to read.
            yield from (Row(number, row, dict.fromkeys(names)) for row in range(1, table.metadata.num_rows + 1))
            return
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.metadata.num_row_groups)]
        rows_at_once = max(1, min(PARQUET_ROWS, PARQUET_BYTES * table.metadata.num_rows // max(1, sum(sizes))))
        for batch in table.iter_batches(rows_at_once, columns=known):
            for row in _parquet_rows(number, line, batch):
                line = row.line
                yield row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0][:150]
        raise DataError(f"data file '{file}' is no whole Parquet file, broken after row {line}: {reason}") from None


def _parquet_rows(number: int, line: int, batch: Any) -> Iterator[Row | Reject]:
    """Yield the batch's rows, the first being `line` + 1; where one cell cannot be read, its row alone is refused."""
    try:
        rows: list[Any] = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = [_parquet_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
    for index, columns in enumerate(rows, start=line + 1):
        row = Row(number, index, columns if isinstance(columns, dict) else {})
        if isinstance(columns, str):
            yield row.reject(columns)
        else:
            yield row.reject(_too_long(row.num_bytes())) if row.num_bytes() > MAX_ROW_BYTES else row


def _parquet_row(one: Any) -> dict[str, Any] | str:
    try:
        (columns,) = one.to_pylist()
    except (ValueError, OverflowError) as error:
        return f"a cell cannot be read: {error}"
    return dict(columns)


READERS = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".txt": read_text,
    ".parquet": read_parquet,
}
