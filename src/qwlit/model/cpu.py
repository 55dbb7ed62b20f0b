"""What is for CPU only: one memory for all logits, the embedding's sparse gradient, and freed memory given back.

Shapes: R rows of a chunk, V vocabulary.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORKSPACES: dict[torch.dtype, Tensor] = {}
"""The memory that `logits_memory` keeps from call to call."""


@contextmanager
def logits_memory(num_rows: int, vocab_size: int, template: Tensor) -> Iterator[Tensor]:
    """Yield uninitialized memory (R, V) with the dtype and device of `template`; on CPU reuse the last call's memory.

    The operating system provides new memory page by page at the first write, which costs 4 % of the head's time at
    V = 151,936. CUDA needs no such reuse, because its caching allocator does it.
    """
    if template.device.type != "cpu":
        yield template.new_empty(num_rows, vocab_size)
        return
    size = num_rows * vocab_size
    # Take the memory out of the dictionary while it is in use, so that another thread allocates its own.
    memory = WORKSPACES.pop(template.dtype, None)
    if memory is None or memory.numel() < size:
        del memory  # free the smaller memory before allocating the larger one
        memory = template.new_empty(size)
    yield memory[:size].view(num_rows, vocab_size)
    # torch forbids to write, outside inference mode, to a tensor that was allocated in it.
    if not memory.is_inference():
        WORKSPACES[template.dtype] = memory


def embed(causal_lm: "PreTrainedModel", input_ids: Tensor) -> Tensor:
    """Return the tokens' embeddings (B, T, D); their gradient is sparse or dense, whichever is faster on the device."""
    embedding = family_of(causal_lm).embedding(causal_lm)
    embedding.sparse = has_sparse_embedding(causal_lm, input_ids.device.type)
    embedded: Tensor = embedding(input_ids)
    # DDP reads it when it wraps the model; a tied weight's whole gradient is dense.
    embedding.sparse = False
    return embedded


def has_sparse_embedding(causal_lm: "PreTrainedModel", device: str) -> bool:
    """Whether the embedding's gradient holds only the rows of the micro-batch's tokens.

    True for a tied weight on CPU: torch adds the sparse gradient to the head's dense one. A dense gradient of the
    embedding costs 6 % of a step at V = 151,936, D = 256 on two CPU cores (measured). On CUDA it is not measured.
    """
    return device == "cpu" and bool(causal_lm.config.tie_word_embeddings)


LARGE_MODEL = 2**30
"""Bytes of weights from which the memory counts more than the time that new pages take."""
M_MMAP_THRESHOLD, MMAP_THRESHOLD = -3, 2**17
"""glibc's malloc.h, and its value at the start of a process."""


def return_freed_memory(model: nn.Module) -> None:
    """Make malloc give each freed tensor of a large model back to the operating system at once.

    By default glibc keeps freed memory of tensors of up to 32 MiB for others, and much of it fits no other: LoRA of
    Qwen2.5-0.5B with 200 tokens took 4.13 GiB instead of 2.95. New pages cost time: a small model (256 wide, 8k case
    of benchmarks/train.py) took 1.6 times the time of a step, so it keeps the default (measured).
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if size >= LARGE_MODEL and mallopt is not None and not is_set:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
