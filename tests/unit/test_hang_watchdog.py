"""Which rank the others wait for."""

import pytest

from qwlit.training.resilience.hang_watchdog import Heartbeat, name_missing_ranks


def beat(step: int, place: str, *, waits: bool) -> Heartbeat:
    return Heartbeat(7, "node", step, place, waits)


WAITS, READS = beat(5, "module.py:132 (_backward)", waits=True), beat(5, "batches.py:60 (sample)", waits=False)
BEHIND = beat(4, "module.py:132 (_backward)", waits=True)


@pytest.mark.parametrize(
    ("beats", "silent", "said"),
    [
        ([WAITS, WAITS, READS, WAITS], set(), "rank 2 (node) is at step 5, batches.py:60 (sample)"),
        ([WAITS, BEHIND, READS], set(), "rank 1 (node) is at step 4, module.py:132 (_backward)"),
        ([WAITS, READS, WAITS], {0}, "rank 0 (node) stopped sending heartbeats at step 5, module.py:132 (_backward)"),
    ],
)
def test_the_missing_rank_is_the_silent_one_or_one_behind_or_one_that_does_not_wait(beats, silent, said):
    assert name_missing_ranks(dict(enumerate(beats)), silent) == said


def test_where_all_wait_or_none_does_all_are_told():
    assert name_missing_ranks({0: WAITS, 1: WAITS}, set()).count("rank ") == 2
    assert name_missing_ranks({0: READS, 1: READS}, set()).count("rank ") == 2
