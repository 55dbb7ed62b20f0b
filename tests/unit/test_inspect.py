import numpy as np
from numpy.typing import NDArray

from qwlit.data.inspect import length_histogram, spans


class Lengths:
    """Samples of which only the lengths are asked."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        return self._lengths[ids]


def test_the_histogram_counts_every_sample_once_by_doubling_lengths() -> None:
    lengths = [2, 16, 17, 32, 33, 300, 300]
    histogram = length_histogram(Lengths(lengths))  # type: ignore[arg-type]
    assert histogram == [(1, 16, 2), (17, 32, 2), (33, 64, 1), (65, 128, 0), (129, 256, 0), (257, 512, 2)]
    assert length_histogram(Lengths([40])) == [(33, 64, 1)]  # type: ignore[arg-type]


def test_spans_part_where_the_mask_changes_and_around_control_tokens() -> None:
    found = list(spans([9, 1, 2, 3, 9, 9, 4], [0, 0, 1, 1, 1, 1, 0], {9}))
    assert [(s.start, s.ids, s.kind, s.supervised) for s in found] == [
        (0, (9,), "control", False),
        (1, (1,), "text", False),
        (2, (2, 3), "text", True),
        (4, (9,), "control", True),
        (5, (9,), "control", True),
        (6, (4,), "text", False),
    ]
