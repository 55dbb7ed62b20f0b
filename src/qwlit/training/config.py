"""What a user can set about the step, the machine, validation and profiling."""

from typing import Annotated, Literal

from pydantic import Field

from qwlit.core.schema import Flag, NonNegativeInt, PositiveFloat, PositiveInt, config_dataclass
from qwlit.model.config import ActivationCheckpointing

Determinism = Literal["fast", "reproducible", "strict"]


@config_dataclass
class TrainConfig:
    """The mathematics of a step and the length of the run."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. Typing it clears the recipe's max_epochs; with both typed the run ends at the first reached."""
    max_epochs: PositiveInt | None = None
    """Passes over the data."""
    global_batch_size: Annotated[int, Field(gt=0, le=1_000_000, strict=True)] = 16
    """Samples per optimizer step, all devices together. Accumulation follows from it."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this total norm; null: never."""


@config_dataclass
class HardwareConfig:
    """The machine. Nothing here changes what is computed, only where and how fast."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one, else CPU."""
    devices: PositiveInt | Literal["auto"] = "auto"
    """Devices per node. auto: all CUDA devices, or one CPU process."""
    num_nodes: PositiveInt = 1
    """Machines."""
    gpu: str | None = None
    """Name of the devices in NVIDIA's data sheets; `plan` takes their speed from it. null: whatever there is."""
    gpu_memory_gb: PositiveInt | None = None
    """Memory that each device is sold with, GB; a machine with less is refused. null: whatever there is."""
    host_memory_gb: PositiveInt | None = None
    """Memory to ask of Slurm, GB a node."""
    strategy: Literal["auto", "single", "ddp", "fsdp"] = "auto"
    """ddp keeps all weights on every device, fsdp shards weights, gradients and moments over them. auto: ddp where
    there is more than one device, fsdp where that does not fit."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """auto: bf16 with float32 weights where the GPU has it, float16 with loss scaling on older GPUs, float32 on CPU."""
    activation_checkpointing: Literal["auto"] | ActivationCheckpointing = "auto"
    """What each layer keeps for the backward pass: everything (none), what is dear to compute (selective), one hidden
    state (full), or that in the host's memory (offload). Same gradients, more time. auto: the first that fits."""
    compile: Flag | Literal["auto"] = "auto"
    """Compile the decoder layers: faster steps after a first one of a minute. auto: with CUDA, where nothing stands
    against it."""
    micro_batch_size: PositiveInt | None = None
    """Most samples per device and forward pass; null: no limit but micro_batch_tokens."""
    micro_batch_tokens: PositiveInt | None = None
    """Most tokens per device and forward pass; null: no limit but micro_batch_size."""
    timeout_seconds: PositiveFloat = 1800.0
    """With several devices: no batch done for so long ends the run and names the rank that the others wait for."""
    num_workers: NonNegativeInt | Literal["auto"] = "auto"
    """Processes per device that lay out batches ahead of the step. auto: 4 with CUDA, none on CPU."""
    pin_memory: Flag | Literal["auto"] = "auto"
    """Page-locked batches, so that copies to the GPU do not wait. auto: with CUDA."""


@config_dataclass
class ValidationConfig:
    """When the validation set is looked at, and when the run gives up."""

    every_steps: PositiveInt | None = None
    """Validate every so many steps."""
    each_epoch: Flag = True
    """Validate at the end of each epoch, and after the last step."""
    early_stopping_patience: PositiveInt | None = 3
    """Stop after so many validations without a better val/loss; null: never."""


@config_dataclass
class ProfileConfig:
    """Torch profiler."""

    steps: Annotated[tuple[NonNegativeInt, NonNegativeInt], Field(strict=False)] | None = None
    """First and last step to trace into the run folder (profile/), e.g. [10,12]."""
