"""Rows to samples: parsed, tokenized, fitted to the length limit, and every row accounted for."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwlit.data.chat import ChatEncoder
from qwlit.data.config import DataConfig
from qwlit.data.conversation import Conversation
from qwlit.data.formats import RowParser
from qwlit.data.outcome import Account, Batch, Filling, Stop
from qwlit.data.remarks import WRITTEN_OUT, document_remarks, remarks
from qwlit.data.rows import Document, NeedsTokenizer, Reject, Row, RowError, refuse_half_characters
from qwlit.data.templates import Piece
from qwlit.data.tokenized import EncodedSample
from qwlit.data.tokenizer import TextTokenizer
from qwlit.data.unread import row_key_remarks


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
        batch = Filling(Account(read=len(rows)))
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
