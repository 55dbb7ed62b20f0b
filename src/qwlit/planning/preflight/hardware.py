"""Rules about precision, attention, memory and compilation."""

from qwlit.core.devices import GIB
from qwlit.optim.kinds import OPTIMIZERS
from qwlit.planning.preflight.rules import GUIDE, PreflightFacts, Result, rule

# Assumption: the score matrix of one head, 4096 by 4096 in float32, is 64 MiB.
LONG = 4096


@rule("warning", source=GUIDE)
def fp16(facts: PreflightFacts) -> Result:
    """float16 overflows at 65,504; bfloat16 has float32's range and needs no loss scale."""
    if facts.machine.precision != "16-mixed" or not facts.machine.has_bf16:
        return None
    return "hardware.precision=16-mixed on a device that has bfloat16", "set hardware.precision=bf16-mixed"


@rule("warning", source=GUIDE)
def no_bf16(facts: PreflightFacts) -> Result:
    """Devices before Ampere compute in float16 with a loss scale: overflowing steps are skipped."""
    machine = facts.machine
    if machine.accelerator != "cuda" or machine.has_bf16:
        return None
    return (
        f"{machine.device_name} has no bfloat16",
        "check skipped_steps in summary.json, or set hardware.precision=32-true",
    )


@rule("warning", source="assumption")
def eager_attention(facts: PreflightFacts) -> Result:
    """Eager attention keeps a weight for every pair of tokens: memory grows with the square of the length."""
    longest = facts.data.longest if facts.data else facts.config.data.max_seq_len
    if facts.execution.attention != "eager" or longest < LONG:
        return None
    return f"eager attention over {longest:,} tokens", "set model.attention=auto, or lower data.max_seq_len"


@rule("warning", source="`plan`, from the model's shape")
def memory(facts: PreflightFacts) -> Result:
    """A run that does not fit fails in its first steps. If layers are compiled, the estimate is an upper bound."""
    estimate = facts.memory
    if not estimate.device or _state(facts) > estimate.device:
        return None
    remedy = "`plan` with the same overrides lists what would make it fit"
    if not estimate.fits:
        return f"the run needs {_compared(facts, estimate.total)}", remedy
    phase, size = max(facts.bytes_by_phase.items(), key=lambda item: item[1])
    return (f"{phase} needs {_compared(facts, size)}", remedy) if size > estimate.device else None


@rule("error", source="`plan`, from the model's shape")
def state_memory(facts: PreflightFacts) -> Result:
    """If weights, gradients and moments alone exceed the device's memory, no batch is small enough."""
    if not facts.memory.device or _state(facts) <= facts.memory.device:
        return None
    message = f"weights, gradients and moments alone take {_compared(facts, _state(facts))}"
    return message, "`plan` with the same overrides lists what would make it fit"


@rule("error", source="`plan`, from the model's shape")
def host_memory(facts: PreflightFacts) -> Result:
    """An optimizer on the host keeps its moments, and copies of weights and gradients, in the host's memory."""
    memory, machine = facts.memory, facts.machine
    if memory.fits_host:
        return None
    needed, there = memory.host * machine.devices / GIB, machine.host_memory / GIB
    message = f"the optimizer would take {needed:.1f} GiB of the host's memory, of {there:.1f} GiB on each node"
    return message, "set hardware.offload_optimizer=auto, or more hardware.num_nodes to share it"


def _state(facts: PreflightFacts) -> float:
    components = facts.memory.components
    return sum(components.get(name, 0.0) for name in ("weights", "gradients", "optimizer"))


def _compared(facts: PreflightFacts, size: float) -> str:
    return f"{size / GIB:.1f} GiB on each device of {facts.memory.device / GIB:.1f} GiB"


@rule("warning", source="qwlit")
def not_compiled(facts: PreflightFacts) -> Result:
    """On CUDA, compiled layers make steps faster."""
    if facts.compile_obstacle is None:
        return None
    message = f"layers are not compiled, so steps are slower: {facts.compile_obstacle}"
    return message, "hardware.compile=false turns this warning off"


@rule("warning", source="bitsandbytes")
def paged_on_cpu(facts: PreflightFacts) -> Result:
    """Paging moves the optimizer's moments between GPU memory and host memory; on CPU it does nothing."""
    name = facts.config.optim.name
    if not OPTIMIZERS[name].is_paged or facts.machine.accelerator != "cpu":
        return None
    return f"optim.name={name}: paging needs a GPU and has no effect on CPU", "set optim=adamw"


@rule("warning", source="qwlit")
def sharded_8bit(facts: PreflightFacts) -> Result:
    """8-bit moments share a scale in blocks, and under FSDP2 the blocks follow each device's rows."""
    name, machine = facts.config.optim.name, facts.machine
    if machine.strategy != "fsdp" or not OPTIMIZERS[name].has_blocks:
        return None
    message = f"optim.name={name} on {machine.world_size} devices: another number of devices gives other numbers"
    return message, "resume its checkpoints with fsdp on as many devices, or set optim=adamw"
