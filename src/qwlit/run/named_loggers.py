"""Close the loggers beside W&B with the training's result."""

from collections.abc import Iterator
from contextlib import contextmanager

from qwlit.config.run import RunConfig
from qwlit.core.errors import Interrupted, Preempted, Pruned, reason_of
from qwlit.core.ranks import is_rank_zero
from qwlit.training.tracking.loggers import LOGGERS, NamedLogger
from qwlit.training.tracking.run_folder import RunFolder

STOPPED = (Interrupted, Preempted, Pruned, KeyboardInterrupt)


@contextmanager
def named_loggers(config: RunConfig, folder: RunFolder) -> Iterator[list[NamedLogger]]:
    """Yield the loggers of logger.use but W&B for the block to open (none on other ranks); close them at its end."""
    names = [name for name in dict.fromkeys(config.logger.use) if name in LOGGERS and is_rank_zero()]
    loggers = [LOGGERS[name](config.logger, folder) for name in names]
    try:
        yield loggers
    except BaseException as raised:
        for logger in loggers:
            logger.close("stopped" if isinstance(reason_of(raised), STOPPED) else "failed")
        raise
    for logger in loggers:
        logger.close("done")
