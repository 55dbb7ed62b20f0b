"""How many samples a step has, and how many steps a run."""

from qwlit.planning.preflight.rules import GUIDE, STORY, PreflightFacts, Said, rule

SMALLEST_BATCH = 16
# Assumption: fewer steps than this move a model by chance.
FEWEST_STEPS = 50


@rule("warning", source=GUIDE)
def small_batch(facts: PreflightFacts) -> Said:
    """Gradients of fewer than 16 samples are noisy; accumulation makes a batch larger at no memory."""
    size = facts.config.train.global_batch_size
    if size >= SMALLEST_BATCH:
        return None
    return (
        f"train.global_batch_size={size}: fewer than {SMALLEST_BATCH} samples make noisy steps",
        "set it to 16 or more",
    )


@rule("warning", source=f"{GUIDE}; {STORY}")
def no_clip(facts: PreflightFacts) -> Said:
    """One bad batch without clipping can undo a run."""
    if facts.config.train.max_grad_norm is not None:
        return None
    return "train.max_grad_norm=null: gradients are not clipped", "set train.max_grad_norm=1.0"


@rule("warning", source="assumption")
def few_steps(facts: PreflightFacts) -> Said:
    """A handful of steps says more about the order of samples than about the data."""
    if facts.schedule is None or facts.schedule.total_steps >= FEWEST_STEPS:
        return None
    limit = "train.max_steps" if facts.config.train.max_steps else "train.max_epochs"
    return f"the run has {facts.schedule.total_steps} steps", f"raise {limit}, or get more data"
