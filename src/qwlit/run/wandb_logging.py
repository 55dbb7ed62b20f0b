"""Open the run on W&B before the training, and close it with the training's result."""

from collections.abc import Iterator
from contextlib import contextmanager

from qwlit.config.compose import as_tree
from qwlit.config.run import RunConfig
from qwlit.core.errors import QwlitError, reason_of
from qwlit.core.ranks import is_rank_zero
from qwlit.training.tracking.run_folder import FINISHED, RunFolder
from qwlit.training.tracking.wandb_run import WandbRun


@contextmanager
def logged_to_wandb(config: RunConfig, folder: RunFolder) -> Iterator[WandbRun | None]:
    """Yield a W&B run for the block to open (None without W&B or on other ranks); close it with the block's result."""
    if not config.logger.wandb or not is_rank_zero():
        yield None
        return
    run = WandbRun(config.logger, folder, as_tree(config))
    try:
        yield run
    except BaseException as raised:
        error = reason_of(raised)
        run.finish(error.exit_code if isinstance(error, QwlitError) else QwlitError.exit_code, error)
        raise
    run.finish(0)


def send_missing_to_wandb(config: RunConfig, folder: RunFolder) -> bool:
    """Send W&B what it lacks of a finished run; return whether it lacked anything."""
    if config.run.overwrite or not config.logger.wandb or folder.status != FINISHED:
        return False
    if WandbRun(config.logger, folder, {}).record.get("complete", True):
        return False
    with logged_to_wandb(config, folder) as run:
        assert run is not None
        run.open(continues=True)
    return True
