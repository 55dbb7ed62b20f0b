"""Bytes of weights and gradients on one device, and of what head, embedding and FSDP2 allocate beside them.

Every number follows from the model's shape and a data format's size. `activations` counts what autograd keeps of a
forward pass. Shapes: D hidden, V vocabulary.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qwlit.model.config import AdapterConfig, Execution
from qwlit.model.cpu import has_sparse_embedding
from qwlit.model.families import family_of
from qwlit.model.families.decoder import DECODER_LINEARS
from qwlit.model.head import BLOCK_BYTES, CHUNK_BYTES, product_rows, rows_within
from qwlit.model.quantize import BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT32 = 4
# With double quantization the scale of a block has 8 bits, and 256 scales share a float32 (Dettmers et al. 2023).
# Without it the scale is a float32.
NF4_BYTES = 0.5 + (1 + FLOAT32 / 256) / BLOCK
NF4_BYTES_SINGLE = 0.5 + FLOAT32 / BLOCK


@dataclass(frozen=True)
class MicroShape:
    """The micro-batch that takes the most memory."""

    tokens: int
    supervised: int
    token_pairs: float
    """Sum of the squared lengths of the samples: eager attention keeps a weight for each pair of tokens."""
    packed: bool = True
    """Whether the samples are packed. Every kernel but varlen then attends sample by sample, and concatenating the
    results makes a copy."""
    accumulates: bool = False
    """Whether a step has more than one micro-batch, so that gradients are kept while the next one is computed."""


@dataclass(frozen=True)
class ShardingAndPrecision:
    """The device, how many devices share the model's tensors, and the precision of matrix products."""

    device: str
    """cpu or cuda."""
    shards: int
    """Number of devices that share weights, gradients and moments; 1 without FSDP2."""
    precision_bytes: int
    """Bytes per element of the factors of a matrix product: 4, or 2 under autocast."""

    @property
    def mixed(self) -> bool:
        return self.precision_bytes < FLOAT32

    def share(self, tensor: Tensor) -> int:
        """Return how many elements of a tensor one device holds. FSDP2 pads the first dimension to equal shards."""
        return -(-tensor.shape[0] // self.shards) * prod(tensor.shape[1:]) if tensor.ndim else 1


def weight_bytes(
    model: "PreTrainedModel", adapter: AdapterConfig, execution: Execution, sharding: ShardingAndPrecision
) -> float:
    """Return the bytes of the weights: trained ones are float32, frozen ones have the frozen dtype or 4 bits."""
    nf4 = NF4_BYTES if adapter.double_quantization else NF4_BYTES_SINGLE
    total = 0.0
    for name, parameter in model.named_parameters():
        is_4bit = adapter.quantization == "nf4" and _is_base_linear(name)
        size = FLOAT32 if parameter.requires_grad else nf4 if is_4bit else execution.frozen_dtype.itemsize
        total += sharding.share(parameter) * size
    return total


def _is_base_linear(name: str) -> bool:
    """Whether this is the weight of one of the decoder's own linear layers, and not of an adapter or a norm."""
    parts = name.removesuffix(".base_layer.weight").removesuffix(".weight").split(".")
    return parts[-1] in DECODER_LINEARS


def gradient_bytes(model: "PreTrainedModel", sharding: ShardingAndPrecision) -> int:
    return sum(FLOAT32 * sharding.share(p) for p in model.parameters() if p.requires_grad)


def embedding_gradient_share(model: "PreTrainedModel", sharding: ShardingAndPrecision) -> int:
    """Return the bytes that the embedding's gradient takes among those of `gradient_bytes`."""
    weight = family_of(model).embedding(model).weight
    return FLOAT32 * sharding.share(weight) if weight.requires_grad else 0


def autocast_bytes(model: "PreTrainedModel", sharding: ShardingAndPrecision) -> int:
    """Return the bytes of the half-precision copies of trained weights, which autocast keeps until the step ends.

    There are none with FSDP2, because it all-gathers the layers' weights in half precision.
    """
    if not sharding.mixed or sharding.shards > 1:
        return 0
    linears = (m.weight for m in family_of(model).layers(model).modules() if isinstance(m, nn.Linear))
    return sum(sharding.precision_bytes * weight.numel() for weight in linears if weight.requires_grad)


@dataclass(frozen=True)
class LMHeadBytes:
    """Bytes that the head allocates while it computes a micro-batch's loss."""

    logits: int
    """The logits of a chunk; on CPU this memory is kept from call to call."""
    workspace: int
    """A block's float32 log-probabilities, the hidden states and their gradient. In mixed precision also the block's
    float32 logits, the half-precision copy of the head's weight, and if it is trained a piece of a chunk's gradient of
    it, or on CPU the float32 copies of its factors."""
    weight_gradient: int
    """float32 (V, D); 0 if the head is frozen."""


def lm_head_bytes(
    model: "PreTrainedModel", frozen_dtype: torch.dtype, micro: MicroShape, sharding: ShardingAndPrecision
) -> LMHeadBytes:
    """Count the bytes that `linear_cross_entropy` in `model/head.py` allocates.

    Args:
        frozen_dtype: that of weights which are not trained.
    """
    family = family_of(model)
    weight = family.head(model).weight
    vocab, width = weight.shape
    limit = rows_within(CHUNK_BYTES, vocab, sharding.device)
    num_chunks = max(1, -(-micro.supervised // limit))
    rows = -(-micro.supervised // num_chunks)
    block = min(rows, rows_within(BLOCK_BYTES, vocab, sharding.device))
    trained = weight.requires_grad
    # FSDP2 gathers a head with its own unit in half precision. A frozen head may have half precision already.
    is_gathered_half = sharding.shards > 1 and not family.is_tied(model)
    is_stored_half = not trained and frozen_dtype.itemsize == sharding.precision_bytes
    has_copy = sharding.mixed and not is_gathered_half and not is_stored_half
    copy = sharding.precision_bytes * vocab * width if has_copy else 0
    # In half precision, the head adds the weight's gradient of a chunk in float32: on CUDA from the second chunk on in
    # pieces, on CPU as a product of float32 copies.
    piece = min(vocab, product_rows(width)) * width * (num_chunks > 1)
    factors = rows * (vocab + width) if sharding.device == "cpu" else piece
    addend = FLOAT32 * factors if trained and sharding.mixed else 0
    # torch's log_softmax makes a float32 copy of bfloat16 logits first (aten/src/ATen/native/SoftMax.cpp).
    softmax = block * vocab * FLOAT32 * (1 + sharding.mixed)
    hidden = 2 * sharding.precision_bytes * micro.supervised * width
    return LMHeadBytes(
        logits=rows * vocab * sharding.precision_bytes,
        workspace=softmax + copy + addend + hidden,
        weight_gradient=FLOAT32 * vocab * width if trained else 0,
    )


def embedding_gradient_bytes(model: "PreTrainedModel", micro: MicroShape, sharding: ShardingAndPrecision) -> int:
    """Return the bytes of the embedding's float32 gradient before it is added to the accumulated one."""
    weight: Tensor = family_of(model).embedding(model).weight
    if not weight.requires_grad:
        return 0
    # A sparse gradient has one row per token, and its coalesced copy at most as many. A dense one has all rows.
    rows = 2 * micro.tokens if has_sparse_embedding(model, sharding.device) else len(weight)
    return FLOAT32 * rows * weight.shape[1]
