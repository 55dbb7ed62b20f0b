"""The result of encoding a batch of rows: the samples as arrays, the quarantined rows, remarks, and row counts."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwlit.data.rows import Document, QuarantinedRow, Row
from qwlit.data.tokenized import EncodedSample

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
"""The arrays of a batch: tokens and mask of all samples end to end; the other arrays have one number per sample.

`digests` hashes tokens and mask, to find duplicates: equal tokens with another mask are not duplicates.
`token_digests` hashes the tokens alone, to find validation samples that are also in the training data.
`row_digests` decides between training and validation. It hashes the tokens of the row's first sample, so all samples of
a split row have the same one, and so have copies with another mask. Each sample of a text file has its own."""


@dataclass
class RowCounts:
    """Counts of rows: read = accepted + too_long + quarantined. Only `duplicates` counts samples."""

    read: int = 0
    accepted: int = 0
    too_long: int = 0
    quarantined: int = 0
    truncated: int = 0
    """Accepted rows that were truncated at the end."""
    split: int = 0
    """Accepted rows that were split into several samples."""
    duplicates: int = 0
    """Samples with the same tokens and loss mask as an earlier one."""

    def add(self, other: "RowCounts") -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True)
class FatalRow:
    """A row that stops the run: the first bad row with data.strict=true, or a long row with data.too_long=error."""

    source: int
    line: int
    reason: str


@dataclass
class EncodedBatch:
    """The result of encoding some rows."""

    arrays: dict[str, NDArray[Any]]
    row_counts: RowCounts
    quarantined_rows: list[QuarantinedRow]
    samples_per_row: list[int]
    remarks: Counter[str]
    """Number of rows for each remark."""
    columns: dict[int, set[str]]
    """See `ColumnRenamer.found`."""
    stop: FatalRow | None

    def drop_samples_after(self, number: int) -> None:
        """Keep the first `number` samples. The counts of rows stay: the last row may lose samples of a long text."""
        num_tokens = int(self.arrays["lengths"][:number].sum())
        for name, values in self.arrays.items():
            self.arrays[name] = values[: num_tokens if name in ("tokens", "mask") else number]


def sample_arrays(samples: Sequence[tuple[Row | QuarantinedRow, EncodedSample]]) -> dict[str, NDArray[Any]]:
    """Return the arrays of samples, each with the row that it comes from; see DTYPES."""
    origins = [row for row, _ in samples]
    tokens = [np.array(sample.input_ids, dtype=np.int32) for _, sample in samples]
    masks = [bytes(sample.loss_mask) for _, sample in samples]
    digests = [_digest(ids.tobytes()) for ids in tokens]
    # Samples of one row share its first digest; rows are identified by their object, which `origins` keeps alive.
    first_digests: dict[int, bytes] = {}
    row_digests = [
        digest if _is_text_file(row) else first_digests.setdefault(id(row), digest)
        for row, digest in zip(origins, digests, strict=True)
    ]
    columns: dict[str, Any] = {
        "tokens": np.concatenate(tokens) if tokens else [],
        "mask": np.frombuffer(b"".join(masks), np.uint8),
        "lengths": [len(ids) for ids in tokens],
        "num_supervised": [sum(mask) for mask in masks],
        "digests": np.frombuffer(b"".join(map(_digest, map(bytes.__add__, digests, masks))), "<u8"),
        "token_digests": np.frombuffer(b"".join(digests), "<u8"),
        "row_digests": np.frombuffer(b"".join(row_digests), "<u8"),
        "sources": [row.source for row in origins],
        "lines": [row.line for row in origins],
    }
    return {name: np.asarray(column, dtype=DTYPES[name]) for name, column in columns.items()}


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _is_text_file(row: Row | QuarantinedRow) -> bool:
    return isinstance(row, Row) and isinstance(row.content, Document)
