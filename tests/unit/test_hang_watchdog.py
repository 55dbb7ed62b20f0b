"""Which rank the others wait for."""

from pathlib import Path

import pytest
import torch

from qwlit.training.resilience.hang_watchdog import Heartbeat, _main_thread_position, name_missing_ranks


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


def position_seen_inside(file: Path) -> tuple[str, bool]:
    """Look at the main thread while it runs a function of `file`."""
    found: list[tuple[str, bool]] = []
    program = "def synchronize(look): look()\nsynchronize(look)"
    exec(compile(program, str(file), "exec"), {"look": lambda: found.append(_main_thread_position())})
    return found[0]


@pytest.mark.parametrize(
    ("file", "waits"),
    [
        ("cuda/streams.py", True),  # an event that a collective's kernel holds up
        ("distributed/distributed_c10d.py", True),
        ("autograd/graph.py", True),
        ("nn/modules/linear.py", False),
    ],
)
def test_a_main_thread_waits_for_others_inside_streams_collectives_and_the_backward_pass(file, waits):
    assert position_seen_inside(Path(torch.__file__).parent / file)[1] is waits
