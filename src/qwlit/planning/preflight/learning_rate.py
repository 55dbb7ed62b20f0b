"""Rules about the learning rate and its schedule."""

from qwlit.optim.kinds import OPTIMIZERS
from qwlit.planning.preflight.rules import FAILED_RUN, GUIDE, PreflightFacts, Result, rule

BILLION = 10**9
HIGHEST_FULL, HIGHEST_FULL_LARGE, LARGE = 1e-4, 5e-5, 7 * BILLION
LORA_RANGE, FULL_RANGE = (1e-5, 5e-4), (1e-6, HIGHEST_FULL)


@rule("error", source=FAILED_RUN)
def full_lr(facts: PreflightFacts) -> Result:
    """Full fine-tuning at LoRA's learning rate can turn to NaN after thousands of normal steps."""
    lr = facts.highest_lr
    if not facts.trains_pretrained or lr <= HIGHEST_FULL:
        return None
    subject = f"optim.lr={lr:g}" if lr == facts.config.optim.lr else f"a group's learning rate of {lr:g}"
    return (
        f"{subject} is too high for full fine-tuning: pretrained weights diverge above {HIGHEST_FULL:g}",
        "set optim.lr=1e-5, or model.init=random to train from scratch",
    )


@rule("warning", source=FAILED_RUN)
def full_lr_large(facts: PreflightFacts) -> Result:
    """From 7B on, full fine-tuning needs a lower learning rate: the run that failed at step 3600 had 3e-4."""
    lr = facts.highest_lr
    # A model that is called 7B may have a few percent fewer parameters.
    if not facts.trains_pretrained or facts.num_parameters < 0.95 * LARGE:
        return None
    if not HIGHEST_FULL_LARGE < lr <= HIGHEST_FULL:
        return None
    size = f"{facts.num_parameters / BILLION:.1f}B"
    return f"optim.lr={lr:g} is high for full fine-tuning of {size} parameters", "set optim.lr between 1e-6 and 1e-5"


@rule("warning", source=GUIDE)
def lr_range(facts: PreflightFacts) -> Result:
    """Usual are 1e-5 to 5e-4 for LoRA, 1e-6 to 1e-4 for full fine-tuning: training is slow below, unstable above."""
    config = facts.config
    if config.model.init == "random" or not OPTIMIZERS[config.optim.name].has_adamw_lr_range:
        return None
    lowest, highest = LORA_RANGE if config.adapter.kind == "lora" else FULL_RANGE
    too_high = config.optim.lr > highest and config.adapter.kind == "lora"
    if config.optim.lr >= lowest and not too_high:
        return None
    sweep = "lora" if config.adapter.kind == "lora" else "full_sft"
    remedy = f"set optim.lr inside this range, or search it with `sweep sweep={sweep}`"
    return f"optim.lr={config.optim.lr:g} is outside {lowest:g} to {highest:g}", remedy


@rule("warning", source=GUIDE)
def warmup(facts: PreflightFacts) -> Result:
    """5 to 20 % of the run: the moments need steps before the peak, and enough steps must remain after the warm-up."""
    schedule = facts.schedule
    if schedule is None:
        return None
    share = schedule.warmup_steps / schedule.total_steps
    # Warm-up is rounded to whole steps, so a ratio of 0.05 may give a slightly smaller share.
    if 0.05 - 1 / schedule.total_steps <= share <= 0.2 + 1 / schedule.total_steps:
        return None
    message = f"{schedule.warmup_steps} steps of warm-up are {share:.0%} of the run's {schedule.total_steps}"
    if share >= 1:
        message += ": the learning rate never falls"
    return message, "set scheduler.warmup_ratio between 0.05 and 0.2"


@rule("warning", source="design: recipes with warm-up in steps")
def warmup_capped(facts: PreflightFacts) -> Result:
    """A recipe's warm-up steps are for long runs; a short run warms up for at most a fifth of its steps."""
    scheduler, schedule = facts.config.scheduler, facts.schedule
    if schedule is None:
        return None
    requested = scheduler.warmup_steps
    if requested is None or schedule.warmup_steps >= requested:
        return None
    typed = facts.as_typed("train.max_steps", "train.max_epochs")
    return (
        f"{typed}: " * bool(typed) + f"the default warm-up of {requested:,} steps is shortened to"
        f" {schedule.warmup_steps:,}, {scheduler.max_warmup_ratio:.0%} of the run's {schedule.total_steps:,} steps",
        "set scheduler.warmup_steps or scheduler.warmup_ratio for another warm-up",
    )
