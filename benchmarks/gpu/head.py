"""Our head against its matrix products, and against other heads: forward and backward at a vocabulary of 151,936.

The products are two for a frozen weight and three for a trained one, bfloat16 in and float32 accumulation, the weight's
gradient in float32, of the supervised rows at once. Every head gets bfloat16 states, a frozen weight in bfloat16 or a
trained one in float32, and must return the same loss and gradients as plain float32.
"""

import gc
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.tables import COMPARED, Cells, NotMeasured, Scale, Tables, agreement, relative_error
from benchmarks.gpu.timing import peak_bytes, seconds_of
from benchmarks.heads import HEADS, Rows, draw_rows, why_not

# Width of the hidden states, whether the weight is trained, rows of a micro-batch.
CASES = {
    "0.6B, full": (1024, True, 8192),
    "4B, LoRA": (2560, False, 8192),
    "8B, full": (4096, True, 8192),
}
SUPERVISED, VOCABULARY = 0.4, 151_936
TABLE = "Heads, 40 % of the rows supervised"
TIMES_FLOOR = "× its products"


def measure(tables: Tables, scale: Scale) -> None:
    for name, shape in ({"toy": (32, True, 48), "toy, frozen": (32, False, 48)} if scale.toy else CASES).items():
        measure_case(tables, scale, name, *shape)
        _free(scale)


def measure_case(tables: Tables, scale: Scale, name: str, hidden: int, trained: bool, num_rows: int) -> None:
    """Measure the products alone, then every head, at one shape."""
    vocabulary = 1000 if scale.toy else VOCABULARY
    rows = draw_rows(num_rows, hidden, vocabulary, SUPERVISED, device=scale.device, dtype=scale.dtype, trained=trained)
    expected = reference(rows)
    repeats = 2 if scale.toy else 10
    floor = seconds_of(products(rows), scale.device, repeats=repeats)
    alone = {"ms": 1e3 * floor, TIMES_FLOOR: 1.0, "peak GiB": None, COMPARED: "the floor"}
    tables.add(TABLE, {"case": name, "head": "its products alone"} | alone)
    for arm in HEADS:
        tables.measure(TABLE, {"case": name, "head": arm}, partial(one, arm, rows, expected, floor, scale, repeats))


def one(arm: str, rows: Rows, expected: list[Tensor], floor: float, scale: Scale, repeats: int) -> Cells:
    """Measure one head.

    Args:
        expected: loss and gradients in float32.
        floor: seconds of the products alone.
    """
    if reason := why_not(arm, scale.device):
        raise NotMeasured(reason)
    _free(scale)
    wanted = [tensor for tensor in (rows.states, rows.weight) if tensor.requires_grad]

    def run() -> list[Tensor]:
        loss = HEADS[arm](rows)
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    errors = [relative_error(found, right) for found, right in zip(run(), expected, strict=True)]
    names = ("loss", "states' gradient", "weight's gradient")
    # Heads round logits, probabilities and products to bfloat16: 4e-3 of a gradient, 9e-3 of a loss (measured on CPU).
    tolerance = 2 * scale.tolerance
    seconds = seconds_of(run, scale.device, repeats=repeats)
    return {
        "ms": 1e3 * seconds,
        TIMES_FLOOR: seconds / floor,
        "peak GiB": peak_bytes(run) / 2**30 if scale.device == "cuda" else None,
        COMPARED: agreement(dict(zip(names, errors, strict=False)), tolerance),
    }


def reference(rows: Rows) -> list[Tensor]:
    """Return loss and gradients of plain cross-entropy in float32, without TF32, chunk by chunk."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    trained = rows.weight.requires_grad
    weight = rows.factor.detach().float().requires_grad_(trained)
    loss = torch.zeros((), device=weight.device)
    states_gradient = torch.zeros(rows.states.shape, device=weight.device)
    weight_gradient = torch.zeros_like(weight) if trained else None
    for positions in rows.positions.split(512):
        states = rows.states[positions].detach().float().requires_grad_()
        part = F.cross_entropy(states @ weight.T, rows.targets[positions], reduction="sum")
        gradients = torch.autograd.grad(part, [states, weight] if trained else [states])
        loss += part.detach()
        states_gradient[positions] = gradients[0]
        if weight_gradient is not None:
            weight_gradient += gradients[1]
    torch.backends.cuda.matmul.allow_tf32 = before
    return [loss, states_gradient, *([] if weight_gradient is None else [weight_gradient])]


def products(rows: Rows) -> Callable[[], None]:
    """Return a call of the head's matrix products on the supervised rows, and of nothing else."""
    states, weight = rows.supervised.detach(), rows.factor.detach()
    logits = states @ weight.T
    trained, on_cuda = rows.weight.requires_grad, states.is_cuda

    def run() -> None:
        torch.mm(states, weight.T, out=logits)
        torch.mm(logits, weight)
        if trained and on_cuda:
            torch.mm(logits.T, states, out_dtype=torch.float32)
        elif trained:
            torch.mm(logits.T, states)

    return run


def _free(scale: Scale) -> None:
    gc.collect()
    if scale.device == "cuda":
        torch.cuda.empty_cache()
