"""What became of some rows: samples as arrays, rejects with their reasons, remarks, and the account of all."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwlit.data.rows import Document, Reject, Row
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
class Filling:
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
