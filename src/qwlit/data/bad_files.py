"""Stop at a file in which almost nothing is good, before it is read to its end."""

from collections import Counter
from collections.abc import Sequence

from qwlit.core.errors import DataError, one_line
from qwlit.data.encoded_batch import EncodedBatch
from qwlit.data.sources import Source

MOST_BAD_ROWS = 1000
"""A file stops when it has so many quarantined rows, and so many times as many as good ones."""
REASONS_NAMED, LONGEST_NAMED = 3, 200


class BadFileCheck:
    """Counts the good and the quarantined rows of each source over successive batches."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._bad: Counter[int] = Counter()
        self._good: Counter[int] = Counter()
        self._first: dict[tuple[int, str], int] = {}
        """The first line for each of the first reasons of a source."""

    def add(self, batch: EncodedBatch) -> None:
        """Count a batch.

        Raises:
            DataError: almost all rows of a source are quarantined; with the first reasons.
        """
        self._good.update(batch.arrays["sources"].tolist())
        for row in batch.quarantined_rows:
            self._bad[row.source] += 1
            if self._bad[row.source] <= MOST_BAD_ROWS:
                self._first.setdefault((row.source, row.reason), row.line)
        for source, bad in self._bad.items():
            if bad >= MOST_BAD_ROWS * max(1, self._good[source]):
                raise DataError(self._refusal(source))

    def _refusal(self, source: int) -> str:
        reasons = [(line, reason) for (index, reason), line in self._first.items() if index == source]
        named = "; ".join(f"row {line}: {one_line(reason, LONGEST_NAMED)}" for line, reason in reasons[:REASONS_NAMED])
        bad, good = self._bad[source], self._good[source]
        return (
            f"data file '{self._sources[source]}': {bad:,} of its first {bad + good:,} rows cannot be used ({named});"
            " mend it, or take it out of the data"
        )
