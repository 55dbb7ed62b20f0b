"""Rules about samples per step, gradient clipping and the number of steps."""

from qwlit.planning.preflight.rules import FAILED_RUN, GUIDE, PreflightFacts, Result, rule

SMALLEST_BATCH = 16
# Assumption: the result of fewer steps depends on chance.
FEWEST_STEPS = 50


@rule("warning", source=GUIDE)
def small_batch(facts: PreflightFacts) -> Result:
    """Gradients of fewer than 16 samples are noisy; accumulation makes a batch larger without more memory."""
    size = facts.config.train.global_batch_size
    if size >= SMALLEST_BATCH:
        return None
    return (
        f"train.global_batch_size={size}: fewer than {SMALLEST_BATCH} samples make noisy gradients",
        "set it to 16 or more",
    )


@rule("warning", source=f"{GUIDE}; {FAILED_RUN}")
def no_clip(facts: PreflightFacts) -> Result:
    """Without clipping, one bad batch can ruin a run."""
    if facts.config.train.max_grad_norm is not None:
        return None
    return "train.max_grad_norm=null: gradients are not clipped", "set train.max_grad_norm=1.0"


@rule("warning", source="assumption")
def few_steps(facts: PreflightFacts) -> Result:
    """The result of a few steps depends more on the order of the samples than on the data."""
    if facts.schedule is None or facts.schedule.total_steps >= FEWEST_STEPS:
        return None
    train, steps = facts.config.train, facts.schedule.total_steps
    # The run ends at the first limit that it reaches.
    is_limited_by_steps = train.max_steps is not None and (train.max_epochs is None or train.max_steps <= steps)
    if typed := facts.as_typed("train.max_steps" if is_limited_by_steps else "train.max_epochs"):
        return f"{typed}: the run has only {steps} steps", "raise it" + ("" if is_limited_by_steps else ", or add data")
    if is_limited_by_steps:
        return f"the run has only {steps} steps", "set train.max_steps"
    epochs = f"{train.max_epochs:g} epoch{'s' * (train.max_epochs != 1)}"
    return (
        f"in {epochs} over the data there are only {steps} steps of {train.global_batch_size} samples",
        f"add data, or set train.max_epochs above {train.max_epochs:g}",
    )
