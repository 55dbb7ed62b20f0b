"""What a user can say about the model: which one, from where, with which attention, dropout and adapter."""

from typing import Literal

from qwlit.core.schema import Flag, PositiveFloat, PositiveInt, Probability, config_dataclass

AttentionChoice = Literal["auto", "varlen", "sdpa", "eager"]
AttentionKernel = Literal["varlen", "sdpa", "eager"]
MemoryPolicy = Literal["none", "selective", "full", "offload"]

DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear layers of a Qwen decoder layer."""


@config_dataclass
class Architecture:
    """The numbers that fix a Qwen2 or Qwen3 model's shape, named as in Hugging Face's config.json."""

    model_type: Literal["qwen2", "qwen3"]
    """Family: qwen2 (also Qwen2.5; biases on q, k, v) or qwen3 (norms on q and k, no biases)."""
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
    """Hugging Face repository, such as Qwen/Qwen3-0.6B; used when there is no path."""
    path: str | None = None
    """Local Hugging Face folder; wins over hub_id."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained loads the weights; random starts from scratch with the same shape."""
    tokenizer: str | None = None
    """Folder, hub id or qwlit: path of the tokenizer; null means the model's own."""
    architecture: Architecture | None = None
    """The shape, for random init and for counting; with a path, its config.json is read instead."""
    attention: AttentionChoice = "auto"
    """Attention kernel: auto takes varlen on CUDA in half precision and sdpa elsewhere."""


@config_dataclass
class DropoutConfig:
    """Dropout probabilities, in training only. The published Qwen checkpoints were trained with 0."""

    attention: Probability = 0.0
    """On the attention weights."""
    feed_forward: Probability = 0.0
    """On the output of each feed-forward block."""
    lora: Probability = 0.0
    """On the input of each LoRA adapter."""


@config_dataclass
class AdapterConfig:
    """Small trainable matrices beside the frozen model, or none."""

    kind: Literal["none", "lora"] = "none"
    """none trains the model itself; lora freezes it and trains low-rank adapters."""
    rank: PositiveInt = 16
    """Inner width of the adapters."""
    alpha: PositiveFloat = 32.0
    """The adapters' output is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = DECODER_LINEARS
    """Names (or dotted endings) of the linear layers that get an adapter; each must match something."""
