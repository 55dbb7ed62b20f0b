"""Settings of the model: its weights, attention, dropout, frozen parameters and adapter."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import AfterValidator

from qwlit.core.schema import (
    Flag,
    LayerRange,
    NonNegativeFloat,
    Patterns,
    PositiveFloat,
    PositiveInt,
    Probability,
    Ratio,
    config_dataclass,
    key_of,
)
from qwlit.model.families import FAMILIES
from qwlit.model.families.decoder import DECODER_LINEARS
from qwlit.model.hub import HubName

if TYPE_CHECKING:
    import torch

AttentionChoice = Literal["auto", "varlen", "sdpa", "eager"]
AttentionKernel = Literal["varlen", "sdpa", "eager"]
ActivationCheckpointing = Literal["none", "selective", "full", "offload"]
CHECKPOINTING_LEVELS: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
"""From the level that keeps most of the forward pass to the one that keeps least."""


def levels_with_less_memory(level: ActivationCheckpointing) -> tuple[ActivationCheckpointing, ...]:
    """Return the levels that keep less of the forward pass, the next one first."""
    return CHECKPOINTING_LEVELS[CHECKPOINTING_LEVELS.index(level) + 1 :]


@dataclass(frozen=True)
class Execution:
    """How this machine computes the model: kernel, activation checkpointing, dtypes, compilation."""

    attention: AttentionKernel
    activation_checkpointing: ActivationCheckpointing
    """What each layer keeps for the backward pass."""
    frozen_dtype: "torch.dtype"
    """The dtype of weights that are not trained."""
    compute_dtype: "torch.dtype"
    """The dtype of products with quantized weights."""
    compiled: bool = False
    """Whether each decoder layer is compiled."""


@config_dataclass
class Architecture:
    """The shape of a model. The names are those of Hugging Face's config.json."""

    model_type: Annotated[str, key_of(FAMILIES)]
    """A family in model/families/: qwen2 (also Qwen2.5; biases on q, k, v) or qwen3 (norms on q and k, no biases)."""
    vocab_size: PositiveInt
    """Rows of the embedding; at least the tokenizer's number of tokens."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    intermediate_size: PositiveInt
    """Width inside the feed-forward block."""
    num_hidden_layers: PositiveInt
    """Number of decoder layers."""
    num_attention_heads: PositiveInt
    """Number of query heads."""
    num_key_value_heads: PositiveInt
    """Number of key/value heads; divides the number of query heads."""
    head_dim: PositiveInt | None = None
    """Width of one head; null means hidden_size / num_attention_heads."""
    max_position_embeddings: PositiveInt
    """Longest context in tokens."""
    tie_word_embeddings: Flag
    """Whether the head reads the embedding's weight."""
    rope_theta: PositiveFloat
    """Base of the rotary embedding."""
    rms_norm_eps: PositiveFloat
    """Added to the mean square inside each norm."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of random weights; 0.02 is that of the published models' config.json."""


@config_dataclass
class ModelConfig:
    """Which model to train and where its weights come from."""

    hub_id: str | None = None
    """Repository on the hub, such as Qwen/Qwen3-0.6B; used when there is no path."""
    hub: HubName = "huggingface"
    """Where model.hub_id is fetched from, and model.tokenizer if it is a hub id; modelscope needs its package."""
    path: str | None = None
    """Local Hugging Face folder; wins over hub_id."""
    adapter_path: str | None = None
    """Folder of a LoRA adapter (qwlit's or peft's) on top of the model: recipe=lora continues it, recipes that train
    the model itself merge it first. An adapter's folder as model.path means the same, with the base that it names."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained loads the weights; random starts from scratch with the same shape."""
    tokenizer: str | None = None
    """Folder, hub id or qwlit: path of the tokenizer; null means the model's own."""
    architecture: Architecture | None = None
    """The shape of the model, for random weights and for `plan`; with model.path, its config.json has the shape."""
    attention: AttentionChoice = "auto"
    """Attention kernel: auto chooses varlen on CUDA with bf16-mixed, else sdpa."""


@config_dataclass
class DropoutConfig:
    """Dropout and embedding noise, in training only. The published Qwen checkpoints were trained with 0."""

    attention: Probability = 0.0
    """On the attention weights."""
    feed_forward: Probability = 0.0
    """On the activations inside each feed-forward block, before its output projection."""
    residual: Probability = 0.0
    """On the output of each attention and feed-forward block, before it is added to the residual stream."""
    embedding: Probability = 0.0
    """On the embedded tokens."""
    neftune_alpha: NonNegativeFloat = 0.0
    """NEFTune (Jain et al. 2023, arXiv 2310.05914): add noise, uniform between plus and minus alpha / sqrt(L * hidden
    size), to the embedded tokens; L is the number of tokens of the sample itself, also if it is packed or padded. The
    paper uses 5 to 15; 0: no noise."""
    lora: Probability = 0.0
    """On the input of each LoRA adapter."""
    layers: LayerRange | None = None
    """First and last decoder layer, from 0, with attention, feed_forward and residual dropout; null: all."""


@config_dataclass
class FreezeConfig:
    """Which parameters are not trained. Frozen parameters need no gradient and no optimizer state."""

    parameters: Patterns = ()
    """bias, norm, embedding, head, attention, mlp, parts of names (q_proj) or globs (model.layers.*.mlp.*). A head
    that is the embedding freezes with it."""
    layers: LayerRange | None = None
    """First and last decoder layer, counted from 0, of which all parameters are frozen."""
    lower_layers_ratio: Ratio = 0.0
    """Share of the decoder layers, from the lowest up and rounded down, of which all parameters are frozen."""


def _with_all_linears(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Replace `all` by the linear layers of a decoder layer."""
    if "all-linear" in patterns:
        raise ValueError("peft's 'all-linear' is called 'all' here")
    return tuple(name for pattern in patterns for name in (DECODER_LINEARS if pattern == "all" else (pattern,)))


@config_dataclass
class AdapterConfig:
    """The adapters: small trainable matrices in the frozen model, or none."""

    kind: Literal["none", "lora"] = "none"
    """none trains the model itself; lora freezes it and trains low-rank adapters (Hu et al. 2021)."""
    rank: PositiveInt = 16
    """Inner width of the adapters."""
    alpha: PositiveFloat = 32.0
    """The adapters' output is scaled by alpha / rank."""
    target_modules: Annotated[Patterns, AfterValidator(_with_all_linears)] = DECODER_LINEARS
    """Patterns of the linear layers that get an adapter: all, attention, mlp, parts of names or globs."""
    layers: LayerRange | None = None
    """First and last decoder layer, from 0, with adapters; null: all."""
    use_rslora: Flag = False
    """Scale by alpha / sqrt(rank), so that high ranks learn as fast (rsLoRA, Kalajdzievski 2023)."""
    use_dora: Flag = False
    """Also train the length of each row of the weights (DoRA, Liu et al. 2024); slower."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 keeps the frozen linear layers in 4 bits (QLoRA, Dettmers et al. 2023); lora only."""
    double_quantization: Flag = True
    """nf4: also quantize its scales, to 0.127 instead of 0.5 bits a parameter."""
