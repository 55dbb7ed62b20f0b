"""Bytes that autograd keeps of a forward pass, counted operator by operator from the model's shape.

Shapes: T tokens of a micro-batch, N supervised ones, D hidden, I intermediate, Q = heads * K, KV = key/value heads * K.
A compiled layer keeps less than is counted here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from torch import nn

from qwlit.model.config import AdapterConfig, DropoutConfig, Execution
from qwlit.model.families import family_of
from qwlit.model.flops import lowest_trained_layer
from qwlit.planning.memory.state import FLOAT32, MicroShape, Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ActivationBytes:
    """What of a forward pass is kept for the backward pass."""

    kept: float
    """When the forward pass ends."""
    recomputing: float
    """The most that is kept while the backward pass recomputes a layer, with its gradients; 0 without checkpointing."""


def activation_bytes(
    model: "PreTrainedModel",
    adapter: AdapterConfig,
    dropout: DropoutConfig,
    execution: Execution,
    place: Placement,
    micro: MicroShape,
) -> ActivationBytes:
    """Count what autograd keeps of every layer under the level of activation checkpointing."""
    lowest = lowest_trained_layer(model)
    family = family_of(model)
    layers = [
        _Layer(model, number, number - lowest, adapter, dropout, execution, place, micro)
        for number in range(len(family.layers(model)))
    ]
    width = model.config.hidden_size
    # Sine and cosine of every position, and the last norm over the label positions.
    rotary = 2 * FLOAT32 * model.config.head_dim * micro.tokens
    last_norm = FLOAT32 * width * micro.supervised * (1 + family.final_norm(model).weight.requires_grad)
    level = execution.activation_checkpointing
    if level == "none":
        return ActivationBytes(rotary + last_norm + sum(layer.saved_bytes() for layer in layers), 0)
    # Offloading on CPU goes from the host to the host.
    offloads = level == "offload" and place.device == "cuda"
    kept = [
        (0 if offloads else layer.input_bytes()) + (layer.product_bytes() if level == "selective" else 0)
        for layer in layers
    ]
    below = [0.0, *accumulate(kept)]
    during = (below[number] + layer.saved_bytes() + layer.gradient_bytes() for number, layer in enumerate(layers))
    recomputing = max(during, default=0.0)
    return ActivationBytes(rotary + last_norm + below[-1], rotary + recomputing)


class _Layer:
    """One decoder layer's account, bytes."""

    def __init__(
        self,
        model: "PreTrainedModel",
        number: int,
        height: int,
        adapter: AdapterConfig,
        dropout: DropoutConfig,
        execution: Execution,
        place: Placement,
        micro: MicroShape,
    ) -> None:
        config = model.config
        self.family = family_of(model)
        self.layer = self.family.layers(model)[number]
        # A product of 4-bit weights is an operator of bitsandbytes's own on CPU, which `selective` does not know; on
        # CUDA the weight is unpacked for it.
        self.packed = adapter.quantization == "nf4"
        self.kernel, self.place, self.micro, self.dropout = execution.attention, place, micro, dropout
        self.hidden: int = config.hidden_size
        self.inner: int = config.intermediate_size
        self.heads: int = config.num_attention_heads
        self.queries: int = self.heads * config.head_dim
        self.keys: int = config.num_key_value_heads * config.head_dim
        self.compute = place.precision_bytes
        # Counted from the lowest layer in or below which something is trained.
        self.learns, self.input_learns = height >= 0, height > 0
        last = number == len(self.family.layers(model)) - 1
        self.rows = micro.supervised if last else micro.tokens
        """Tokens that the feed-forward block sees."""
        first_dropped, last_dropped = dropout.layers or (0, number)
        self.drops = first_dropped <= number <= last_dropped

    def input_bytes(self) -> float:
        """The residual stream that enters the layer."""
        return FLOAT32 * self.hidden * self.micro.tokens if self.learns else 0

    def gradient_bytes(self) -> float:
        """Gradients at the peak of the feed-forward block's backward pass, and one unpacked 4-bit weight.

        They are the output's gradient, and two of the inner width beside the saved tensors that are not freed yet.
        """
        unpacked = self.hidden * self.inner * self.compute if self.packed and self.place.device == "cuda" else 0
        gradients = (FLOAT32 * self.hidden + 2 * self.compute * self.inner) * self.rows
        return gradients + unpacked if self.learns else 0

    def product_bytes(self) -> float:
        """What `selective` keeps: results of matrix products and of attention."""
        if not self.learns:
            return 0
        total = 0.0
        hidden = self.packed and self.place.device == "cpu"
        blocks = (
            (self.family.attention(self.layer), self.micro.tokens),
            (self.family.feed_forward(self.layer), self.rows),
        )
        for block, tokens in blocks:
            total += sum(
                m.out_features * tokens * self.compute
                for name, m in block.named_modules()
                if isinstance(m, nn.Linear) and not (hidden and name.endswith("base_layer"))
            )
        return total + (self.queries * self.compute + self.heads * FLOAT32) * self.micro.tokens

    def saved_bytes(self) -> float:
        """What autograd keeps when nothing is recomputed."""
        if not self.learns:
            return 0
        family, layer = self.family, self.layer
        before = self._norm(family.attention_norm(layer), self.input_learns) + self._inputs(family.query_inputs(layer))
        attention = before + self._attention() + self._inputs([family.attention_output(layer)])
        feed_forward = self._norm(family.feed_forward_norm(layer), True)
        feed_forward += self._inputs(family.feed_forward_inputs(layer))
        # SiLU keeps its input, the product of gate and up both of its own.
        feed_forward += 3 * self.inner * self.compute + self._inputs([family.feed_forward_output(layer)])
        if self.drops:
            feed_forward += self._mask(self.inner) * (self.dropout.feed_forward > 0)
            feed_forward += self._mask(self.hidden) * (self.dropout.residual > 0)
            attention += self._mask(self.hidden) * (self.dropout.residual > 0)
        return attention * self.micro.tokens + feed_forward * self.rows + self._weights_of_pairs()

    def _norm(self, norm: nn.Module, input_learns: bool) -> float:
        """Root mean square of a token, float32: its input, the factor, and for the weight's gradient the normed."""
        return FLOAT32 * ((self.hidden + 1) * input_learns + self.hidden * _is_trained(norm))

    def _head_norm(self, name: str | None, width: int, heads: int) -> float:
        """Qwen3's norms of queries and keys: a float32 copy of the input, and the normed in the input's type."""
        if name is None:
            return 0
        norm = getattr(self.family.attention(self.layer), name)
        return FLOAT32 * (width + heads) + self.compute * width * _is_trained(norm)

    def _inputs(self, modules: list[nn.Module]) -> float:
        """What linear layers with the same input keep of it. Under autocast each keeps its own half-precision copy."""
        kept = shared = 0.0
        for module in modules:
            base, ranks = _base(module), _ranks(module)
            if not base.weight.requires_grad and not ranks:
                continue
            size = base.in_features * self.compute
            dropped = bool(ranks) and self.dropout.lora > 0
            kept += sum(ranks) * self.compute + dropped * self._mask(base.in_features)
            if dropped or (self.place.mixed and (ranks or not self._kept_by_attention(module))):
                kept += size
            elif not self._kept_by_attention(module):
                shared = size
        return kept + shared

    def _kept_by_attention(self, module: nn.Module) -> bool:
        """Whether the attention kernel keeps the module's input: the input of the output projection is its result.

        Not so where the results of several documents are joined in a copy, and in eager attention.
        """
        joined = self.micro.packed and self.kernel != "varlen"
        return module is self.family.attention_output(self.layer) and not joined and self.kernel != "eager"

    def _attention(self) -> float:
        """Queries, keys, values, result and the logarithm of the sums; the head norms before them."""
        kept = self._head_norm(self.family.query_norm, self.queries, self.heads)
        kept += self._head_norm(self.family.key_norm, self.keys, self.keys * self.heads // self.queries)
        values = self.keys
        keys = self.keys
        if self.kernel == "eager":
            keys = values = self.queries  # one head each
            return kept + self.compute * (self.queries + keys + values)
        return kept + self.compute * (2 * self.queries + keys + values) + FLOAT32 * self.heads

    def _weights_of_pairs(self) -> float:
        """Attention weights, where they are kept: softmax's result and the mask; with dropout twice more on CPU."""
        dropped = self.drops and self.dropout.attention > 0
        if self.kernel == "eager" or (dropped and self.place.device == "cpu"):
            return self.micro.token_pairs * (self.heads * FLOAT32 * (3 if dropped else 1) + 1)
        return 0

    def _mask(self, width: int) -> float:
        """A dropout mask, bytes per token: one byte a value on CUDA, one factor a value on CPU."""
        return width * (1 if self.place.device == "cuda" else self.compute)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _base(module: nn.Module) -> nn.Linear:
    base = getattr(module, "base_layer", module)
    assert isinstance(base, nn.Linear)
    return base


def _ranks(module: nn.Module) -> list[int]:
    """Return the ranks of the adapters on a linear layer."""
    down: Iterable[nn.Module] = getattr(module, "lora_A", nn.ModuleDict()).values()
    return [linear.out_features for linear in down if isinstance(linear, nn.Linear)]
