"""Encode rows as samples: parse, tokenize, apply the length limit, and count every row."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwlit.data.chat import ChatEncoder
from qwlit.data.columns import ColumnRenamer
from qwlit.data.config import DataConfig
from qwlit.data.conversation import Conversation
from qwlit.data.encoded_batch import EncodedBatch, FatalRow, RowCounts, sample_arrays
from qwlit.data.formats import RowParser
from qwlit.data.long_texts import refuse_long_word
from qwlit.data.remarks import CONTROL_TOKENS_AS_TEXT, document_remarks, remarks
from qwlit.data.rows import Document, NeedsTokenizer, QuarantinedRow, Row, RowError, refuse_lone_surrogates
from qwlit.data.templates import Piece
from qwlit.data.tokenized import EncodedSample
from qwlit.data.tokenizer import TextTokenizer
from qwlit.data.unread import unread_key_remarks


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows as samples. It can be pickled, for worker processes."""

    config: DataConfig
    vocab_size: int
    """Vocabulary size of the model; every token id must be below it."""
    tokenizer: TextTokenizer | None
    """None if the data may have only tokenized rows."""
    chat: ChatEncoder | None
    """None if the data may have only text or tokenized rows."""
    refusal: str | None
    """Why there is no tokenizer or no chat template; None if there are both."""

    @property
    def fingerprint(self) -> list[Any]:
        """Everything that decides what is stored, except for the rows."""
        config = self.config
        shape = [config.format, config.max_seq_len, config.too_long, config.drop_duplicates, config.loss_on]
        template = self.chat.template if self.chat else None
        chat = [template.name, template.default_system, config.thinking] if template else None
        options = {"columns": sorted((config.columns or {}).items()), "max_samples": config.max_samples}
        # Without these settings, the fingerprint stays as it was before they existed.
        chosen = [{name: value for name, value in options.items() if value}] if any(options.values()) else []
        return [*shape, self.vocab_size, self.tokenizer.fingerprint if self.tokenizer else None, chat, *chosen]

    def __call__(self, rows: Sequence[Row | QuarantinedRow]) -> EncodedBatch:
        """Encode rows.

        Raises:
            NeedsTokenizer: a row is a text or a conversation, but there is no tokenizer or chat template.
        """
        row_counts, remark_counts = RowCounts(read=len(rows)), Counter[str]()
        rename = ColumnRenamer(self.config.columns)
        samples: list[tuple[Row | QuarantinedRow, EncodedSample]] = []
        samples_per_row: list[int] = []
        quarantined: list[QuarantinedRow] = []
        stop = None
        for row, outcome in zip(rows, self._encode(rows, rename, remark_counts), strict=True):
            result = self._apply_length_limit(row, outcome, row_counts) if isinstance(outcome, _Encoded) else outcome
            if isinstance(result, QuarantinedRow) and self.config.strict:
                result = FatalRow(
                    row.source, row.line, f"{result.reason} (data.strict=true stops at the first bad row)"
                )
            if isinstance(result, FatalRow):
                stop = result
                break
            kept = [] if isinstance(result, QuarantinedRow) else [(row, sample) for sample in result]
            samples += kept
            samples_per_row.append(len(kept))
            if isinstance(result, QuarantinedRow):
                quarantined.append(result)
        row_counts.quarantined = len(quarantined)
        row_counts.accepted = row_counts.read - row_counts.too_long - row_counts.quarantined
        return EncodedBatch(
            arrays=sample_arrays(samples),
            row_counts=row_counts,
            quarantined_rows=quarantined,
            samples_per_row=samples_per_row,
            remarks=remark_counts,
            columns=rename.found,
            stop=stop,
        )

    def _encode(
        self, rows: Sequence[Row | QuarantinedRow], rename: ColumnRenamer, remark_counts: Counter[str]
    ) -> Iterator["_Encoded | QuarantinedRow"]:
        """Yield for each row its sample, of any length, or why it is quarantined."""
        parser = RowParser(self.config.format, self.vocab_size, self.config.loss_on)
        parsed = [self._parse(row, rename, parser) for row in rows]
        # All conversations, and all documents, of the batch go to the template, and to the tokenizer, in one call: the
        # tokenizer then uses all cores.
        outcomes = iter(self._render(parsed))
        written = [self._write(each, outcomes, remark_counts) for each in parsed]
        rendered = [value for value in written if isinstance(value, list)]
        conversations = iter(self.chat.encode_batch(rendered) if self.chat else ())
        documents = iter(self._encode_documents([value for value in written if isinstance(value, Document)]))
        # The results have the order of the rows, so the next result belongs to the next row of its kind.
        for value in written:
            if isinstance(value, list):
                yield _Encoded(next(conversations))
            elif isinstance(value, Document):
                yield _Encoded(next(documents), value)
            else:
                yield value if isinstance(value, QuarantinedRow) else _Encoded(value)

    def _parse(self, row: Row | QuarantinedRow, rename: ColumnRenamer, parser: RowParser) -> "_Parsed | QuarantinedRow":
        if isinstance(row, QuarantinedRow):
            return row
        missing = ""
        try:
            renamed = rename(row)
            missing = renamed.missing
            value = parser(renamed.content)
            row_remarks = [*unread_key_remarks("row", [*parser.unread_keys(renamed.content), *renamed.unread])]
            if isinstance(value, Document):
                refuse_lone_surrogates(value.text)
                refuse_long_word(value.text)
                row_remarks += [*document_remarks(value.text), *self._control_token_remarks([value.text])]
            return _Parsed(row, value, row_remarks, missing)
        except RowError as error:
            return row.quarantined(f"{error}{missing}")

    def _render(self, parsed: Iterable["_Parsed | QuarantinedRow"]) -> list[list[Piece] | RowError]:
        """Render the conversations among the rows."""
        values = [each.value for each in parsed if isinstance(each, _Parsed)]
        conversations = [value for value in values if isinstance(value, Conversation)]
        if conversations and self.chat is None:
            raise NeedsTokenizer(self.refusal or "conversations need a tokenizer with a chat template")
        return self.chat.render_all(conversations) if self.chat else []

    def _write(
        self,
        parsed: "_Parsed | QuarantinedRow",
        outcomes: Iterator[list[Piece] | RowError],
        remark_counts: Counter[str],
    ) -> list[Piece] | Document | EncodedSample | QuarantinedRow:
        """Take the pieces of a conversation from `outcomes`, and count the remarks on a row that can be used."""
        if isinstance(parsed, QuarantinedRow):
            return parsed
        value, row_remarks = parsed.value, parsed.remarks
        if not isinstance(value, Conversation):
            remark_counts.update(row_remarks)
            return value
        assert self.chat is not None
        pieces = next(outcomes)
        try:
            if isinstance(pieces, RowError):
                raise pieces
            text = "".join([piece.text for piece in pieces])
            refuse_lone_surrogates(text)
            refuse_long_word(text)
        except RowError as error:
            return parsed.row.quarantined(f"{error}{parsed.missing}")
        # Count remarks only here: a row that cannot be used has none.
        from_table = isinstance(parsed.row.content, dict)
        row_remarks += remarks(value, self.chat.template, self.chat.supervision, from_table=from_table)
        row_remarks += self._control_token_remarks(piece.text for piece in pieces if not piece.control)
        remark_counts.update(row_remarks)
        return pieces

    def _control_token_remarks(self, texts: Iterable[str]) -> list[str]:
        tokenizer = self.tokenizer
        return [CONTROL_TOKENS_AS_TEXT] if tokenizer and any(map(tokenizer.spells_control_tokens, texts)) else []

    def _encode_documents(self, documents: list[Document]) -> list[EncodedSample]:
        """Encode texts with every token supervised, and with the end-of-text token after the last block."""
        if not documents:
            return []
        if self.tokenizer is None:
            raise NeedsTokenizer(self.refusal or "text needs a tokenizer")
        end = self.tokenizer.end_of_text_id
        encoded = self.tokenizer.encode([document.text for document in documents])
        ids = [tokens + [end] * document.is_last for tokens, document in zip(encoded, documents, strict=True)]
        return [EncodedSample(tokens, [0] + [1] * (len(tokens) - 1)) for tokens in ids]

    def _apply_length_limit(
        self, row: Row | QuarantinedRow, encoded: "_Encoded", row_counts: RowCounts
    ) -> list[EncodedSample] | QuarantinedRow | FatalRow:
        """Apply data.too_long, and quarantine a row that has no supervised token left."""
        assert isinstance(row, Row)
        sample, document, limit = encoded.sample, encoded.document, self.config.max_seq_len
        policy = self.config.too_long
        if policy == "auto":
            policy = "split" if document else "drop"
        samples, where = [sample], ""
        # A block of a long text file counts as too long even if it is short, because the whole file is.
        if len(sample.input_ids) > limit or (document and not document.is_whole):
            if policy == "error":
                size = f"{len(sample.input_ids):,} tokens" if not document or document.is_whole else "a long text"
                return FatalRow(
                    row.source, row.line, f"{size}; data.max_seq_len={limit} (data.too_long=error stops at it)"
                )
            if policy == "drop" or (policy == "truncate" and document and not document.is_first):
                row_counts.too_long += 1
                return []
            samples = [sample.slice(0, limit)] if policy == "truncate" else sample.split(limit)
            where = f" within its first {limit} tokens" if policy == "truncate" else ""
        if not (supervised := [piece for piece in samples if 1 in piece.loss_mask]):
            return row.quarantined(f"nothing in it is supervised{where}")
        row_counts.truncated += bool(where)
        row_counts.split += len(samples) > 1
        return supervised


@dataclass(frozen=True)
class _Parsed:
    """A row whose meaning is known."""

    row: Row
    value: Conversation | Document | EncodedSample
    remarks: list[str]
    missing: str
    """See `RenamedRow.missing`."""


@dataclass(frozen=True)
class _Encoded:
    """The tokens of a row, before the length limit."""

    sample: EncodedSample
    document: Document | None = None
    """The plain text, if the row was one."""
