"""Data and tokenizer."""

from qwlit.planning.preflight.rules import PreflightFacts, Said, rule

# Assumptions: less than this and most of the work goes into text that is not learnt; more than that cut is a loss.
LEAST_SUPERVISED, MOST_CUT = 0.05, 0.01
# Published models pad their vocabulary: Qwen3 by 267 rows, Qwen2.5-7B by 399.
MOST_SPARE_ROWS = 1024


@rule("warning", source="assumption")
def little_supervised(facts: PreflightFacts) -> Said:
    """Where next to nothing is learnt, the mask is often wrong."""
    if facts.data is None or facts.data.supervised_share >= LEAST_SUPERVISED:
        return None
    share = f"{facts.data.supervised_share:.1%}"
    return (
        f"only {share} of the tokens are learnt",
        "look at some samples with `inspect`; data.loss_on says what is learnt",
    )


@rule("warning", source="what users of other trainers report: masks wrong after truncation")
def tokens_cut(facts: PreflightFacts) -> Said:
    """What is cut or left out for its length is not learnt, and it is never a random part."""
    if facts.data is None or facts.data.cut_share <= MOST_CUT:
        return None
    limit = facts.config.data.max_seq_len
    return f"{facts.data.cut_share:.0%} of the rows are longer than data.max_seq_len={limit}", "raise it"


@rule("error", source="config.json of the published models")
def longer_than_context(facts: PreflightFacts) -> Said:
    """Positions beyond the model's context were never trained, and servers refuse them."""
    limit = facts.context_length
    if facts.data is None or facts.data.longest <= limit:
        return None
    return (
        f"the longest sample has {facts.data.longest:,} tokens, and the model's config.json allows for {limit:,}",
        f"set data.max_seq_len={limit} or lower, or give a model with a longer context",
    )


@rule("warning", source="what users of other trainers report: never learns to stop")
def pad_is_eos(facts: PreflightFacts) -> Said:
    """qwlit keeps padding out of the loss, so it learns to stop; trainers that mask the pad token would not."""
    tokenizer = facts.tokenizer
    if tokenizer is None or tokenizer.pad_id is None or tokenizer.pad_id != tokenizer.eos_id:
        return None
    return "the tokenizer pads with its end-of-text token", "give it another pad_token before others train on"


@rule("warning", source="what users of other trainers report")
def vocabulary(facts: PreflightFacts) -> Said:
    """An embedding with many rows that no token has belongs to another tokenizer."""
    if facts.tokenizer is None or facts.config.model.init == "random":
        return None
    spare = facts.vocab_size - facts.tokenizer.num_tokens
    if spare <= MOST_SPARE_ROWS:
        return None
    return (
        f"the model has {facts.vocab_size:,} embeddings, the tokenizer {facts.tokenizer.num_tokens:,} tokens",
        "check that model.tokenizer is the model's own",
    )
