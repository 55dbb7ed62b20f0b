"""Settings of the step, the hardware, validation, checkpoints, the guard, logging and profiling."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainSerializer

from qwlit.core.schema import (
    MAX_COUNT,
    Flag,
    NonNegativeInt,
    OneOrMore,
    PositiveFloat,
    PositiveInt,
    WholeNumber,
    config_dataclass,
)
from qwlit.model.config import ActivationCheckpointing

Determinism = Literal["fast", "reproducible", "strict"]
Epochs = Annotated[
    float,
    Field(gt=0, le=MAX_COUNT, strict=True, allow_inf_nan=False),
    AfterValidator(lambda epochs: int(epochs) if epochs == int(epochs) else epochs),
    # pydantic would write the int as a float.
    PlainSerializer(lambda epochs: epochs),
]
"""A number of epochs; a whole one becomes an int, so that 3 is shown as 3."""


@config_dataclass
class TrainConfig:
    """The batch size and gradient norm of a step, and the length of the run."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. Setting it clears the recipe's max_epochs; with both set the run ends at the first reached."""
    max_epochs: Epochs | None = None
    """Passes over the data; 0.5 is the first half of the first one."""
    global_batch_size: Annotated[int, WholeNumber, Field(gt=0, le=1_000_000, strict=True)] = 16
    """Samples per optimizer step, all devices together. It determines gradient accumulation."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip gradients to this total norm; null: do not clip."""


@config_dataclass
class HardwareConfig:
    """The hardware. These settings change where and how fast a run computes, not what it computes."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where the machine has a CUDA device, else CPU."""
    devices: PositiveInt | Literal["auto"] = "auto"
    """Devices per node. auto: all CUDA devices, or one CPU process."""
    num_nodes: PositiveInt = 1
    """Number of nodes."""
    gpu: str | None = None
    """Name of the devices in NVIDIA's data sheets; `plan` takes their speed from it. null: any device."""
    gpu_memory_gb: PositiveInt | None = None
    """Nominal memory of each device, GB; a machine with less is refused. null: any size."""
    host_memory_gb: PositiveInt | None = None
    """Host memory to request from Slurm, GB per node."""
    strategy: Literal["auto", "single", "ddp", "fsdp"] = "auto"
    """ddp keeps all weights on every device; fsdp shards weights, gradients and moments over the devices. auto: ddp
    with more than one device, fsdp where ddp does not fit."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """auto: bf16 with float32 weights where the GPU has it, float16 with loss scaling on older GPUs, float32 on CPU."""
    tf32: Flag = False
    """Round the factors of float32 matrix products to TF32's 10 bits of mantissa on CUDA: faster with 32-true on Ampere
    and newer; products in bfloat16 and float16 are as before."""
    activation_checkpointing: Literal["auto"] | ActivationCheckpointing = "auto"
    """What each layer keeps for the backward pass: everything (none), what is slow to compute (selective), one hidden
    state (full), or that state in host memory (offload). Same gradients, more time. auto: the first level that fits."""
    offload_optimizer: Flag | Literal["auto"] = "auto"
    """Keep the optimizer's moments in the host's memory and step there: the device holds weights and gradients only.
    Same result, more time per step. auto: with CUDA, where no level of activation_checkpointing alone fits."""
    compile: Flag | Literal["auto"] = "auto"
    """Compile the decoder layers: the first step takes a minute, the others are faster. auto: with CUDA, where no other
    setting prevents it."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """Most samples per device and forward pass; null: no limit but micro_batch_tokens. auto: 4 on CPU, null with
    CUDA."""
    micro_batch_tokens: PositiveInt | Literal["auto"] | None = None
    """Most tokens per device and forward pass; null: no limit but micro_batch_size. auto: with CUDA as many as there is
    memory for, at most 16,384, without keeping less of the forward pass; null on CPU."""
    timeout_seconds: Annotated[float, Field(gt=0, le=30 * 86_400, strict=True)] = 1800.0
    """With several devices: if no batch ends for this long, the run ends and names the rank that others wait for. As
    long, a starting rank waits for the other ranks."""
    num_workers: NonNegativeInt | Literal["auto"] = "auto"
    """Processes per device that prepare batches ahead of the step. auto: 4 with CUDA, none on CPU."""
    pin_memory: Flag | Literal["auto"] = "auto"
    """Put batches into page-locked memory, so that copies to the GPU do not block. auto: with CUDA."""

    @property
    def micro_batch_limits(self) -> tuple[int | None, int | None]:
        """The most samples and tokens of a micro-batch; None where there is no limit, or none yet."""
        size, tokens = self.micro_batch_size, self.micro_batch_tokens
        return None if size == "auto" else size, None if tokens == "auto" else tokens


@config_dataclass
class ValidationConfig:
    """When to validate, and when to stop early."""

    every_steps: PositiveInt | None = None
    """Validate after every this many steps."""
    each_epoch: Flag = True
    """Validate at the end of each epoch, and after the last step."""
    early_stopping_patience: PositiveInt | None = 3
    """Stop after this many validations without a better val/loss; null: never."""


@config_dataclass
class CheckpointConfig:
    """When the run is saved. The last step and the best val/loss are always saved."""

    every_steps: PositiveInt | None = None
    """Save after every this many steps."""
    each_epoch: Flag = True
    """Save at the end of each epoch."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints are kept, besides the best one."""


@config_dataclass
class GuardConfig:
    """What the run does in trouble; docs/guard.md has all thresholds."""

    enabled: Flag = True
    """Skip each step that is not finite or far above the steps before, and go back or stop when the run diverges.
    false: train on whatever happens."""
    max_nonfinite_steps: Annotated[int, WholeNumber, Field(gt=0, le=3, strict=True)] = 3
    """So many steps in a row whose loss or gradient is not finite are trouble; at most 3, because three skipped steps
    of 50 are trouble in any case."""
    max_rollbacks: NonNegativeInt = 3
    """How often the run goes back to a stable checkpoint, passes over the data since then and halves the learning rate,
    before it stops with exit code 3. 0: it stops at the first trouble."""
    probe_every_steps: PositiveInt | None = 200
    """Let the model answer three prompts after every this many steps, into samples.jsonl; null: never."""


@config_dataclass
class LoggingConfig:
    """How often a run writes to metrics.jsonl and prints."""

    every_steps: PositiveInt = 10
    """One record after every this many steps; the first and last step always have one."""


LoggerName = Literal["wandb", "tensorboard", "mlflow", "csv", "swanlab"]
WANDB_CONFIG_KEY = "qwlit"
"""The W&B config key that holds all settings: at the top level a sweep's values would overwrite them."""


@config_dataclass
class LoggerConfig:
    """Where metrics go in addition to metrics.jsonl."""

    use: Annotated[tuple[LoggerName, ...], OneOrMore] = ()
    """One or several loggers. wandb is W&B, offline where no API key is set; trials of a W&B sweep need it."""
    project: str | None = None
    """Project of W&B and SwanLab, experiment of MLflow; null: WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, else qwlit."""
    entity: str | None = None
    """W&B user or team; null: WANDB_ENTITY, else the account's own."""
    group: str | None = None
    """W&B shows runs of one group together."""
    tags: tuple[str, ...] = ()
    """Tags of the run on W&B and SwanLab."""
    upload_checkpoints: Flag = False
    """Upload every saved checkpoint as a W&B artifact."""

    @property
    def wandb(self) -> bool:
        return "wandb" in self.use


@config_dataclass
class TraceConfig:
    """trace.jsonl: samples, loss and gradient norm to the bit, to compare runs step by step."""

    every_steps: PositiveInt | None = None
    """One record after every this many steps; null: after each step with determinism=reproducible and strict, else
    none."""
    weights_every_steps: PositiveInt = 100
    """A record after every this many steps also has a hash of the weights, and that after the last step has one."""


@config_dataclass
class ProfileConfig:
    """Torch profiler."""

    steps: Annotated[tuple[NonNegativeInt, NonNegativeInt], Field(strict=False)] | None = None
    """First and last step to trace into profile/ of the run folder, e.g. [10,12]."""
