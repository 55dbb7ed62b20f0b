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
LONGEST_WORD = 2**20
"""Characters; a longer one is no word of a language, and cannot be cut without changing its tokens."""
# Qwen's pre-tokenizers always split after a letter or a digit if one of these characters follows, and between a letter
# and a digit. None of them joins with the character before it when a text is normalized.
WORD_END = re.compile(r"[^\W_](?=[ \t\n,.;:!?、。，；：！？])|[^\W\d_](?=[0-9])")


def cut_text(text: str) -> Iterator[str]:
    """Yield the text in pieces that have the tokens of the whole text; most are not longer than PIECE_CHARACTERS."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        middle = start + PIECE_CHARACTERS // 2
        ends = [match.end() for match in WORD_END.finditer(text, middle, start + PIECE_CHARACTERS)]
        if not ends:
            ends = [match.end() for match in [WORD_END.search(text, middle)] if match]
        if not ends:
            break
        yield text[start : ends[-1]]
        start = ends[-1]
    yield text[start:]


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
        ends = [match.end() for match in WORD_END.finditer(text, start, start + LONGEST_WORD)]
        if not ends:
            raise RowError(f"{LONGEST_WORD:,} characters of it are one word, which no language has")
        start = ends[-1]


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
