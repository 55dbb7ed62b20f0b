"""What `plan` counts for a training step against what torch allocates: levels, recipes, optimizers.

Each training has a process of its own and ends after three steps, before a checkpoint. `planned` leaves out the reserve
that `plan` adds for the CUDA context and for memory that the allocator cannot use; `reserved` is what the allocator has
taken from the device, to compare with `planned and reserve`.
"""

import tempfile
from functools import partial
from pathlib import Path

from benchmarks.gpu.data import common_words
from benchmarks.gpu.tables import COMPARED, Cells, Scale, Tables, said_how
from benchmarks.gpu.train_once import train_once

CHECKPOINTING = "hardware.activation_checkpointing"
WAYS = {
    "full": ["recipe=full_sft", f"{CHECKPOINTING}=none"],
    "full, selective": ["recipe=full_sft", f"{CHECKPOINTING}=selective"],
    "full, full": ["recipe=full_sft", f"{CHECKPOINTING}=full"],
    "LoRA": ["recipe=lora", f"{CHECKPOINTING}=none"],
    "QLoRA": ["recipe=qlora", f"{CHECKPOINTING}=none"],
    "full, optimizer on the host": ["recipe=full_sft", f"{CHECKPOINTING}=full", "hardware.offload_optimizer=true"],
    "full, offload": ["recipe=full_sft", f"{CHECKPOINTING}=offload"],
    "freeze": ["recipe=freeze", f"{CHECKPOINTING}=none"],
    "full, 8-bit AdamW": ["recipe=full_sft", f"{CHECKPOINTING}=none", "optim=adamw_8bit"],
    "LoRA, full": ["recipe=lora", f"{CHECKPOINTING}=full"],
}
"""Recipe, and after the comma the level of activation checkpointing or another optimizer."""
TABLE, ERROR = "Memory of a training step, Qwen3-0.6B, micro-batches of 16 samples", "planned is off by"
GOAL = 0.1


def measure(tables: Tables, scale: Scale) -> None:
    ways = {name: WAYS[name] for name in ("full", "LoRA, full")} if scale.toy else WAYS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples, length = (12, 40.0) if scale.toy else (3 * 32, 512.0)
        common = common_words(folder, scale, "qwen3_0_6b", num_samples=samples, mean_length=length)
        common += ["train.max_steps=3", f"train.global_batch_size={samples // 3}", "optim.lr=1e-5"]
        common += [f"hardware.micro_batch_size={samples // 6}", "hardware.micro_batch_tokens=null"]
        for way, words in ways.items():
            tables.measure(TABLE, {"way": way}, partial(one, folder, [*common, *words, "dropout=none"], scale))


def one(folder: Path, words: list[str], scale: Scale) -> Cells:
    """Train, and compare."""
    trained = train_once(folder, "run", words)
    error = trained.planned_gib / trained.peak_gib - 1 if scale.device == "cuda" else None
    if error is not None:
        said = f"{'within' if abs(error) <= GOAL else 'not within'} {GOAL:.0%}; losses {_losses(trained.losses)}"
    else:
        said = f"not compared: on CPU this is the resident size of the process; losses {_losses(trained.losses)}"
    return {
        "planned GiB": trained.planned_gib,
        "allocated GiB": trained.peak_gib,
        ERROR: error,
        "planned and reserve GiB": trained.planned_gib + trained.reserve_gib,
        "reserved GiB": trained.reserved_gib,
        "how": said_how(trained.how),
        COMPARED: said,
    }


def _losses(losses: list[float]) -> str:
    return f"from {losses[0]:.3f} to {losses[-1]:.3f}"
