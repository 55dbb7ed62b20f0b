"""Cut long texts for the tokenizer, which needs 100 to 300 bytes of memory for each character."""

import re
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from qwlit.data.rows import RowError

if TYPE_CHECKING:
    from tokenizers import Encoding

PIECE_CHARACTERS = 2**17
GROUP_CHARACTERS = 2**19
"""Texts that the tokenizer gets together have about so many."""
MANY_CHARACTERS = 5 * 2**19
"""Of texts with more, the tokens are kept in the form that needs less memory and more time."""
LONGEST_WORD = 2**18
"""Characters; a longer one is no word of a language, and cannot be cut without changing its tokens."""
# Qwen's pre-tokenizers always split after a letter or a digit if one of these characters follows, between a letter and
# a digit, and before the first of several spaces. Normalization joins no characters there.
WORD_END = re.compile(r"[^\W_](?=[ \t\n,.;:!?、。，；：！？])|[^\W\d_](?=[0-9])|\S(?=[ \t])")
SPACE = re.compile(r"\s")


def cut_text(text: str) -> Iterator[str]:
    """Yield the text in pieces; most are not longer than PIECE_CHARACTERS.

    They have the tokens of the whole text, except where more than half a piece is only spaces and line breaks.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        middle, most = start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS
        end = _last_end(WORD_END, text, middle, most) or _last_end(SPACE, text, middle, most)
        if end is None and (later := WORD_END.search(text, middle)):
            end = later.end()
        if end is None:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _last_end(pattern: re.Pattern[str], text: str, start: int, end: int) -> int | None:
    ends = [match.end() for match in pattern.finditer(text, start, end)]
    return ends[-1] if ends else None


def group_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in groups of about GROUP_CHARACTERS; a text longer than PIECE_CHARACTERS is a group."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and (len(text) > PIECE_CHARACTERS or size + len(text) > GROUP_CHARACTERS):
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
        if size > PIECE_CHARACTERS and len(group) == 1:
            yield group
            group, size = [], 0
    if group:
        yield group


def refuse_long_word(text: str) -> None:
    """Raise RowError if the text has a word of more than LONGEST_WORD characters."""
    start = 0
    while len(text) - start > LONGEST_WORD:
        most = start + LONGEST_WORD
        end = _last_end(WORD_END, text, start, most) or _last_end(SPACE, text, start, most)
        if end is None:
            raise RowError(f"{LONGEST_WORD:,} characters of it are one word, which no language has")
        start = end


class LongEncoding:
    """The tokens of a text that was cut, as `tokenizers.Encoding` has them."""

    def __init__(self, encoded: "Iterable[tuple[str, Encoding]]") -> None:
        """`encoded`: the pieces and their tokens."""
        self.ids = array("i")
        self._starts, self._ends = array("i"), array("i")
        position = 0
        for piece, encoding in encoded:
            self.ids.extend(encoding.ids)
            for start, end in encoding.offsets:
                self._starts.append(position + start)
                self._ends.append(position + end)
            position += len(piece)

    @property
    def offsets(self) -> Iterable[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)
