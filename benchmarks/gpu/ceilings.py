"""What the device can do at most: the model's matrix products alone, copies, and AdamW on the host and on the device.

Products are bfloat16 with float32 accumulation, as autocast runs them: forward pass, the input's gradient and the
weight's gradient of one linear layer, back to back. Tensors are larger than the device's cache.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.tables import COMPARED, Cells, NotMeasured, Scale, Tables, agreement, relative_error
from benchmarks.gpu.timing import seconds_of
from qwlit.config.compose import compose
from qwlit.core.devices import detect_devices

MODELS = ("qwen3_0_6b", "qwen3_4b", "qwen3_8b")
PRODUCTS, COPIES, STEPS = "Matrix products", "Copies", "AdamW"
BYTES_PER_ELEMENT = 28
"""AdamW reads weight, gradient and two moments and writes weight and moments, in float32."""


def measure(tables: Tables, scale: Scale) -> None:
    for model in MODELS[:1] if scale.toy else MODELS:
        for name, inner, outer in linears(model, 16 if scale.toy else 1):
            cells = {"model": model, "layer": name, "shape": f"{inner} → {outer}"}
            tables.measure(PRODUCTS, cells, partial(products, scale, inner, outer))
    for direction, copy in COPY.items():
        tables.measure(COPIES, {"copy": direction}, partial(copy, scale))
    for device in dict.fromkeys(("cpu", scale.device)):
        tables.measure(STEPS, {"where": device}, partial(adamw, device, scale))


def linears(model: str, divisor: int) -> list[tuple[str, int, int]]:
    """Return the linear layers of a published shape, each width divided: name, inputs, outputs."""
    shape = compose([f"model={model}"]).config.model.architecture
    assert shape is not None and shape.head_dim is not None
    hidden, queries = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    layers = [
        ("q", hidden, queries),
        ("k and v, each", hidden, shape.num_key_value_heads * shape.head_dim),
        ("o", queries, hidden),
        ("gate and up, each", hidden, shape.intermediate_size),
        ("down", shape.intermediate_size, hidden),
        ("head", hidden, shape.vocab_size),
    ]
    return [(name, inner // divisor, outer // divisor) for name, inner, outer in layers]


def products(scale: Scale, inner: int, outer: int) -> Cells:
    """Time the three products of a linear layer for 8,192 tokens; the head's for 40 % of them."""
    tokens = 32 if scale.toy else 8192 if outer < 100_000 else 3277
    device, dtype = scale.device, scale.dtype
    states, gradient = (torch.randn(tokens, size, device=device, dtype=dtype) for size in (inner, outer))
    weight = torch.randn(outer, inner, device=device, dtype=dtype)
    calls: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: states @ weight.T,
        "input's gradient": lambda: gradient @ weight,
        "weight's gradient": lambda: gradient.T @ states,
    }
    repeats = 2 if scale.toy else 20
    times = {name: seconds_of(call, device, repeats=repeats) for name, call in calls.items()}
    speed = 3 * 2 * tokens * inner * outer / sum(times.values())
    peak = detect_devices().peak_flops
    expected = states[:64].float() @ weight.float().T
    return {
        **{f"{name}, ms": 1e3 * time for name, time in times.items()},
        "TFLOP/s": speed / 1e12,
        "of the peak": speed / peak if peak and device == "cuda" else None,
        COMPARED: agreement({"64 rows": relative_error(calls["forward"]()[:64], expected)}, scale.tolerance),
    }


def _elements(scale: Scale) -> int:
    return 2**18 if scale.toy else 2**28  # 1 GiB of float32


def on_device(scale: Scale) -> Cells:
    source = torch.randn(_elements(scale), device=scale.device)
    return _bandwidth(scale, [(torch.empty_like(source), source)], moved=2)


def to_device(scale: Scale) -> Cells:
    host, device = _both(scale)
    return _bandwidth(scale, [(device, host)], moved=1)


def to_host(scale: Scale) -> Cells:
    host, device = _both(scale)
    return _bandwidth(scale, [(host, device)], moved=1)


def both_ways(scale: Scale) -> Cells:
    """Copy there on one stream and back on another: what hides a step on the host."""
    (host, device), (other_host, other_device) = _both(scale), _both(scale)
    return _bandwidth(scale, [(device, host), (other_host, other_device)], moved=1)


COPY = {
    "device to device, read and written": on_device,
    "page-locked host to device": to_device,
    "device to page-locked host": to_host,
    "both ways at once": both_ways,
}


def _both(scale: Scale) -> tuple[Tensor, Tensor]:
    """Return page-locked memory of the host, and memory of the device with random numbers."""
    if scale.device != "cuda":
        raise NotMeasured("needs a GPU")
    host = torch.empty(_elements(scale), pin_memory=True).normal_()
    return host, torch.randn(_elements(scale), device="cuda")


def _bandwidth(scale: Scale, copies: list[tuple[Tensor, Tensor]], *, moved: int) -> Cells:
    """Time copies, each on a stream of its own, from their first to the end of all.

    Args:
        moved: how often each byte is counted.
    """
    on_cuda = scale.device == "cuda"
    streams = [torch.cuda.Stream() for _ in copies] if on_cuda else [None for _ in copies]

    def copy_all() -> None:
        for (target, source), stream in zip(copies, streams, strict=True):
            if stream is None:
                target.copy_(source)
                continue
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
        for stream in streams:
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)

    seconds = seconds_of(copy_all, scale.device, repeats=2 if scale.toy else 10)
    if on_cuda:
        torch.cuda.synchronize()
    size = sum(source.nbytes for _, source in copies)
    same = all(torch.equal(target.cpu(), source.cpu()) for target, source in copies)
    return {
        "GiB": size / 2**30,
        "GB/s": moved * size / seconds / 1e9,
        COMPARED: agreement({"bytes": 0.0 if same else 1.0}, scale.tolerance),
    }


def adamw(device: str, scale: Scale) -> Cells:
    """Time torch's fused AdamW on one tensor, and compare its first step with the formula."""
    count = 2**16 if scale.toy else 2**27
    weight = torch.randn(count, device=device).requires_grad_()
    weight.grad = torch.randn(count, device=device)
    before = weight.detach()[:1000].double()
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, eps=1e-8, fused=True)
    optimizer.step()
    # After one step the moments' corrections cancel (Kingma and Ba 2015; decay as in Loshchilov and Hutter 2019).
    gradient = weight.grad[:1000].double()
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * gradient / (gradient.abs() + 1e-8)
    error = relative_error(weight.detach()[:1000], expected)
    seconds = seconds_of(optimizer.step, device, repeats=2 if scale.toy else 5, warmup=1)
    return {
        "million weights": count / 1e6,
        "ms": 1e3 * seconds,
        "ms per billion weights": 1e3 * seconds / count * 1e9,
        "GB/s": BYTES_PER_ELEMENT * count / seconds / 1e9,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        # float32 keeps 24 bits; a step has ten roundings (assumption).
        COMPARED: agreement({"first step": error}, 1e-5),
    }
