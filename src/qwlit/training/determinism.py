"""Deterministic training: what must be set before the first kernel runs.

fast: sets nothing. reproducible: the same machine gives the same numbers, with fast kernels where they are
deterministic. strict: also float32 and eager attention (`machine` chooses them).
"""

import os

import numpy as np
import torch

from qwlit.core.errors import ConfigError
from qwlit.training.config import Determinism

FIXED_WORKSPACES = (":4096:8", ":16:8")
"""With these workspaces cuBLAS picks the same algorithm each time:
https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility"""


def prepare_determinism(mode: Determinism, *, tf32: bool = False) -> None:
    """Set environment variables, which CUDA and NCCL read when they start, and torch's settings.

    Args:
        tf32: whether CUDA may compute float32 matrix products in TF32; `config.relations` refuses it with strict.

    Raises:
        ConfigError: CUBLAS_WORKSPACE_CONFIG is set to something else.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if mode == "fast":
        return
    workspaces = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", FIXED_WORKSPACES[0])
    if workspaces not in FIXED_WORKSPACES:
        raise ConfigError(
            f"determinism={mode} needs fixed workspaces of cuBLAS, but the environment variable"
            f" CUBLAS_WORKSPACE_CONFIG={workspaces}; run: unset CUBLAS_WORKSPACE_CONFIG"
        )
    # One algorithm, so that NCCL always adds the ranks in the same order.
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    if mode == "strict":
        torch.backends.cudnn.allow_tf32 = False


def seed_micro_batch(seed: int, step: int, rank: int, micro: int) -> None:
    """Seed torch's generators for one forward pass, so that no checkpoint has to store their state for dropout."""
    high, low = np.random.SeedSequence([seed, step, rank, micro]).generate_state(2, dtype=np.uint32)
    value = (int(high) << 32) | int(low)
    torch.default_generator.manual_seed(value)
    # Without CUDA, torch.manual_seed keeps the seed and formats the stack for each kind of device: milliseconds.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
