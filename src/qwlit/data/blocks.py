"""Files with a hash of each block: a process verifies a block when it first reads it, and reads no other block.

xxh3 finds damage and the content of another file. It is no protection against someone who forges a file.
"""

import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from qwlit.core.disk import OF_THE_FILE, naming_path, reason_of_disk, remedy_of, sync
from qwlit.core.errors import DataError

# Small, so that reading one sample verifies little more than the sample: 8 bytes of hash are 0.01 % of a block.
BLOCK_BYTES = 2**16

content_hash = xxhash.xxh3_64_intdigest


class Damage(Exception):
    """A file is not what was written; the message is its name and the reason."""


def damage_of(path: Path, error: OSError) -> Damage:
    """Return the damage that an error of the operating system stands for.

    Raises:
        DataError: the file may be good, see `core.disk.OF_THE_FILE`.
    """
    if error.errno not in OF_THE_FILE:
        raise DataError(
            f"{path} cannot be read: {reason_of_disk(error)}; {remedy_of(error)} and run the same command again"
        )
    return Damage(f"{path.name}: {error.strerror or error}")


def num_blocks(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES)


def open_file(path: Path) -> int:
    """Open for reading; return the file descriptor.

    Raises:
        Damage: it is missing, unreadable or no file.
    """
    try:
        # Without O_NONBLOCK a pipe with this name would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise damage_of(path, error) from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise Damage(f"{path.name} is not a file")


def read_file(path: Path) -> bytes:
    """Return the content.

    Raises:
        Damage: see `open_file`.
    """
    try:
        with os.fdopen(open_file(path), "rb") as handle:
            return handle.read()
    except OSError as error:
        raise damage_of(path, error) from None


class HashedWriter:
    """Appends to a new file, and hashes its blocks meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hashes: list[int] = []
        """One per block, complete after `close`."""
        self.num_bytes = 0
        self._block = xxhash.xxh3_64()
        self._handle = path.open("wb")

    def write(self, data: bytes) -> None:
        with naming_path(self.path):
            self._handle.write(data)
        rest = memoryview(data)
        while rest:
            part = rest[: BLOCK_BYTES - self.num_bytes % BLOCK_BYTES]
            self._block.update(part)
            self.num_bytes += len(part)
            rest = rest[len(part) :]
            if self.num_bytes % BLOCK_BYTES == 0:
                self._end_block()

    def _end_block(self) -> None:
        self.hashes.append(self._block.intdigest())
        self._block.reset()

    def close(self) -> None:
        if self.num_bytes % BLOCK_BYTES:
            self._end_block()
        with naming_path(self.path), self._handle:
            self._handle.flush()
            sync(self._handle.fileno())


class HashedFile:
    """A finished file, open for reading.

    It is read with system calls and not mapped into memory: a mapped file that another program truncates ends the
    process with SIGBUS.
    """

    def __init__(self, path: Path, num_bytes: int, hashes: NDArray[np.uint64]) -> None:
        """Open the file; it must have `num_bytes`, and `hashes` has one per block.

        Raises:
            Damage: see `open_file`, or it has another size.
        """
        self.path, self.num_bytes = path, num_bytes
        self._hashes = hashes
        self._unverified = bytearray(b"\1") * len(hashes)
        self._num_unverified = len(hashes)
        self._descriptor = open_file(path)
        weakref.finalize(self, os.close, self._descriptor)
        size = os.fstat(self._descriptor).st_size
        if size != num_bytes:
            raise Damage(f"{path.name} has {size:,} bytes instead of {num_bytes:,}")

    def read(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> bytes:
        """Return the bytes of several ranges, end to end.

        Raises:
            Damage: a block is not what was written, or cannot be read.
        """
        ranges = list(zip(starts.tolist(), stops.tolist(), strict=True))
        if self._num_unverified:
            find = self._unverified.find
            for start, stop in ranges:
                number, end = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES + 1
                while (number := find(1, number, end)) >= 0:
                    self.block(number)
        try:
            data = b"".join([os.pread(self._descriptor, stop - start, start) for start, stop in ranges])
        except OSError as error:
            raise damage_of(self.path, error) from None
        if len(data) != int((stops - starts).sum()):
            raise Damage(f"{self.path.name} was truncated while it was read")
        return data

    def blocks(self) -> Iterator[bytes]:
        """Yield the whole file, block by block.

        Raises:
            Damage: see `read`.
        """
        return map(self.block, range(len(self._hashes)))

    def block(self, number: int) -> bytes:
        """Read one block and verify it.

        Raises:
            Damage: see `read`.
        """
        start = number * BLOCK_BYTES
        try:
            data = os.pread(self._descriptor, min(BLOCK_BYTES, self.num_bytes - start), start)
        except OSError as error:
            raise damage_of(self.path, error) from None
        if content_hash(data) != int(self._hashes[number]):
            raise Damage(f"{self.path.name}: the {len(data):,} bytes from byte {start:,} on are not what was written")
        self._num_unverified -= self._unverified[number]
        self._unverified[number] = 0
        return data
