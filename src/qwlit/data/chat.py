"""Conversations to tokens and a loss mask, with the ids that the model's own chat template would give.

Each stretch of text between two control tokens is tokenized as one string with the parsing of special tokens off: so
newlines merge across the role header as they do when the rendered conversation is tokenized whole, and no text can
become a control token.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qwlit.core.errors import DataError
from qwlit.data.rows import Conversation, EncodedSample
from qwlit.data.templates import CONTROL_TOKENS, END, START, Piece, check, recognise_template, render

if TYPE_CHECKING:
    from tokenizers import Encoding


def resolve_template(tokenizer: Any, template: str) -> str:
    """Return the template family to use: the one set, or with `auto` the tokenizer's own.

    Raises:
        DataError: `auto`, and the tokenizer has no chat template or an unknown one.
    """
    if template != "auto":
        return template
    if not tokenizer.chat_template:
        return recognise_template(None)
    return recognise_template(
        lambda messages, tools: tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    )


@dataclass(frozen=True)
class _Segment:
    """A control token, or a stretch of text between two."""

    token_id: int | None
    pieces: tuple[Piece, ...]

    @cached_property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


class ChatEncoder:
    """Encodes conversations with one tokenizer (a Hugging Face fast one) and one template family."""

    def __init__(self, tokenizer: Any, template: str = "auto") -> None:
        """Take the tokenizer's parts without its added tokens, so that text is only text.

        The post-processor stays behind too: it may trim spaces off the offsets, from which the loss mask is read.

        Raises:
            DataError: the template is unknown, or the vocabulary lacks the tokens that open and close a turn.
        """
        from tokenizers import Tokenizer

        self.template = resolve_template(tokenizer, template)
        backend = tokenizer.backend_tokenizer
        self._added: dict[str, int] = {t.content: i for i, t in backend.get_added_tokens_decoder().items()}
        if missing := [token for token in (START, END) if token not in self._added]:
            raise DataError(f"the tokenizer has no {' and no '.join(missing)} token, which every Qwen template needs")
        self._plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        self.fingerprint = _sha256(self.template, json.dumps(self._added, sort_keys=True), self._plain.to_str())
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._refuse_text_that_controls()

    def _refuse_text_that_controls(self) -> None:
        """A vocabulary trained on text full of control tokens may build one out of plain letters."""
        for content in CONTROL_TOKENS & self._added.keys():
            if self._added[content] in self._plain.encode(content, add_special_tokens=False).ids:
                raise DataError(f"the tokenizer turns the plain text {content!r} into the control token itself")

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends an answer."""
        return self._added[END]

    def check(self, conversation: Conversation) -> None:
        """Raise RowError where the template cannot express the conversation."""
        check(conversation, self.template)

    def encode(self, conversation: Conversation) -> EncodedSample:
        """Encode one conversation; see `encode_batch`."""
        return self.encode_batch([conversation])[0]

    def encode_batch(self, conversations: Iterable[Conversation]) -> list[EncodedSample]:
        """Encode conversations on all cores.

        Raises:
            RowError: the template cannot express one of them.
        """
        segmented = [list(self._segments(render(conversation, self.template))) for conversation in conversations]
        # Headers repeat in every turn: each text is tokenized once.
        texts = list(dict.fromkeys(s.text for segments in segmented for s in segments if s.token_id is None))
        encodings = dict(zip(texts, self._plain.encode_batch(texts, add_special_tokens=False), strict=True))
        return [_join(segments, encodings) for segments in segmented]

    def _segments(self, pieces: Sequence[Piece]) -> Iterator[_Segment]:
        # A control token that the vocabulary lacks is text to its tokenizer, and so it is here.
        for token_id, group in groupby(pieces, key=lambda p: self._added.get(p.text) if p.control else None):
            if token_id is None:
                yield _Segment(None, tuple(group))
            else:
                yield from (_Segment(token_id, (piece,)) for piece in group)


def _join(segments: list[_Segment], encodings: dict[str, "Encoding"]) -> EncodedSample:
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
    mask[0] = 0
    return EncodedSample(ids, mask)


def _token_mask(encoding: "Encoding", pieces: tuple[Piece, ...]) -> list[int]:
    """Return for each token whether all its characters are supervised: one that straddles the boundary is not."""
    if len({piece.supervised for piece in pieces}) == 1:
        return [int(pieces[0].supervised)] * len(encoding.ids)
    supervised = b"".join(bytes([piece.supervised]) * len(piece.text) for piece in pieces)
    return [int(start < end and 0 not in supervised[start:end]) for start, end in encoding.offsets]


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()
