"""Timing of kernels: the device's own clock on CUDA, the host's on CPU."""

import time
from collections.abc import Callable
from statistics import median

import torch


def seconds_of(function: Callable[[], object], device: str, *, repeats: int, warmup: int = 3) -> float:
    """Return the median seconds of a call, of `repeats` after `warmup`; on CUDA by the device's clock."""
    for _ in range(warmup):
        function()
    if device != "cuda":
        return median(_on_host(function) for _ in range(repeats))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for began, ended in events:
        began.record()
        function()
        ended.record()
    torch.cuda.synchronize()
    return median(began.elapsed_time(ended) for began, ended in events) / 1e3


def _on_host(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak_bytes(function: Callable[[], object]) -> int:
    """Return what a call allocates on CUDA at most, beside what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
