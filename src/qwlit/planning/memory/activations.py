"""Bytes that autograd keeps of a forward pass, counted operator by operator from the model's shape.

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
from qwlit.planning.memory.state import FLOAT32, MicroShape, ShardingAndPrecision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Varlen attention keeps the random state in place of a dropout mask: two small tensors, each in a block of the smallest
# size that torch's allocator for CUDA has (kMinBlockSize in c10/core/AllocatorConfig.h).
RANDOM_STATE_BYTES = 2 * 512


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of the activations of a micro-batch at two points of a step."""

    after_forward: float
    """Kept for the backward pass when the forward pass ends."""
    peak_recompute: float
    """The most while the backward pass recomputes a layer, with the layer's gradients; 0 without checkpointing."""
    lowest_layer: float
    """In the backward pass of the lowest layer that has one, with its gradients; the layers above are done."""


def activation_bytes(
    model: "PreTrainedModel",
    adapter: AdapterConfig,
    dropout: DropoutConfig,
    execution: Execution,
    sharding: ShardingAndPrecision,
    micro: MicroShape,
) -> ActivationBytes:
    """Count what autograd keeps of every layer with the level of activation checkpointing in `execution`."""
    lowest = lowest_trained_layer(model)
    family = family_of(model)
    layers = [
        _Layer(model, index, index - lowest, adapter, dropout, execution, sharding, micro)
        for index in range(len(family.layers(model)))
    ]
    width = model.config.hidden_size
    # Sine and cosine of every position, and what the final norm keeps at the label positions.
    rotary = 2 * FLOAT32 * model.config.head_dim * micro.tokens
    final_norm = FLOAT32 * width * micro.supervised * (1 + family.final_norm(model).weight.requires_grad)
    level = execution.activation_checkpointing
    if level == "none":
        saved = sum(layer.saved_bytes() for layer in layers)
        own = sum(layer.saved_bytes() + layer.backward_peak_bytes() for layer in layers[max(lowest, 0) :][:1])
        return ActivationBytes(rotary + final_norm + saved, 0, rotary + own)
    # On CPU, offloading saves no memory.
    offloads = level == "offload" and sharding.device == "cuda"
    kept = [
        (0 if offloads else layer.input_bytes()) + (layer.selective_bytes() if level == "selective" else 0)
        for layer in layers
    ]
    below = [0.0, *accumulate(kept)]
    during = [below[index] + layer.saved_bytes() + layer.backward_peak_bytes() for index, layer in enumerate(layers)]
    own = sum(during[max(lowest, 0) :][:1])
    return ActivationBytes(rotary + final_norm + below[-1], rotary + max(during, default=0.0), rotary + own)


class _Layer:
    """Counts the bytes of one decoder layer."""

    def __init__(
        self,
        model: "PreTrainedModel",
        index: int,
        height: int,
        adapter: AdapterConfig,
        dropout: DropoutConfig,
        execution: Execution,
        sharding: ShardingAndPrecision,
        micro: MicroShape,
    ) -> None:
        config = model.config
        self.family = family_of(model)
        self.layer = self.family.layers(model)[index]
        # On CPU bitsandbytes multiplies 4-bit weights with its own operator, whose results `selective` does not keep.
        # On CUDA it dequantizes the weight first.
        self.is_4bit = adapter.quantization == "nf4"
        self.kernel, self.sharding, self.micro, self.dropout = execution.attention, sharding, micro, dropout
        self.hidden: int = config.hidden_size
        self.intermediate: int = config.intermediate_size
        self.random_state = RANDOM_STATE_BYTES if self.kernel == "varlen" else 0
        self.heads: int = config.num_attention_heads
        self.queries: int = self.heads * config.head_dim
        self.keys: int = config.num_key_value_heads * config.head_dim
        self.compute = sharding.precision_bytes
        # `height` is 0 in the lowest layer in or below which something is trained: the backward pass ends there.
        self.has_backward, self.input_has_gradient = height >= 0, height > 0
        is_last = index == len(self.family.layers(model)) - 1
        self.ffn_tokens = micro.supervised if is_last else micro.tokens
        """Tokens that the feed-forward block computes."""
        first_dropped, last_dropped = dropout.layers or (0, index)
        self.has_dropout = first_dropped <= index <= last_dropped

    def input_bytes(self) -> float:
        """Return the bytes of the layer's input, which is the residual stream."""
        return FLOAT32 * self.hidden * self.micro.tokens if self.has_backward else 0

    def backward_peak_bytes(self) -> float:
        """Return the bytes of the gradients when the feed-forward block's backward pass needs most memory.

        They are the output's gradient, and two gradients of intermediate width in addition to the saved tensors that
        are not freed yet. On CUDA nf4 adds one dequantized weight.
        """
        dequantized = (
            self.hidden * self.intermediate * self.compute if self.is_4bit and self.sharding.device == "cuda" else 0
        )
        gradients = (FLOAT32 * self.hidden + 2 * self.compute * self.intermediate) * self.ffn_tokens
        return gradients + dequantized if self.has_backward else 0

    def selective_bytes(self) -> float:
        """Return the bytes that `selective` keeps: the results of matrix products and of attention."""
        if not self.has_backward:
            return 0
        total = 0.0
        skips_base = self.is_4bit and self.sharding.device == "cpu"
        blocks = (
            (self.family.attention(self.layer), self.micro.tokens),
            (self.family.feed_forward(self.layer), self.ffn_tokens),
        )
        for block, tokens in blocks:
            total += sum(
                m.out_features * tokens * self.compute
                for name, m in block.named_modules()
                if isinstance(m, nn.Linear) and not (skips_base and name.endswith("base_layer"))
            )
        return total + (self.queries * self.compute + self.heads * FLOAT32) * self.micro.tokens + self.random_state

    def saved_bytes(self) -> float:
        """Return the bytes that autograd keeps if nothing is recomputed."""
        if not self.has_backward:
            return 0
        family, layer = self.family, self.layer
        before = self._norm(family.attention_norm(layer), self.input_has_gradient) + self._inputs(
            family.query_inputs(layer)
        )
        attention = before + self._attention() + self._inputs([family.attention_output(layer)])
        feed_forward = self._norm(family.feed_forward_norm(layer), True)
        feed_forward += self._inputs(family.feed_forward_inputs(layer))
        # SiLU keeps its input; the product of gate and up keeps both factors.
        feed_forward += 3 * self.intermediate * self.compute + self._inputs([family.feed_forward_output(layer)])
        if self.has_dropout:
            feed_forward += self._mask(self.intermediate) * (self.dropout.feed_forward > 0)
            feed_forward += self._mask(self.hidden) * (self.dropout.residual > 0)
            attention += self._mask(self.hidden) * (self.dropout.residual > 0)
        kept = attention * self.micro.tokens + feed_forward * self.ffn_tokens
        return kept + self._attention_weight_bytes() + self.random_state

    def _norm(self, norm: nn.Module, input_has_gradient: bool) -> float:
        """Return the bytes that RMSNorm keeps per token.

        They are float32: its input and one scale factor if the input has a gradient, and the normalized input if the
        norm's weight is trained.
        """
        return FLOAT32 * ((self.hidden + 1) * input_has_gradient + self.hidden * _is_trained(norm))

    def _attention_head_norm(self, name: str | None, width: int, heads: int) -> float:
        """Return the bytes per token that the norm on each query head or each key head keeps (Qwen3).

        They are a float32 copy of its input, a float32 scale factor per head, and if the norm's weight is trained the
        normalized input in the compute dtype.
        """
        if name is None:
            return 0
        norm = getattr(self.family.attention(self.layer), name)
        return FLOAT32 * (width + heads) + self.compute * width * _is_trained(norm)

    def _inputs(self, modules: list[nn.Module]) -> float:
        """Return the bytes per token that linear layers with one common input keep.

        In float32 they share one copy of the input; under autocast each keeps its own half-precision copy. A layer with
        an adapter also keeps the result of LoRA's A, and with LoRA dropout its own dropped input and the mask.
        """
        kept = shared = 0.0
        for module in modules:
            base, ranks = _base(module), _ranks(module)
            if not base.weight.requires_grad and not ranks:
                continue
            size = base.in_features * self.compute
            dropped = bool(ranks) and self.dropout.lora > 0
            kept += sum(ranks) * self.compute + dropped * self._mask(base.in_features)
            if dropped or (self.sharding.mixed and (ranks or not self._kept_by_attention(module))):
                kept += size
            elif not self._kept_by_attention(module):
                shared = size
        return kept + shared

    def _kept_by_attention(self, module: nn.Module) -> bool:
        """Whether the attention kernel already keeps the module's input, because this input is attention's result.

        False if the results of several samples were concatenated, and for eager attention.
        """
        concatenated = self.micro.packed and self.kernel != "varlen"
        return module is self.family.attention_output(self.layer) and not concatenated and self.kernel != "eager"

    def _attention(self) -> float:
        """Return the bytes per token that attention keeps: queries, keys, values, its result and the log-sum-exp.

        The query and key norms are included. Eager attention keeps neither its result nor the log-sum-exp.
        """
        kept = self._attention_head_norm(self.family.query_norm, self.queries, self.heads)
        kept += self._attention_head_norm(self.family.key_norm, self.keys, self.keys * self.heads // self.queries)
        values = self.keys
        keys = self.keys
        if self.kernel == "eager":
            keys = values = self.queries  # repeated: one key head and one value head for each query head
            return kept + self.compute * (self.queries + keys + values)
        return kept + self.compute * (2 * self.queries + keys + values) + FLOAT32 * self.heads

    def _attention_weight_bytes(self) -> float:
        """Return the bytes of the attention weights, which eager attention and, on CPU, attention dropout keep.

        They are the softmax's result and the causal mask (1 byte), and with dropout two more tensors like the result.
        """
        dropped = self.has_dropout and self.dropout.attention > 0
        if self.kernel == "eager" or (dropped and self.sharding.device == "cpu"):
            return self.micro.token_pairs * (self.heads * FLOAT32 * (3 if dropped else 1) + 1)
        return 0

    def _mask(self, width: int) -> float:
        """Return the bytes of a dropout mask per token: per element 1 on CUDA; on CPU a number in the compute dtype."""
        return width * (1 if self.sharding.device == "cuda" else self.compute)


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
