"""Bytes that a training step holds on one device, counted from the model's shape operator by operator.

Nothing here is fitted: each number is what autograd keeps of an operator (its derivative's inputs), what this code
allocates, or a data format's size; `python -m benchmarks.memory` compares the sums with what is measured.

What is kept of a forward pass is in `activations`. Shapes: N supervised tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from qwlit.core.patterns import layer_of
from qwlit.model.config import AdapterConfig, Execution
from qwlit.model.cpu import has_sparse_embedding
from qwlit.model.families import family_of
from qwlit.model.families.decoder import DECODER_LINEARS
from qwlit.model.head import BLOCK_BYTES, CHUNK_BYTES, rows_within
from qwlit.model.quantize import BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT32 = 4
# A block's scale is 8 bits, and 256 scales share a float32 (Dettmers et al. 2023); else it is a float32.
NF4_BYTES = 0.5 + (1 + FLOAT32 / 256) / BLOCK
NF4_BYTES_SINGLE = 0.5 + FLOAT32 / BLOCK


@dataclass(frozen=True)
class MicroShape:
    """The micro-batch that takes the most memory."""

    tokens: int
    supervised: int
    token_pairs: float
    """Sum over documents of their length squared: eager attention keeps a weight for each."""
    packed: bool = True
    """Documents end to end: what attention makes of each alone is joined in a copy, except by varlen."""
    accumulates: bool = False
    """Whether a step has more than one micro-batch, so that gradients are kept while the next one is computed."""


@dataclass(frozen=True)
class Placement:
    """On which devices the model is, and in which precision."""

    device: str
    """cpu or cuda."""
    shards: int
    """Devices that share weights, gradients and moments; 1 without FSDP."""
    precision_bytes: int
    """Of a number in a matrix product: 4, or 2 under autocast."""

    @property
    def mixed(self) -> bool:
        return self.precision_bytes < FLOAT32

    def share(self, tensor: Tensor) -> int:
        """Return how many of a tensor's numbers one device holds: FSDP2 cuts rows, and pads the last device's."""
        return -(-tensor.shape[0] // self.shards) * prod(tensor.shape[1:]) if tensor.ndim else 1


def weight_bytes(model: "PreTrainedModel", adapter: AdapterConfig, execution: Execution, place: Placement) -> float:
    """Return the weights as they are kept: trained ones in float32, frozen ones in their own type or in 4 bits."""
    nf4 = NF4_BYTES if adapter.double_quantization else NF4_BYTES_SINGLE
    total = 0.0
    for name, parameter in model.named_parameters():
        packed = adapter.quantization == "nf4" and _is_base_linear(name)
        size = FLOAT32 if parameter.requires_grad else nf4 if packed else execution.frozen_dtype.itemsize
        total += place.share(parameter) * size
    return total


def _is_base_linear(name: str) -> bool:
    """Tell the weight of one of the decoder's own linear layers from an adapter's or a norm's."""
    parts = name.removesuffix(".base_layer.weight").removesuffix(".weight").split(".")
    return parts[-1] in DECODER_LINEARS


def gradient_bytes(model: "PreTrainedModel", place: Placement) -> int:
    return sum(FLOAT32 * place.share(p) for p in model.parameters() if p.requires_grad)


def autocast_bytes(model: "PreTrainedModel", place: Placement) -> int:
    """Return the half-precision copies of trained weights, which autocast keeps until the step ends.

    FSDP2 sends layers around in half precision instead, so there are none of them.
    """
    if not place.mixed or place.shards > 1:
        return 0
    linears = (m.weight for m in family_of(model).layers(model).modules() if isinstance(m, nn.Linear))
    return sum(place.precision_bytes * weight.numel() for weight in linears if weight.requires_grad)


@dataclass(frozen=True)
class HeadBytes:
    """What the head holds while a micro-batch's loss is computed."""

    logits: int
    """Of a chunk; on CPU this memory is kept from call to call."""
    chunk: int
    """Their logarithms, the head's copy in half precision, the rows' gradient."""
    weight_gradient: int
    """float32 (V, D), 0 where the head is frozen."""


def head_bytes(model: "PreTrainedModel", micro: MicroShape, place: Placement) -> HeadBytes:
    """See `model/head.py`, whose chunks these are."""
    weight = family_of(model).head_weight(model)
    vocab, width = weight.shape
    limit = rows_within(CHUNK_BYTES, vocab, place.device)
    num_chunks = max(1, -(-micro.supervised // limit))
    rows = -(-micro.supervised // num_chunks)
    block = min(rows, rows_within(BLOCK_BYTES, vocab, place.device))
    trained = weight.requires_grad
    copy = place.precision_bytes * vocab * width if place.mixed else 0
    # Half precision on CUDA multiplies into a second float32 matrix before it adds.
    addend = FLOAT32 * vocab * width if trained and place.mixed else 0
    hidden = 2 * place.precision_bytes * micro.supervised * width
    return HeadBytes(
        logits=rows * vocab * place.precision_bytes,
        chunk=block * vocab * FLOAT32 + copy + addend + hidden,
        weight_gradient=FLOAT32 * vocab * width if trained else 0,
    )


def embedding_gradient_bytes(model: "PreTrainedModel", micro: MicroShape, place: Placement) -> int:
    """Return the embedding's gradient before it is added to what is there: float32, dense or of the rows read."""
    weight: Tensor = family_of(model).embedding(model).weight
    if not weight.requires_grad:
        return 0
    # Rows as they were read, and sorted with equal ones added up.
    rows = 2 * micro.tokens if has_sparse_embedding(model, place.device) else len(weight)
    return FLOAT32 * rows * weight.shape[1]


def unsharded_bytes(model: "PreTrainedModel", place: Placement) -> tuple[int, int]:
    """Return what FSDP2 holds whole: while the head computes, and while the first layer's gradient is reduced.

    Embedding, head and last norm are unsharded from their first use to their last; of the layers two are, one in use
    and the next one under way, and one whole gradient with its float32 copy to be reduced.
    """
    if place.shards == 1:
        return 0, 0
    root = sum(p.numel() for name, p in model.named_parameters() if layer_of(name) is None)
    layers = [list(layer.parameters()) for layer in family_of(model).layers(model)]
    largest = max((sum(p.numel() for p in layer) for layer in layers), default=0)
    trained = max((sum(p.numel() for p in layer if p.requires_grad) for layer in layers), default=0)
    whole = root * FLOAT32
    return whole, whole + 2 * largest * place.precision_bytes + trained * (place.precision_bytes + FLOAT32)
