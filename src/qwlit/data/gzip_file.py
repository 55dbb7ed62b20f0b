"""Read gzip files with a limit on what they expand to."""

import gzip
from typing import BinaryIO

from qwlit.core.errors import DataError
from qwlit.data.files import FREE_BYTES, MOST_EXPANSION


class LimitedGzipFile(gzip.GzipFile):
    """A gzip file that raises DataError where it expands too far; `name` is for the error."""

    def __init__(self, raw: BinaryIO, num_bytes: int, name: str) -> None:
        """`num_bytes`: size of the file on disk."""
        super().__init__(fileobj=raw)
        self._limit = max(FREE_BYTES, MOST_EXPANSION * num_bytes)
        self._name = name

    def read(self, size: int | None = -1) -> bytes:
        return self._within_limit(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._within_limit(super().readline(size))

    def _within_limit(self, content: bytes) -> bytes:
        if self.tell() > self._limit:
            raise DataError(
                f"data file '{self._name}' expands to more than {self._limit:,} bytes, {MOST_EXPANSION} times its size"
                " or more; if that is right, unpack it with gunzip and name the unpacked file"
            )
        return content
