"""Rules about validation, checkpoints, early stopping and profiling."""

from qwlit.planning.preflight.rules import FAILED_RUN, GUIDE, PreflightFacts, Result, rule
from qwlit.training.config import CheckpointConfig, ValidationConfig

USUAL_PATIENCE = range(3, 6)
MOST_UNSAVED_STEPS = 2000
"""More steps than these are too many to lose (assumption)."""


@rule("warning", source=f"{GUIDE}; {FAILED_RUN}")
def no_validation(facts: PreflightFacts) -> Result:
    """The training loss falls even while a model overfits; only other data show it."""
    validation = facts.config.validation
    if facts.data is not None and not facts.data.has_validation:
        typed = facts.as_typed("validation.every_steps", "data.path")
        return f"{typed}: " * bool(typed) + "there is no validation set", "set data.val_fraction=0.05, or data.val_path"
    if _occurs_before_end(facts, validation):
        return None
    if validation.every_steps is None:
        typed = facts.as_typed("validation.each_epoch", "validation.every_steps")
        return f"{typed}: " * bool(typed) + "the run never validates", "set validation.every_steps"
    typed = facts.as_typed("train.max_steps", "train.max_epochs")
    return (
        f"{typed}: " * bool(typed) + f"validation.every_steps={validation.every_steps} is not reached before the end",
        "lower it, or set validation.each_epoch=true",
    )


@rule("warning", source=FAILED_RUN)
def no_checkpoints(facts: PreflightFacts) -> Result:
    """A run that is killed or in trouble goes back to a checkpoint; without one it starts from the beginning."""
    checkpoint, epochs = facts.config.checkpoint, facts.config.train.max_epochs
    if _occurs_before_end(facts, checkpoint):
        if checkpoint.every_steps or facts.schedule is None or epochs is None:
            return None
        steps = int(facts.schedule.total_steps / max(1, epochs))
        if steps <= MOST_UNSAVED_STEPS:
            return None
        return f"the run saves only every {steps:,} steps, at the end of each epoch", "set checkpoint.every_steps=500"
    return "the run saves only at its end", "set checkpoint.each_epoch=true or checkpoint.every_steps"


@rule("warning", source="qwlit")
def slow_save(facts: PreflightFacts) -> Result:
    """Slurm ends a job `slurm.signal_seconds` after its signal; the checkpoint must be on the disk by then."""
    seconds, notice = facts.saves.seconds, facts.config.slurm.signal_seconds
    if seconds <= notice:
        return None
    size = f"a checkpoint of {facts.saves.num_bytes / 1e9:.0f} GB takes about {seconds:.0f} s to write"
    return f"{size}, and slurm.signal_seconds={notice}", f"in Slurm jobs, set slurm.signal_seconds={2 * seconds:.0f}"


def _occurs_before_end(facts: PreflightFacts, settings: ValidationConfig | CheckpointConfig) -> bool:
    """Whether the run validates or saves before its end."""
    if settings.each_epoch or settings.every_steps is None:
        return settings.each_epoch
    return facts.schedule is None or settings.every_steps < facts.schedule.total_steps


@rule("warning", source=GUIDE)
def patience(facts: PreflightFacts) -> Result:
    """A patience below three validations reacts to noise; above five it only adds overfitting."""
    config = facts.config
    patience = config.validation.early_stopping_patience
    # A run with train.max_steps instead of max_epochs has a length that the user chose.
    if patience in USUAL_PATIENCE or config.train.max_epochs is None or (facts.data and not facts.data.has_validation):
        return None
    return f"validation.early_stopping_patience={'null' if patience is None else patience}", "set it between 3 and 5"


@rule("warning", source="qwlit")
def profile_beyond(facts: PreflightFacts) -> Result:
    """The profiler cannot trace steps that the run does not have."""
    steps, schedule = facts.config.profile.steps, facts.schedule
    if steps is None or schedule is None or steps[1] <= schedule.total_steps:
        return None
    return f"profile.steps={list(steps)} exceeds the run's {schedule.total_steps} steps", "lower profile.steps"


@rule("warning", source=GUIDE)
def greedy_thinking(facts: PreflightFacts) -> Result:
    """Thinking models repeat themselves if they answer greedily; the guide samples at temperature 0.6."""
    data = facts.config.data
    if not data.exact_match or data.thinking != "keep" or facts.config.model.init == "random":
        return None
    return (
        f"data.exact_match={data.exact_match} answers greedily, and data.thinking=keep lets the model think",
        "evaluate thinking with sampled answers, or set data.thinking=drop",
    )
