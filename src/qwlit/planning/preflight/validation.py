"""Whether anybody will notice: validation, checkpoints, patience, and what is shown."""

from qwlit.planning.preflight.rules import GUIDE, STORY, PreflightFacts, Said, rule
from qwlit.training.checkpointing.config import CheckpointConfig
from qwlit.training.config import ValidationConfig

PATIENCE = range(3, 6)


@rule("warning", source=f"{GUIDE}; {STORY}")
def no_validation(facts: PreflightFacts) -> Said:
    """Training loss falls while a model overfits; only other data tell."""
    validation = facts.config.validation
    if facts.data is not None and not facts.data.has_validation:
        return "there is no validation set", "set data.val_fraction=0.05, or data.val_path"
    if not _happens(facts, validation):
        return "validation.each_epoch and every_steps have only the end validated", "set one of them"
    return None


@rule("warning", source=STORY)
def no_checkpoints(facts: PreflightFacts) -> Said:
    """A run that dies goes back to its last checkpoint; without one it is lost."""
    if _happens(facts, facts.config.checkpoint):
        return None
    return "checkpoint.each_epoch and every_steps have only the end saved", "set one of them"


def _happens(facts: PreflightFacts, rhythm: ValidationConfig | CheckpointConfig) -> bool:
    """Tell whether it is due before the end."""
    if rhythm.each_epoch or rhythm.every_steps is None:
        return rhythm.each_epoch
    return facts.schedule is None or rhythm.every_steps < facts.schedule.total_steps


@rule("warning", source=GUIDE)
def patience(facts: PreflightFacts) -> Said:
    """Three to five validations without a better loss: fewer stop at noise, more train on memory of the data."""
    config = facts.config
    asked = config.validation.early_stopping_patience
    # Runs of so many steps are as long as they were meant to be.
    if asked in PATIENCE or config.train.max_epochs is None or (facts.data and not facts.data.has_validation):
        return None
    return f"validation.early_stopping_patience={'null' if asked is None else asked}", "set it between 3 and 5"


@rule("warning", source="qwlit")
def profile_beyond(facts: PreflightFacts) -> Said:
    """Steps that a run does not have cannot be traced."""
    steps, schedule = facts.config.profile.steps, facts.schedule
    if steps is None or schedule is None or steps[1] <= schedule.total_steps:
        return None
    return f"profile.steps={list(steps)} reaches beyond the run's {schedule.total_steps} steps", "lower it"


@rule("warning", source=GUIDE)
def greedy_thinking(facts: PreflightFacts) -> Said:
    """Thinking models repeat themselves when they answer greedily; the guide samples at 0.6."""
    data = facts.config.data
    if not data.exact_match or data.thinking != "keep" or facts.config.model.init == "random":
        return None
    return (
        f"data.exact_match={data.exact_match} answers greedily, and data.thinking=keep lets the model think",
        "judge thinking by sampled answers, or set data.thinking=drop",
    )
