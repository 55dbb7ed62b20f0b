"""Rules about weight decay, dropout and adapters."""

from qwlit.model.config import AdapterConfig
from qwlit.planning.preflight.rules import GUIDE, PreflightFacts, Result, rule

HIGHEST_WEIGHT_DECAY, HIGHEST_DROPOUT, HIGHEST_LORA_DROPOUT = 0.2, 0.2, 0.05


@rule("warning", source=GUIDE)
def weight_decay(facts: PreflightFacts) -> Result:
    """0.01 to 0.1 if all weights are trained, up to 0.2 against overfitting; LoRA needs almost none."""
    value, lora = facts.config.optim.weight_decay, facts.config.adapter.kind == "lora"
    if value > HIGHEST_WEIGHT_DECAY:
        return f"optim.weight_decay={value:g} is above {HIGHEST_WEIGHT_DECAY}", "set it between 0.01 and 0.1"
    if value == 0 and not lora:
        return "optim.weight_decay=0, but all weights are trained", "set it between 0.01 and 0.1"
    return None


@rule("warning", source=GUIDE)
def lora_dropout(facts: PreflightFacts) -> Result:
    """An adapter has few weights: use dropout of at most 0.05, usually none, and none inside the frozen base."""
    dropout = facts.config.dropout
    if facts.config.adapter.kind == "none":
        return None
    inside = max(dropout.attention, dropout.feed_forward, dropout.residual, dropout.embedding)
    if inside:
        return f"dropout of {inside:g} inside the frozen base disturbs the adapter's input", "set dropout=lora"
    if dropout.lora <= HIGHEST_LORA_DROPOUT:
        return None
    return f"dropout.lora={dropout.lora:g} is above {HIGHEST_LORA_DROPOUT}", "lower dropout.lora"


@rule("warning", source="LLaMA-Factory, whose alpha is twice the rank unless it is given")
def lora_scale(facts: PreflightFacts) -> Result:
    """Adapters are scaled by alpha / rank, which acts like the learning rate; another rank alone changes it."""
    adapter, usual = facts.config.adapter, AdapterConfig()
    scale, usual_scale = adapter.alpha / adapter.rank, usual.alpha / usual.rank
    is_chosen = "adapter.rank" not in facts.typed or "adapter.alpha" in facts.typed
    if is_chosen or adapter.use_rslora or scale == usual_scale:
        return None
    return (
        f"adapter.alpha stays {adapter.alpha:g} for adapter.rank={adapter.rank}: adapters are scaled by {scale:g}"
        f" instead of {usual_scale:g}",
        f"set adapter.alpha={usual_scale * adapter.rank:g}, or adapter.alpha={adapter.alpha:g} if that is meant",
    )


@rule("warning", source=GUIDE)
def high_dropout(facts: PreflightFacts) -> Result:
    """Dropout of 0.1 to 0.2 is for overfitting; the published checkpoints were trained without dropout."""
    dropout = facts.config.dropout
    highest = max(dropout.attention, dropout.feed_forward, dropout.residual, dropout.embedding)
    if facts.config.adapter.kind == "lora" or highest <= HIGHEST_DROPOUT:
        return None
    return f"dropout of {highest:g} is above {HIGHEST_DROPOUT}", "lower it, or set dropout=none"


@rule("warning", source="qwlit")
def adapter_on_random(facts: PreflightFacts) -> Result:
    """The export of an adapter does not contain its base, and random weights are saved nowhere else."""
    if facts.config.adapter.kind == "none" or facts.config.model.init != "random":
        return None
    return (
        "the adapter is trained on random weights, and export/ contains only the adapter",
        "set recipe=full_sft, or model.init=pretrained",
    )
