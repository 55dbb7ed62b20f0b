"""Read the rows of all sources in order. Each row becomes a `Row`, or a `QuarantinedRow` with the reason."""

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import BinaryIO, cast

from qwlit.core.disk import reason_of_disk, remedy_of
from qwlit.core.errors import DataError
from qwlit.data.csv_files import read_csv
from qwlit.data.files import File
from qwlit.data.gzip_file import LimitedGzipFile
from qwlit.data.hub import read_data_set
from qwlit.data.json_files import read_json, read_json_lines
from qwlit.data.parquet_files import KNOWN_COLUMNS, read_parquet
from qwlit.data.rows import QuarantinedRow, Row
from qwlit.data.sources import Source
from qwlit.data.text_files import read_text

BUFFER_BYTES = 2**20
READERS = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".txt": read_text,
}


class RowReader:
    """Yields every row of every source in order; empty lines are not rows."""

    def __init__(self, sources: Sequence[Source], columns: Mapping[str, str] | None = None) -> None:
        """`columns`: see `data.columns`; the readers of tables load these columns too."""
        self._sources = sources
        wanted = KNOWN_COLUMNS.union((columns or {}).values())
        self._readers = READERS | {".parquet": partial(read_parquet, wanted=wanted)}
        self.num_bytes = sum(source.num_bytes() for source in sources if isinstance(source, File))
        self.estimated_bytes = sum(source.estimated_bytes() for source in sources)
        """Size of the rows after decompression, in bytes."""
        self._finished_bytes = 0
        self._handle: BinaryIO | None = None

    @property
    def num_bytes_read(self) -> int:
        """Bytes read so far, counted on disk (compressed)."""
        return self._finished_bytes + (self._handle.tell() if self._handle else 0)

    def __iter__(self) -> Iterator[Row | QuarantinedRow]:
        """Yield the rows.

        Raises:
            DataError: a file cannot be read to its end, or has no rows.
        """
        for index, source in enumerate(self._sources):
            empty = True
            for row in self._read(index, source) if isinstance(source, File) else read_data_set(index, source):
                empty = False
                yield row
            if empty:
                raise DataError(f"data file '{source}' has no rows")

    def _read(self, source_index: int, file: File) -> Iterator[Row | QuarantinedRow]:
        line = 0
        try:
            if file.suffix != ".parquet" and not file.num_bytes():
                # Also a link to a file in /proc: it has no size, but the environment variables as its content.
                return
            with file.path.open("rb", buffering=BUFFER_BYTES) as raw:
                self._handle = raw
                handle = _unpacked(raw, file) if file.is_compressed else raw
                for row in self._readers[file.suffix](source_index, file, handle):
                    line = row.line
                    yield row
                self._handle = None
                self._finished_bytes += file.num_bytes()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"data file '{file}' is damaged after row {line}: {error}; make it again") from None
        except OSError as error:
            raise DataError(f"data file '{file}' cannot be read: {reason_of_disk(error)}; {remedy_of(error)}") from None


def _unpacked(raw: BinaryIO, file: File) -> BinaryIO:
    return cast(BinaryIO, LimitedGzipFile(raw, file.num_bytes(), str(file)))
