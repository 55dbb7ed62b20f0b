"""Precision, attention, memory."""

from qwlit.planning.memory.estimate import GIB
from qwlit.planning.preflight.rules import GUIDE, PreflightFacts, Said, rule

# Assumption: the score matrix of one head, 4096 by 4096 in float32, is 64 MiB.
LONG = 4096


@rule("warning", source=GUIDE)
def fp16(facts: PreflightFacts) -> Said:
    """float16 overflows at 65,504; bfloat16 has float32's range and needs no loss scale."""
    if facts.machine.precision != "16-mixed" or not facts.machine.has_bf16:
        return None
    return "hardware.precision=16-mixed on a device that has bfloat16", "set hardware.precision=bf16-mixed"


@rule("warning", source=GUIDE)
def no_bf16(facts: PreflightFacts) -> Said:
    """Devices before Ampere compute in float16 with a loss scale: overflowing steps are skipped."""
    machine = facts.machine
    if machine.accelerator != "cuda" or machine.has_bf16:
        return None
    return f"{machine.device_name} has no bfloat16", "watch the skipped steps, or set hardware.precision=32-true"


@rule("warning", source="assumption")
def eager_attention(facts: PreflightFacts) -> Said:
    """Eager attention keeps a weight for every pair of tokens: memory grows with the square of the length."""
    longest = facts.data.longest if facts.data else facts.config.data.max_seq_len
    if facts.execution.attention != "eager" or longest < LONG:
        return None
    return f"eager attention over {longest:,} tokens", "set model.attention=auto, or lower data.max_seq_len"


@rule("warning", source="`plan`, from the model's shape")
def memory(facts: PreflightFacts) -> Said:
    """What does not fit ends in the first steps; the estimate is an upper bound where layers are compiled."""
    estimate = facts.memory
    if estimate.fits is not False or _state(facts) > estimate.device:
        return None
    return _too_much(facts, estimate.total), "`plan` with the same words says what would make it fit"


@rule("error", source="`plan`, from the model's shape")
def state_memory(facts: PreflightFacts) -> Said:
    """Weights, gradients and moments alone exceed the device: no batch is small enough."""
    if not facts.memory.device or _state(facts) <= facts.memory.device:
        return None
    return f"weights, gradients and moments: {_too_much(facts, _state(facts))}", "`plan` says what would make it fit"


def _state(facts: PreflightFacts) -> float:
    held = facts.memory.components
    return sum(held.get(name, 0.0) for name in ("weights", "gradients", "optimizer"))


def _too_much(facts: PreflightFacts, size: float) -> str:
    return f"{size / GIB:.1f} GiB are needed of {facts.memory.device / GIB:.1f} on each device"


@rule("warning", source="qwlit")
def not_compiled(facts: PreflightFacts) -> Said:
    """On CUDA compiled layers make steps faster."""
    if facts.compile_obstacle is None:
        return None
    way_out = "dropout=none is faster, and how the published checkpoints were trained"
    remedy = way_out if facts.compile_obstacle.startswith("dropout.") else "hardware.compile=false accepts it"
    return f"layers are not compiled, which makes steps slower: {facts.compile_obstacle}", remedy


@rule("warning", source="bitsandbytes")
def paged_on_cpu(facts: PreflightFacts) -> Said:
    """Paging moves moments between a GPU's memory and the host's."""
    name = facts.config.optim.name
    if not name.startswith("paged") or facts.machine.accelerator != "cpu":
        return None
    return f"optim.name={name}: only a GPU's memory can be paged; here nothing is", "set optim=adamw"
