"""Rules about data and tokenizer."""

from qwlit.planning.preflight.rules import PreflightFacts, Result, rule

# Assumptions: with less supervision, most of the compute is spent on text outside the loss; more cut rows lose data.
LEAST_SUPERVISED, MOST_CUT = 0.05, 0.01
# Published models pad their vocabulary: Qwen3 by 267 rows, Qwen2.5-7B by 399.
MOST_SPARE_ROWS = 1024


@rule("warning", source="assumption")
def little_supervised(facts: PreflightFacts) -> Result:
    """If very few tokens are supervised, the loss mask is often wrong."""
    if facts.data is None or facts.data.supervised_share >= LEAST_SUPERVISED:
        return None
    share = f"{facts.data.supervised_share:.1%}"
    return (
        f"only {share} of the tokens are supervised",
        "look at some samples with `inspect`; data.loss_on chooses the supervised tokens",
    )


@rule("warning", source="what users of other trainers report: masks wrong after truncation")
def tokens_cut(facts: PreflightFacts) -> Result:
    """Rows cut or left out for their length are missing from training, and they are not a random selection."""
    if facts.data is None or facts.data.cut_share <= MOST_CUT:
        return None
    limit = facts.config.data.max_seq_len
    return f"{facts.data.cut_share:.0%} of the rows are longer than data.max_seq_len={limit}", "raise data.max_seq_len"


@rule("error", source="config.json of the published models")
def longer_than_context(facts: PreflightFacts) -> Result:
    """The model was never trained on positions beyond its context, and inference servers refuse them."""
    limit = facts.context_length
    if facts.data is None or facts.data.longest <= limit:
        return None
    return (
        f"the longest sample has {facts.data.longest:,} tokens, but the model's config.json allows {limit:,}",
        f"set data.max_seq_len={limit} or lower, or use a model with a longer context",
    )


@rule("warning", source="what users of other trainers report: never learns to stop")
def pad_is_eos(facts: PreflightFacts) -> Result:
    """qwlit supervises the end token. Trainers that mask every pad token mask it too, and models never stop."""
    tokenizer = facts.tokenizer
    if tokenizer is None or tokenizer.pad_id is None or tokenizer.pad_id != tokenizer.eos_id:
        return None
    return "the tokenizer pads with its end-of-text token", "set another pad_token before you train with other tools"


@rule("warning", source="what users of other trainers report")
def vocabulary(facts: PreflightFacts) -> Result:
    """A model with many more embeddings than the tokenizer has tokens probably belongs to another tokenizer."""
    if facts.tokenizer is None or facts.config.model.init == "random":
        return None
    spare = facts.vocab_size - facts.tokenizer.num_tokens
    if spare <= MOST_SPARE_ROWS:
        return None
    return (
        f"the model has {facts.vocab_size:,} embeddings, the tokenizer {facts.tokenizer.num_tokens:,} tokens",
        "check that model.tokenizer belongs to the model",
    )
