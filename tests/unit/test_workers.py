import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from qwlit.core.errors import DataError
from qwlit.data.workers import map_in_order, num_cores


def square(number: int) -> tuple[int, int]:
    if number == 66:
        raise DataError("rows.jsonl:66: no sense in it")
    if number == 77:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number, os.getpid()


def square_in_company(folder: Path, number: int) -> tuple[int, int]:
    """The first item is done only when the second is, which another process must do."""
    (folder / str(number)).touch()
    for _ in range(6000):
        if number or (folder / "1").exists():
            return square(number)
        time.sleep(0.01)
    raise TimeoutError("there is no other process")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_worker_is_this_process_and_takes_items_as_they_are_asked_for(num_workers: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(1, 5):
            taken.append(number)
            yield number

    results = map_in_order(square, items(), num_workers)
    assert next(results) == (1, os.getpid())
    assert taken == [1]
    assert [result for result, _ in results] == [4, 9, 16]


def test_several_workers_keep_the_order_and_few_items_wait(tmp_path: Path) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    squares, processes = [], set()
    for result, process in map_in_order(partial(square_in_company, tmp_path), items(), 2):
        squares.append(result)
        processes.add(process)
        assert len(taken) - len(squares) <= 2 * 2
    assert squares == [number * number for number in range(40)]
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_an_exception_in_a_worker_arrives_where_its_result_would_have() -> None:
    results = map_in_order(square, [1, 2, 66, 3], 2)
    assert [next(results)[0] for _ in range(2)] == [1, 4]
    with pytest.raises(DataError, match=r"^rows\.jsonl:66: no sense in it$"):
        next(results)


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^a tokenizing process was killed; is there enough memory\?$"):
        list(map_in_order(square, [1, 77, *range(2, 30)], 2))


def test_leaving_early_ends_the_workers() -> None:
    results = map_in_order(square, range(1, 60), 2)
    _, process = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_an_error_of_the_items_ends_the_workers_and_arrives() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("data file 'rows.jsonl' is damaged")

    with pytest.raises(DataError, match="is damaged"):
        list(map_in_order(square, items(), 2))


def test_this_process_has_cores() -> None:
    assert num_cores() >= 1


IGNORING = """
import sys
from qwlit.data.batches import train_loader

class Items:
    def __getitem__(self, step): return step
    def __len__(self): return 100

iterator = iter(train_loader(Items(), start_step=0, total_steps=100, num_workers=2, pin_memory=False))
next(iterator)
# Something keeps the iterator until the end, as the traceback of an interrupted run may.
sys.kept = iterator
"""


def test_a_process_ends_although_its_workers_ignore_signals_and_nobody_ends_them() -> None:
    subprocess.run([sys.executable, "-c", IGNORING], timeout=120, check=True)
