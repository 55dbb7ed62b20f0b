"""Limit how often a run is requeued without a new step: else a job that only starts and stops would do so for ever."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qwlit.core.disk import disk_line
from qwlit.core.errors import Preempted, QwlitError
from qwlit.core.files import read_json, write_json_atomic
from qwlit.core.ranks import is_rank_zero
from qwlit.core.slurm import job_id
from qwlit.core.streams import say
from qwlit.training.tracking.run_folder import RunFolder


@contextmanager
def counting_requeues(folder: RunFolder, progress: Callable[[], int], most: int) -> Iterator[None]:
    """Count the requeue when the block is preempted, and refuse too many without progress (see `count_requeue`)."""
    try:
        yield
    except Preempted as error:
        if error.requeue and job_id() is not None and is_rank_zero():
            count_requeue(folder, progress(), most)
        raise


def count_requeue(folder: RunFolder, progress: int, most: int) -> None:
    """Record that the job is about to be requeued after `progress` steps.

    Raises:
        QwlitError: the job was already requeued `most` times after this many steps.
    """
    # Beside the run folder, which may not exist yet when a start is preempted. The name has the job id, because the
    # tasks of an array share the folder of a sweep.
    file = folder.lock_file.with_name(f"{folder.lock_file.name}.requeues-{job_id()}")
    earlier = read_json(file)
    times = earlier.get("times", 0) + 1 if earlier.get("progress") == progress else 1
    if times > most:
        raise QwlitError(
            f"{folder.path} was requeued {most} times at step {progress} without a new step; it is not requeued again."
            " Raise slurm.time, or slurm.signal_seconds if it was killed while saving"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, {"progress": progress, "times": times})
    except OSError as error:
        # The job is still to be requeued.
        say(f"qwlit: the requeue is not counted: {disk_line(error)}")
