"""Rename columns: `data.columns` maps a key that a format reads to the file's own column."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwlit.core.errors import ConfigError, DataError, nearest
from qwlit.data.config import RowFormat
from qwlit.data.formats import READ_KEYS
from qwlit.data.rows import Document, Row
from qwlit.data.sources import Source
from qwlit.data.unread import has_value

NAMES_OF_OTHERS = {"query": "prompt"}
"""ms-swift's name of a key, and the name here."""
NAMED = 20
"""An error names at most this many columns of a file."""


def check_columns(columns: Mapping[str, str], row_format: RowFormat) -> None:
    """Check that the format reads the keys, or with `auto` any format.

    Raises:
        ConfigError: for the first key that is not read.
    """
    read = set().union(*READ_KEYS.values()) if row_format == "auto" else READ_KEYS[row_format]
    for key, column in columns.items():
        if key in read:
            continue
        if column in read:
            raise ConfigError(f"data.columns: write {{{column}: {key}}}; the file's column is on the right")
        who = "no format reads" if row_format == "auto" else f"data.format={row_format} does not read"
        hint = nearest(NAMES_OF_OTHERS.get(key, key), read) or f" Known: {', '.join(sorted(read))}."
        raise ConfigError(f"data.columns: {who} '{key}'.{hint}")


@dataclass(frozen=True)
class RenamedRow:
    """A row as if its file had the names that the formats read."""

    content: dict[str, Any] | Document
    unread: tuple[str, ...] = ()
    """Columns with a value that no parser sees: the reader did not load them, or another column has their name now."""
    missing: str = ""
    """The end of an error message: the first column that the row does not have; empty if it has all."""


class ColumnRenamer:
    """Renames the columns of rows, and collects which columns the rows of each source have."""

    def __init__(self, columns: Mapping[str, str] | None) -> None:
        self._columns = columns or {}
        self.found: dict[int, set[str]] = {}
        """Index of a source → the columns of its rows: all that are renamed, and some others."""

    def __call__(self, row: Row) -> RenamedRow:
        """Rename the row's columns, as pandas' `DataFrame.rename` would; a column that had a new name is left out.

        Raises:
            RowError: see `Row.value`.
        """
        content, columns = row.value(), self._columns
        if not columns:
            return RenamedRow(content, row.unread_columns)
        old = {} if isinstance(content, Document) else content
        found = self.found.setdefault(row.source, set())
        found.update(columns.values() & old.keys())
        found.update([*old, *row.unread_columns][: max(0, NAMED - len(found))])
        replaced = [key for key in columns if key not in columns.values() and has_value(old.get(key))]
        lacking = next(((key, column) for key, column in columns.items() if column not in old), None)
        missing = f"; it has no '{lacking[1]}', which data.columns reads as '{lacking[0]}'" if lacking else ""
        if not isinstance(content, Document):
            kept = {key: value for key, value in old.items() if key not in columns and key not in columns.values()}
            content = kept | {key: old[column] for key, column in columns.items() if column in old}
        return RenamedRow(content, (*row.unread_columns, *replaced), missing)


def check_found(columns: Mapping[str, str], sources: Sequence[Source], found: Mapping[int, Collection[str]]) -> None:
    """Check that each column is in some row of every source that has rows.

    Raises:
        DataError: naming the file, the column, and the columns that the file has.
    """
    for index, names in sorted(found.items()):
        for key, column in columns.items():
            if column not in names:
                existing = ", ".join(map(repr, sorted(names))) or "none"
                raise DataError(
                    f"{sources[index]}: no row has the column '{column}', which data.columns reads as '{key}';"
                    f" columns here: {existing}.{nearest(column, names)} data.columns is for all files: rename the"
                    " columns in this one"
                )
