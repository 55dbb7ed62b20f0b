"""What a user can set about the run, the loop, the machine and what is kept."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from qwlit.core.schema import Flag, NonNegativeInt, PositiveFloat, PositiveInt, config_dataclass
from qwlit.core.slurm import time_limit_seconds
from qwlit.model.config import MemoryPolicy

Determinism = Literal["fast", "reproducible", "strict"]


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.=,+-]{0,199}", name):
        raise ValueError("a run's name is one folder: letters, digits and _ . = , + -; set run.root for another place")
    return name


@config_dataclass
class RunSettings:
    """Where the run lives."""

    name: Annotated[str, AfterValidator(_folder_name)] | None = None
    """Folder under run.root; by default the experiment's name, or model-recipe-data. The same name continues a run."""
    root: str = "runs"
    """Folder that holds the runs, relative to the current one."""
    overwrite: Flag = False
    """Delete an existing run of this name and start anew."""


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
    memory: Literal["auto"] | MemoryPolicy = "auto"
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
class CheckpointConfig:
    """When the run is saved. The last step and the best val/loss always are."""

    every_steps: PositiveInt | None = None
    """Save every so many steps."""
    each_epoch: Flag = True
    """Save at the end of each epoch."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept, beside the best one."""


@config_dataclass
class LoggingConfig:
    """What is written to metrics.jsonl and shown."""

    every_steps: PositiveInt = 10
    """One line every so many steps; the first and last step always."""


WANDB_CONFIG_KEY = "qwlit"
"""All settings are logged under this one: a sweep's values overwrite W&B's config keys of the same name."""


@config_dataclass
class LoggerConfig:
    """Where metrics go beside metrics.jsonl."""

    wandb: Flag = False
    """Log to W&B; offline where there is no API key. Trials of a W&B sweep need it."""
    project: str | None = None
    """W&B project; null: WANDB_PROJECT, else qwlit."""
    entity: str | None = None
    """W&B user or team; null: WANDB_ENTITY, else the account's own."""
    group: str | None = None
    """Runs that W&B shows together."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    upload_checkpoints: Flag = False
    """Upload every saved checkpoint as a W&B artifact."""


def _slurm_time(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError('quote it, "12:00:00": YAML reads a clock time as a number')
    if isinstance(value, str):
        time_limit_seconds(value)
    return value


def _one_line(text: str) -> str:
    if "\n" in text:
        raise ValueError("one line each")
    return text


Line = Annotated[str, AfterValidator(_one_line)]


@config_dataclass
class SlurmConfig:
    """The Slurm job that `submit` writes. Nodes, tasks, GPUs, cores and memory follow from the hardware profile."""

    partition: Line | None = None
    """Partition; null: the cluster's default. So are account, qos and constraint."""
    account: Line | None = None
    """Account to charge."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that the nodes must have."""
    time: Annotated[str, BeforeValidator(_slurm_time)] = "24:00:00"
    """Time limit of one piece of the run; it is requeued and goes on until it is done."""
    signal_seconds: Annotated[int, Field(ge=10, le=65535, strict=True)] = 120
    """How long before the time limit the run is told to save: one step, one checkpoint and some."""
    max_requeues_in_place: PositiveInt = 3
    """A run that is requeued so often without one step more is left: it would loop for ever."""
    container: Line | None = None
    """Image for Pyxis' --container-image; its own python is used. null: no container, this environment."""
    mounts: tuple[Line, ...] = ()
    """What the container sees of the host beside the working folder, as /from:/to."""
    setup: tuple[Line, ...] = ()
    """Shell lines before training, e.g. ["module load cuda"]; variables as $NAME."""
    options: tuple[Line, ...] = ()
    """Further options of sbatch, e.g. [--exclusive,--mem=64G]."""


@config_dataclass
class GuardConfig:
    """What happens when a step's loss or gradient is not finite: the optimizer skips it, and the run may stop."""

    max_nonfinite_steps: PositiveInt = 3
    """Stop with exit code 3 after so many such steps in a row."""


@config_dataclass
class PreflightConfig:
    """Rules that are known from how runs die; `plan` lists what they find."""

    allow: tuple[str, ...] = ()
    """Names of rules that would refuse this run and shall only warn, e.g. [full_lr]."""


@config_dataclass
class ProfileConfig:
    """Torch profiler."""

    steps: Annotated[tuple[NonNegativeInt, NonNegativeInt], Field(strict=False)] | None = None
    """First and last step to trace into the run folder (profile/), e.g. [10,12]."""
