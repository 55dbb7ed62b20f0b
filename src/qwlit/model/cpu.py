"""What is faster on CPU only, and is not used on CUDA: one memory for all logits, and a sparse gradient.

Shapes: R rows of a chunk, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORKSPACES: dict[torch.dtype, Tensor] = {}
"""The memory that `logits_memory` keeps from call to call."""


@contextmanager
def logits_memory(num_rows: int, vocab_size: int, like: Tensor) -> Iterator[Tensor]:
    """Yield uninitialized memory (R, V) with the dtype and device of `like`: on CPU that of the last call, if it fits.

    The operating system gives fresh memory page by page at the first write, which costs 4 % of the head's time at
    V = 151,936. CUDA's allocator keeps its memory by itself.
    """
    if like.device.type != "cpu":
        yield like.new_empty(num_rows, vocab_size)
        return
    size = num_rows * vocab_size
    # Take the memory out of the dictionary while it is in use, so that another thread makes its own.
    memory = WORKSPACES.pop(like.dtype, None)
    if memory is None or memory.numel() < size:
        del memory  # free the smaller one before the larger one is made
        memory = like.new_empty(size)
    yield memory[:size].view(num_rows, vocab_size)
    # Outside of inference mode nothing may write to a tensor that was made inside it.
    if not memory.is_inference():
        WORKSPACES[like.dtype] = memory


def set_embedding_gradient(causal_lm: "PreTrainedModel", device: str) -> None:
    """Make the embedding's gradient sparse or dense, as is best on the device that the batch is on."""
    family_of(causal_lm).embedding(causal_lm).sparse = has_sparse_embedding(causal_lm, device)


def has_sparse_embedding(causal_lm: "PreTrainedModel", device: str) -> bool:
    """Whether the embedding's gradient holds only the rows that were read; torch then adds it to the head's gradient.

    Dense it would be filled, written and read once more: 6 % of a step at V = 151,936, D = 256 on two CPU cores
    (measured). The whole gradient of a tied weight is dense all the same. On CUDA nobody has measured it.
    """
    return device == "cpu" and bool(causal_lm.config.tie_word_embeddings)
