"""Data files on disk, and SHA-256 digests of their content."""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwlit.core.disk import reason_of_disk, remedy_of
from qwlit.core.errors import DataError
from qwlit.core.files import write_json_atomic

JSON, TABLE, TEXT = "JSON", "table", "text"
KINDS = {".jsonl": JSON, ".json": JSON, ".parquet": TABLE, ".csv": TABLE, ".txt": TEXT}
COMPRESSED = ".gz"
# Assumption: gzip or Parquet reduces text to about a fifth of its size.
TYPICAL_COMPRESSION = 5
FREE_BYTES = 2**26
"""What is read of a file may expand to so much, whatever its size."""
MOST_EXPANSION = 500
"""What is read of a larger file may be so many times its size. Texts are 3 to 50 times, zeros 1,000 times."""
# A file changed so shortly before we hashed it may change again and keep the same time stamp: do not cache its digest.
RACY_SECONDS = 2.0


@dataclass(frozen=True)
class File:
    """One data file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def suffix(self) -> str:
        """Lower-case suffix of the format, without `.gz`."""
        name = self.path.name.lower().removesuffix(COMPRESSED)
        return Path(name).suffix

    @property
    def is_compressed(self) -> bool:
        return self.path.name.lower().endswith(COMPRESSED)

    @property
    def is_readable_kind(self) -> bool:
        return self.suffix in KINDS and not (self.is_compressed and self.suffix == ".parquet")

    @property
    def name(self) -> str:
        return self.path.name

    def num_bytes(self) -> int:
        return self.path.stat().st_size

    def estimated_bytes(self) -> float:
        return self.num_bytes() * (TYPICAL_COMPRESSION if self.is_compressed or self.suffix == ".parquet" else 1)

    def digest(self, cache_root: Path) -> str:
        """Return the SHA-256 of the content; `cache_root` keeps it, so an unchanged file is read only once."""
        try:
            if (known := self.known_digest(cache_root)) is not None:
                return known
            stat = self.path.stat()
            with self.path.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise DataError(
                f"data file '{self}' cannot be read: {reason_of_disk(error)}; {remedy_of(error)}"
            ) from error
        if time.time() - stat.st_ctime > RACY_SECONDS:
            # Without it the file is hashed again at the next start.
            with suppress(OSError):
                cache_root.mkdir(parents=True, exist_ok=True)
                write_json_atomic(self._cache_entry(cache_root), {"stamp": _stamp(stat), "sha256": digest})
        return digest

    def known_digest(self, cache_root: Path) -> str | None:
        """Return the cached digest; None if the file is new or has changed."""
        try:
            entry = json.loads(self._cache_entry(cache_root).read_text(encoding="utf-8"))
            return str(entry["sha256"]) if entry["stamp"] == _stamp(self.path.stat()) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _cache_entry(self, cache_root: Path) -> Path:
        return cache_root / f"{hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:32]}.digest"


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
