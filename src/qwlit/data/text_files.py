"""Read plain text files in blocks."""

import re
from collections.abc import Iterator
from typing import BinaryIO

from qwlit.core.errors import DataError
from qwlit.data.files import File
from qwlit.data.rows import BOM, MAX_ROW_BYTES, Document, QuarantinedRow, Row

TEXT_BLOCK_BYTES = 2**20
MAX_BLANK_BYTES = 16 * 2**20
"""Spaces and line breaks that follow one another; some bytes of a gzip file can be any number of them."""


def read_text(source_index: int, file: File, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    """Read a document. A long one becomes several blocks; each begins at a line start, where no token crosses.

    Raises:
        DataError: it has more than MAX_BLANK_BYTES of blanks.
    """
    line, is_first, blank = 1, True, 0
    # Read one block ahead, to know which block is the last.
    block, following = handle.read(TEXT_BLOCK_BYTES).removeprefix(BOM), handle.read(TEXT_BLOCK_BYTES)
    while block:
        end = _split_point(block) if following else len(block)
        if end is None:
            block, following = block + following, handle.read(TEXT_BLOCK_BYTES)
            continue
        block, rest = block[:end], block[end:]
        blank = 0 if block.strip() else blank + len(block)
        if blank > MAX_BLANK_BYTES:
            raise DataError(f"data file '{file}' has {blank:,} blanks after one another up to line {line}; remove them")
        if not blank or not is_first:
            yield _text_row(source_index, line, block, is_first=is_first, is_last=not following)
            is_first = False
        line += block.count(b"\n")
        block, following = rest + following, handle.read(TEXT_BLOCK_BYTES)


# Qwen's pre-tokenizers always split after a line break if the next character is not a space. (An ideographic space is
# allowed: Chinese paragraphs begin with it.) So splitting a file there does not change its tokens.
LINE_START = re.compile(rb"\n(?=(?:\xe3\x80\x80)*(?:[^\s\x80-\xff]|[\xc3-\xe0\xe4-\xf4]|\xe3(?!\x80\x80|\x80?\Z)))")
CHARACTER_START = re.compile(rb"[\x00-\x7f\xc2-\xf4]")


def _split_point(block: bytes) -> int | None:
    """Return where the last line of the block starts, None if there is no line start in its second half.

    In a text without lines, return the start of the last character once the block is larger than MAX_ROW_BYTES.
    """
    starts = [match.end() for match in LINE_START.finditer(block, len(block) - TEXT_BLOCK_BYTES // 2)]
    if not starts and len(block) > MAX_ROW_BYTES:
        starts = [match.start() for match in CHARACTER_START.finditer(block, len(block) - 8)]
    return starts[-1] if starts else None


def _text_row(source_index: int, line: int, block: bytes, *, is_first: bool, is_last: bool) -> Row | QuarantinedRow:
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        kind = ", but it looks like UTF-16" if block[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        return Row(source_index, line, block).quarantined(f"not valid UTF-8 at byte {error.start + 1}{kind}")
    if "\0" in text:
        return Row(source_index, line, block).quarantined(
            "has NUL characters, as UTF-16 text does; save the file as UTF-8"
        )
    return Row(source_index, line, Document(text, is_first, is_last))
