"""Weight decay, dropout, and what is trained."""

from qwlit.planning.preflight.rules import GUIDE, PreflightFacts, Said, rule

HIGHEST_DECAY, HIGHEST_DROPOUT, HIGHEST_LORA_DROPOUT = 0.2, 0.2, 0.05


@rule("warning", source=GUIDE)
def weight_decay(facts: PreflightFacts) -> Said:
    """0.01 to 0.1 when all weights are trained, up to 0.2 against overfitting; LoRA needs next to none."""
    decay, lora = facts.config.optim.weight_decay, facts.config.adapter.kind == "lora"
    if decay > HIGHEST_DECAY:
        return f"optim.weight_decay={decay:g} is above {HIGHEST_DECAY}", "set it between 0.01 and 0.1"
    if decay == 0 and not lora:
        return "optim.weight_decay=0 while all weights are trained", "set it between 0.01 and 0.1"
    return None


@rule("warning", source=GUIDE)
def lora_dropout(facts: PreflightFacts) -> Said:
    """An adapter has few weights of its own: dropout up to 0.05, usually none, and none inside the frozen base."""
    dropout = facts.config.dropout
    if facts.config.adapter.kind == "none":
        return None
    inside = max(dropout.attention, dropout.feed_forward, dropout.residual, dropout.embedding)
    if inside:
        return f"dropout of {inside:g} inside a frozen model disturbs what the adapter builds on", "set dropout=lora"
    if dropout.lora <= HIGHEST_LORA_DROPOUT:
        return None
    return f"dropout.lora={dropout.lora:g} is above {HIGHEST_LORA_DROPOUT}", "lower it"


@rule("warning", source=GUIDE)
def high_dropout(facts: PreflightFacts) -> Said:
    """0.1 to 0.2 is for overfitting; the published checkpoints were trained with none."""
    dropout = facts.config.dropout
    highest = max(dropout.attention, dropout.feed_forward, dropout.residual, dropout.embedding)
    if facts.config.adapter.kind == "lora" or highest <= HIGHEST_DROPOUT:
        return None
    return f"dropout of {highest:g} is above {HIGHEST_DROPOUT}", "lower it, or set dropout=none"


@rule("warning", source="qwlit")
def adapter_on_random(facts: PreflightFacts) -> Said:
    """An adapter is exported alone, and random weights can be had nowhere else."""
    if facts.config.adapter.kind == "none" or facts.config.model.init != "random":
        return None
    return (
        "an adapter on random weights: export/ holds the adapter alone",
        "set recipe=full_sft, or model.init=pretrained",
    )
