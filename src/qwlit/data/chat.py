"""Encode conversations as tokens and a loss mask, with the same ids as the model's own chat template.

We tokenize all text between two control tokens as one string, and do not parse special tokens in it. So newlines merge
across the role header as if the whole rendered conversation were tokenized, and no text becomes a control token.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from qwlit.core.errors import DataError
from qwlit.data.conversation import Conversation
from qwlit.data.long_texts import LongEncoding
from qwlit.data.rows import RowError
from qwlit.data.templates import ChatTemplate, Piece, Supervision
from qwlit.data.tokenized import EncodedSample
from qwlit.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding


class _Segment(NamedTuple):
    """A control token, or all text between two control tokens."""

    token_id: int | None
    text: str
    pieces: tuple[Piece, ...]


class ChatEncoder:
    """Encodes conversations with one tokenizer and one template."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate, supervision: Supervision) -> None:
        """See `recognise.resolve_template` for the template.

        Raises:
            DataError: the vocabulary lacks the tokens that open and close a turn.
        """
        if missing := [token for token in template.turn_tokens if token not in tokenizer.control_ids]:
            raise DataError(f"the tokenizer has no {' and no '.join(missing)} token, which every Qwen template needs")
        self.template = template
        self.supervision = supervision
        self._tokenizer = tokenizer

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends an answer."""
        return self._tokenizer.control_ids[self.template.end_of_turn]

    def render(self, conversation: Conversation) -> list[Piece]:
        """Render the conversation, or raise RowError if the template cannot express it."""
        return self.template.render(conversation, self.supervision)

    def render_all(self, conversations: Sequence[Conversation]) -> list[list[Piece] | RowError]:
        """Render conversations; see `ChatTemplate.render_all`."""
        return self.template.render_all(conversations, self.supervision)

    def encode_batch(self, rendered: Iterable[list[Piece]]) -> list[EncodedSample]:
        """Encode rendered conversations, on all cores."""
        segmented = [list(self._segments(pieces)) for pieces in rendered]
        # Headers repeat in every turn, so tokenize each different text only once.
        texts = list(dict.fromkeys(s.text for segments in segmented for s in segments if s.token_id is None))
        encodings = dict(zip(texts, self._tokenizer.encode_with_offsets(texts), strict=True))
        return [_join(segments, encodings) for segments in segmented]

    def _segments(self, pieces: Sequence[Piece]) -> Iterator[_Segment]:
        # A control token that is not in the vocabulary is plain text to the tokenizer, so treat it as text here too.
        ids = self._tokenizer.control_ids
        for token_id, group in groupby(pieces, key=lambda p: ids.get(p.text) if p.control else None):
            if token_id is None:
                texts = tuple(group)
                yield _Segment(None, "".join([piece.text for piece in texts]), texts)
            else:
                yield from (_Segment(token_id, piece.text, (piece,)) for piece in group)


def _join(segments: list[_Segment], encodings: dict[str, "Encoding | LongEncoding"]) -> EncodedSample:
    ids: list[int] = []
    mask: list[int] = []
    for segment in segments:
        if segment.token_id is not None:
            ids.append(segment.token_id)
            mask.append(int(segment.pieces[0].supervised))
        else:
            encoding = encodings[segment.text]
            ids += encoding.ids
            mask += _token_mask(encoding, segment.pieces)
    # No token precedes the first one, so nothing can predict it.
    mask[0] = 0
    return EncodedSample(ids, mask)


def _token_mask(encoding: "Encoding | LongEncoding", pieces: tuple[Piece, ...]) -> list[int]:
    """Return 1 for each token whose characters are all supervised; a token across the boundary gets 0."""
    if len({piece.supervised for piece in pieces}) == 1:
        return [int(pieces[0].supervised)] * len(encoding.ids)
    # Offsets map each token to its characters: only they show where a token crosses from header to answer.
    supervised = b"".join(bytes([piece.supervised]) * len(piece.text) for piece in pieces)
    return [int(start < end and 0 not in supervised[start:end]) for start, end in encoding.offsets]
