"""The blocks of plain text files."""

import re
from collections.abc import Iterator
from typing import BinaryIO

from qwlit.data.files import File
from qwlit.data.rows import BOM, MAX_ROW_BYTES, Document, Reject, Row

TEXT_BLOCK_BYTES = 2**20


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
