"""How often a run was requeued without one step more: a job that only starts and stops would do so for ever."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qwlit.core.errors import Preempted, QwlitError
from qwlit.core.files import read_json, write_json_atomic
from qwlit.core.ranks import is_rank_zero
from qwlit.core.slurm import job_id
from qwlit.training.tracking.run_folder import RunFolder


@contextmanager
def counting_requeues(folder: RunFolder, progress: Callable[[], int], most: int) -> Iterator[None]:
    """While the block runs, let it be requeued only so often without progress (see `count_requeue`)."""
    try:
        yield
    except Preempted as error:
        if error.requeue and job_id() is not None and is_rank_zero():
            count_requeue(folder, progress(), most)
        raise


def count_requeue(folder: RunFolder, progress: int, most: int) -> None:
    """Note that the job is about to be requeued after `progress` steps.

    Raises:
        QwlitError: it has been `most` times, with as many steps.
    """
    # Beside the folder: it must outlast a start that never came to making one. Tasks of an array share a sweep's one.
    file = folder.lock_file.with_name(f"{folder.lock_file.name}.requeues-{job_id()}")
    noted = read_json(file)
    times = noted.get("times", 0) + 1 if noted.get("progress") == progress else 1
    if times > most:
        raise QwlitError(
            f"{folder.path} was requeued {most} times at step {progress} without one step more; it is left."
            " Raise slurm.time, or slurm.signal_seconds if it was killed while saving"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, {"progress": progress, "times": times})
