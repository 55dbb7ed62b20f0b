"""A .jsonl file of a run that grows by a record at a time, and whose disk may be full or gone for a while."""

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwlit.core.disk import naming_path


class RecordFile:
    """Appends records. Those that cannot be written are kept, and written before the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0
        """Of the file after the last record that this process has written; 0 before the first."""
        self._failed: tuple[int, int, int] | None = None
        """Device, inode and size of the file before a write that failed: what that left behind is half a record."""
        self._lock = threading.Lock()
        self.kept: list[str] = []
        """Lines that are not in the file yet."""

    def append(self, record: dict[str, Any]) -> bool:
        """Write the lines that are kept, and this record; return whether the file still had the earlier ones.

        Raises:
            OSError: it cannot be written; the record is kept.
        """
        with self._lock:
            self.kept.append(json.dumps(record, ensure_ascii=False) + "\n")
        return self.write_kept()

    def write_kept(self) -> bool:
        """Write the lines that are kept; return whether the file still had the earlier records.

        Raises:
            OSError: it cannot be written; the lines are kept.
        """
        with self._lock:
            is_whole = True
            # The first line alone: a file that cannot be written for long costs one line at each call, not all of them.
            for end in (1, None):
                if lines := self.kept[:end]:
                    is_whole &= self._write("".join(lines).encode("utf-8"))
                    del self.kept[:end]
            return is_whole

    def _write(self, data: bytes) -> bool:
        with naming_path(self._path), self._path.open("ab", buffering=0) as handle:
            status = os.fstat(handle.fileno())
            now = (status.st_dev, status.st_ino, status.st_size)
            if self._failed and self._failed[:2] == now[:2] and self._failed < now:
                handle.truncate(self._failed[2])
                now = self._failed
            self._failed = now
            is_whole = now[2] >= self._size
            # Where somebody has cut the file off, its last line may have no end.
            rest = memoryview(data if is_whole or not now[2] else b"\n" + data)
            while rest:
                rest = rest[handle.write(rest) :]
            size = os.fstat(handle.fileno()).st_size
        # A file server may report a full disk only when the file is closed.
        self._failed, self._size = None, size
        return is_whole

    def keep(self, lines: Iterable[str]) -> None:
        """Keep those of earlier lines that the file lacks, each once, to write them before the next record."""
        kept = set(self.kept)
        self.kept += [line for line in self.lacking(lines) if line not in kept]

    def lacking(self, lines: Iterable[str]) -> list[str]:
        """Return those lines that the file lacks."""
        if not (lines := list(lines)):
            return []
        text = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
        # splitlines() would also split at U+2028 and others, which may be inside a JSON string.
        written = {line + "\n" for line in text.split("\n")}
        return [line for line in lines if line not in written]
