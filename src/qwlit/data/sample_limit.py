"""Stop reading at `data.max_samples`: keep exactly the first samples, however the rows are batched."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from qwlit.core.errors import DataError
from qwlit.data.encoded_batch import EncodedBatch
from qwlit.data.encoding import RowEncoder
from qwlit.data.rows import QuarantinedRow, Row

Rows = list[Row | QuarantinedRow]


class SampleLimit:
    """Counts the samples of successive batches, and cuts the batch that has the last wanted sample behind its row."""

    def __init__(self, encoder: RowEncoder) -> None:
        self._encoder = encoder
        self._num_left = encoder.config.max_samples
        self._batches: deque[Rows] = deque()
        """Batches of rows that are read and not cut yet; workers read ahead."""
        self._digests: set[int] = set()
        self._source: Iterator[Rows] = iter(())
        self._has_cut = False

    @property
    def reached(self) -> bool:
        return self._num_left == 0

    def leaves_rows(self) -> bool:
        """Whether rows follow that of the last wanted sample, also where they cannot be read."""
        if not self.reached or self._has_cut or self._batches:
            return self.reached
        try:
            return next(self._source, None) is not None
        except DataError:
            return True

    def remember(self, batches: Iterable[Rows]) -> Iterator[Rows]:
        """Yield the batches, and keep each until `cut` gets its samples."""
        self._source = iter(batches)
        for rows in self._source:
            self._batches.append(rows)
            yield rows

    def cut(self, batch: EncodedBatch) -> EncodedBatch:
        """Return the next batch up to the last wanted sample, as if the data ended with that sample's row."""
        rows = self._batches.popleft()
        if self._num_left is None:
            return batch
        counted = np.flatnonzero(self._is_counted(batch))
        if len(counted) < self._num_left:
            self._num_left -= len(counted)
            return batch
        last = counted[self._num_left - 1]
        self._num_left = 0
        num_rows = int(np.searchsorted(np.cumsum(batch.samples_per_row), last, side="right")) + 1
        # Encode the rows again, without those that follow: so counts, remarks and quarantine are of these rows alone.
        self._has_cut = num_rows < len(rows)
        cut = self._encoder(rows[:num_rows])
        cut.drop_samples_after(int(last) + 1)
        return cut

    def _is_counted(self, batch: EncodedBatch) -> list[bool]:
        """Return for each sample whether it counts: with `data.drop_duplicates` only the first copy does."""
        digests = batch.arrays["digests"].tolist()
        if not self._encoder.config.drop_duplicates:
            return [True] * len(digests)
        is_counted = []
        for digest in digests:
            is_counted.append(digest not in self._digests)
            self._digests.add(digest)
        return is_counted
