"""Rows to samples: parsed, tokenized, fitted to the length limit, and every row accounted for."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwlit.data.chat import ChatEncoder
from qwlit.data.config import DataConfig
from qwlit.data.conversation import Conversation
from qwlit.data.formats import RowParser
from qwlit.data.remarks import WRITTEN_OUT, document_remarks, remarks
from qwlit.data.rows import Document, NeedsTokenizer, Reject, Row, RowError, refuse_half_characters
from qwlit.data.templates import Piece
from qwlit.data.tokenized import EncodedSample
from qwlit.data.tokenizer import TextTokenizer
from qwlit.data.unread import row_key_remarks

DTYPES = {
    "tokens": "<i4",
    "mask": "|u1",
    "lengths": "<i4",
    "num_supervised": "<i4",
    "digests": "<u8",
    "token_digests": "<u8",
    "row_digests": "<u8",
    "sources": "<i4",
    "lines": "<i4",
}
"""The arrays of a batch: tokens and mask of all samples end to end, the others one number a sample.

A sample's digest is of tokens and mask: with another mask it teaches something else. A row's digest is of its first
sample's tokens, so that the samples a row was cut into share it, and so do copies with another mask; a text file's each
have their own."""


@dataclass
class Account:
    """What became of every row: accepted + too_long + quarantined = read."""

    read: int = 0
    accepted: int = 0
    too_long: int = 0
    quarantined: int = 0
    truncated: int = 0
    """Accepted rows cut at the end."""
    split: int = 0
    """Accepted rows cut into several samples."""
    duplicates: int = 0
    """Samples with the same tokens and loss mask as an earlier one."""

    def add(self, other: "Account") -> None:
        for name, number in vars(other).items():
            setattr(self, name, getattr(self, name) + number)


@dataclass(frozen=True)
class Stop:
    """A row that ends the reading: the first bad one where data.strict=true, or too long where that is an error."""

    source: int
    line: int
    reason: str


@dataclass
class Batch:
    """What became of some rows."""

    arrays: dict[str, NDArray[Any]]
    account: Account
    rejects: list[Reject]
    remarks: Counter[str]
    """Rows by what is remarkable in them."""
    stop: Stop | None = None


@dataclass
class _Filling:
    """A batch being filled."""

    account: Account
    rejects: list[Reject] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)
    _samples: list[EncodedSample] = field(default_factory=list)
    _origins: list[Row | Reject] = field(default_factory=list)

    def add(self, row: Row | Reject, result: list[EncodedSample] | Reject) -> None:
        if isinstance(result, Reject):
            self.rejects.append(result)
            return
        self._samples += result
        self._origins += [row] * len(result)

    def finish(self, stop: Stop | None = None) -> Batch:
        account = self.account
        account.quarantined = len(self.rejects)
        account.accepted = account.read - account.too_long - account.quarantined
        return Batch(self._arrays(), account, self.rejects, self.remarks, stop)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        tokens = [np.array(sample.input_ids, dtype=np.int32) for sample in self._samples]
        digests = [_digest(ids.tobytes()) for ids in tokens]
        masks = [bytes(sample.loss_mask) for sample in self._samples]
        firsts: dict[int, bytes] = {}
        row_digests = [
            digest if _is_text_file(row) else firsts.setdefault(id(row), digest)
            for row, digest in zip(self._origins, digests, strict=True)
        ]
        columns: dict[str, Any] = {
            "tokens": np.concatenate(tokens) if tokens else [],
            "mask": np.frombuffer(b"".join(masks), np.uint8),
            "lengths": [len(ids) for ids in tokens],
            "num_supervised": [sum(sample.loss_mask) for sample in self._samples],
            "digests": np.frombuffer(b"".join(map(_digest, map(bytes.__add__, digests, masks))), "<u8"),
            "token_digests": np.frombuffer(b"".join(digests), "<u8"),
            "row_digests": np.frombuffer(b"".join(row_digests), "<u8"),
            "sources": [row.source for row in self._origins],
            "lines": [row.line for row in self._origins],
        }
        return {name: np.asarray(column, dtype=DTYPES[name]) for name, column in columns.items()}


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _is_text_file(row: Row | Reject) -> bool:
    return isinstance(row, Row) and isinstance(row.content, Document)


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into samples. It can be sent to other processes."""

    config: DataConfig
    vocab_size: int
    """The model's; every token id must lie below it."""
    tokenizer: TextTokenizer | None
    """None where only tokenized rows are expected."""
    chat: ChatEncoder | None
    """None where only text or tokenized rows are expected."""
    refusal: str | None
    """Why there is no tokenizer or no chat template."""

    @property
    def fingerprint(self) -> list[Any]:
        """Everything but the rows that decides what is stored."""
        config = self.config
        shape = [config.format, config.max_seq_len, config.too_long, config.drop_duplicates, config.loss_on]
        chat = [self.chat.template, self.chat.family.default_system, config.thinking] if self.chat else None
        return [*shape, self.vocab_size, self.tokenizer.fingerprint if self.tokenizer else None, chat]

    def __call__(self, rows: Sequence[Row | Reject]) -> Batch:
        """Encode rows.

        Raises:
            NeedsTokenizer: a text or a conversation, and nothing to encode it with.
        """
        batch = _Filling(Account(read=len(rows)))
        for row, outcome in zip(rows, self._encode(rows, batch.remarks), strict=True):
            result = self._fit(row, outcome, batch.account) if isinstance(outcome, _Encoded) else outcome
            if isinstance(result, Reject) and self.config.strict:
                result = Stop(row.source, row.line, f"{result.reason} (data.strict=true stops at the first bad row)")
            if isinstance(result, Stop):
                return batch.finish(result)
            batch.add(row, result)
        return batch.finish()

    def _encode(self, rows: Sequence[Row | Reject], remarked: Counter[str]) -> Iterator["_Encoded | Reject"]:
        """Yield for each row its sample of any length, or the reason that it has none."""
        parser = RowParser(self.config.format, self.vocab_size, self.config.loss_on)
        read = [self._read(row, parser, remarked) for row in rows]
        rendered = [value for value in read if isinstance(value, list)]
        conversations = iter(self.chat.encode_batch(rendered) if self.chat else ())
        documents = iter(self._encode_documents([value for value in read if isinstance(value, Document)]))
        for value in read:
            if isinstance(value, list):
                yield _Encoded(next(conversations))
            elif isinstance(value, Document):
                yield _Encoded(next(documents), value)
            else:
                yield value if isinstance(value, Reject) else _Encoded(value)

    def _read(
        self, row: Row | Reject, parser: RowParser, remarked: Counter[str]
    ) -> list[Piece] | Document | EncodedSample | Reject:
        if isinstance(row, Reject):
            return row
        try:
            raw = row.value()
            value = parser(raw)
            found = [*row_key_remarks([*parser.unread(raw), *row.unread_columns])]
            if isinstance(value, Document):
                refuse_half_characters(value.text)
                found += [*document_remarks(value.text), *self._written_out([value.text])]
            if not isinstance(value, Conversation):
                remarked.update(found)
                return value
            if self.chat is None:
                raise NeedsTokenizer(self.refusal or "conversations need a tokenizer with a chat template")
            pieces = self.chat.render(value)
            refuse_half_characters("".join([piece.text for piece in pieces]))
            from_table = isinstance(row.content, dict)
            found += remarks(value, self.chat.family, self.chat.supervision, from_table=from_table)
            found += self._written_out(piece.text for piece in pieces if not piece.control)
            remarked.update(found)
            return pieces
        except RowError as error:
            return row.reject(str(error))

    def _written_out(self, texts: Iterable[str]) -> list[str]:
        tokenizer = self.tokenizer
        return [WRITTEN_OUT] if tokenizer and any(map(tokenizer.spells_control_tokens, texts)) else []

    def _encode_documents(self, documents: list[Document]) -> list[EncodedSample]:
        """Learn every token of a text, and the end-of-text token after its last block."""
        if not documents:
            return []
        if self.tokenizer is None:
            raise NeedsTokenizer(self.refusal or "text needs a tokenizer")
        end = self.tokenizer.end_of_text_id
        encoded = self.tokenizer.encode([document.text for document in documents])
        ids = [tokens + [end] * document.is_last for tokens, document in zip(encoded, documents, strict=True)]
        return [EncodedSample(tokens, [0] + [1] * (len(tokens) - 1)) for tokens in ids]

    def _fit(self, row: Row | Reject, encoded: "_Encoded", account: Account) -> list[EncodedSample] | Reject | Stop:
        """Apply data.too_long, and put aside what has nothing left to learn."""
        assert isinstance(row, Row)
        sample, document, limit = encoded.sample, encoded.document, self.config.max_seq_len
        policy = self.config.too_long
        if policy == "auto":
            policy = "split" if document else "drop"
        samples, where = [sample], ""
        if len(sample.input_ids) > limit or (document and not document.is_whole):
            if policy == "error":
                size = f"{len(sample.input_ids):,} tokens" if not document or document.is_whole else "a long text"
                return Stop(row.source, row.line, f"{size}; data.max_seq_len={limit} (data.too_long=error stops at it)")
            if policy == "drop" or (policy == "truncate" and document and not document.is_first):
                account.too_long += 1
                return []
            samples = [sample.cut(0, limit)] if policy == "truncate" else sample.split(limit)
            where = f" within its first {limit} tokens" if policy == "truncate" else ""
        if not (learnt := [piece for piece in samples if 1 in piece.loss_mask]):
            return row.reject(f"nothing in it is supervised{where}")
        account.truncated += bool(where)
        account.split += len(samples) > 1
        return learnt


@dataclass(frozen=True)
class _Encoded:
    """A row's tokens, before the length limit."""

    sample: EncodedSample
    document: Document | None = None
    """The plain text that it was, if it was."""
