"""Resolve a hardware profile: replace every "auto" by what this machine has; refuse what the machine lacks."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import Literal

import torch

from qwlit.core.devices import Devices, detect_devices, host_memory
from qwlit.core.errors import ConfigError
from qwlit.core.ranks import (
    check_port,
    check_rank_of_launcher,
    check_rank_variables,
    in_slurm_job,
    launched_by_srun,
    launched_by_torchrun,
    launched_world_size,
    num_slurm_tasks,
    under_agent,
    whole_number,
)
from qwlit.model.config import ActivationCheckpointing, AttentionChoice, AttentionKernel
from qwlit.training.config import Determinism, HardwareConfig

Strategy = Literal["single", "ddp", "fsdp"]


@dataclass(frozen=True)
class Machine:
    """The hardware settings without "auto"; `planning` sets strategy, activation checkpointing and the other levels to
    what fits."""

    accelerator: Literal["cpu", "cuda"]
    device_name: str
    devices: int
    num_nodes: int
    strategy: Strategy
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    has_bf16: bool
    """Whether its devices have native bfloat16."""
    peak_flops: float | None
    """Dense bfloat16 peak of one device, FLOP/s; None where it is unknown."""
    activation_checkpointing: ActivationCheckpointing
    timeout_seconds: float
    num_workers: int
    pin_memory: bool
    device_memory: float = 0.0
    """Memory of one device, bytes; 0 where it is unknown."""
    host_memory: float = 0.0
    """Memory of one node's host that this job may use, bytes; 0 where it is unknown."""
    offload_optimizer: bool = False
    """Whether the moments are in the host's memory, where the optimizer steps."""
    reduce_once: bool = True
    """fsdp: whether gradients are reduced over the devices once per step; False: after every micro-batch."""

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The dtype of frozen weights, which need no float32 copy."""
        return torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[self.precision]


def resolve_machine(
    config: HardwareConfig, determinism: Determinism, *, profile: str, trust_profile: bool = False
) -> Machine:
    """Replace every "auto" by what this machine has, except strategy and memory, which depend on the model.

    Args:
        profile: the hardware profile's name, for the message.
        trust_profile: take the devices from the profile, not from this machine, and do not check how the processes were
            launched.

    Raises:
        ConfigError: the machine lacks what the profile requires, or settings exclude each other.
    """
    available = _devices_of_profile(config) if trust_profile and config.accelerator == "cuda" else detect_devices()
    accelerator = _accelerator(config, available, profile)
    devices = config.devices if config.devices != "auto" else (available.num_cuda if accelerator == "cuda" else 1)
    if accelerator == "cuda" and (devices > available.num_cuda or _too_small(config, available)):
        raise ConfigError(
            f"hardware={profile} needs {_needed(config)} per node, but this machine has {available.num_cuda} x"
            f" {available.name}, {available.memory_gb:.0f} GB. {_REMEDY}"
        )
    world_size = devices * config.num_nodes
    if not trust_profile:
        _check_launcher(devices, config.num_nodes)
    precision = _precision(config, accelerator, available, determinism)
    if config.strategy == "single" and world_size > 1:
        raise ConfigError(
            f"hardware.strategy=single is for one process, but {world_size} devices are set; use ddp or auto"
        )
    if config.strategy == "fsdp" and world_size == 1:
        raise ConfigError("hardware.strategy=fsdp shards over several devices, but one device is set; use auto")
    several: Strategy = "fsdp" if config.offload_optimizer is True else "ddp"
    strategy: Strategy = several if world_size > 1 else "single"
    strategy = strategy if config.strategy == "auto" else config.strategy
    if strategy == "fsdp" and precision == "16-mixed":
        chosen = "" if config.strategy == "fsdp" else "hardware.offload_optimizer=true needs fsdp: "
        raise ConfigError(
            f"{chosen}hardware.strategy=fsdp has no loss scale for 16-mixed; set hardware.precision=bf16-mixed or"
            " 32-true"
        )
    level = config.activation_checkpointing
    return Machine(
        accelerator=accelerator,
        device_name=available.name,
        devices=devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        precision=precision,
        has_bf16=accelerator == "cuda" and available.has_bf16,
        peak_flops=available.peak_flops if accelerator == "cuda" else None,
        activation_checkpointing="none" if level == "auto" else level,
        timeout_seconds=config.timeout_seconds,
        num_workers=(4 if accelerator == "cuda" else 0) if config.num_workers == "auto" else config.num_workers,
        pin_memory=accelerator == "cuda" if config.pin_memory == "auto" else config.pin_memory,
        # Processes on CPU share the host's memory.
        device_memory=available.memory_gb * 1e9 / (devices if accelerator == "cpu" else 1),
        host_memory=(config.host_memory_gb or 0) * 1e9 if trust_profile else host_memory(),
        offload_optimizer=config.offload_optimizer is True,
    )


# GPUs report about 1.06 times their nominal GB (an A100 of 40 GB: 42.3e9 bytes); with ECC on, up to 6 % less.
REPORTED_SHARE, USABLE_SHARE = 1.06, 0.93


def _devices_of_profile(config: HardwareConfig) -> Devices:
    """Return the devices that a profile names; without a name their speed and memory are unknown."""
    count = 1 if config.devices == "auto" else config.devices
    return Devices(count, config.gpu or "CUDA device", True, (config.gpu_memory_gb or 0) * REPORTED_SHARE)


_REMEDY = "Use hardware=auto for this machine, or start with experiment=demo"


# What Lightning reads as numbers, where srun has started the ranks.
SET_BY_SRUN = ("SLURM_JOB_ID", "SLURM_NODEID")


def _check_launcher(devices: int, num_nodes: int) -> None:
    """Refuse a launch with another number of processes than the settings name: ranks would train different things."""
    world_size, launched, tasks = devices * num_nodes, launched_world_size(), num_slurm_tasks()
    setting = f"hardware.devices={devices} x hardware.num_nodes={num_nodes}"
    # Inside a step, a new step gets no cores unless it may share those of the first one.
    overlap = " --overlap" if "SLURM_STEP_ID" in os.environ else ""
    # The tasks of a step inherit the mark of a shell of `srun --pty`, and must not be taken for it.
    unmarked = "env -u SLURM_PTY_PORT " if "SLURM_PTY_PORT" in os.environ else ""
    srun = f"{unmarked}srun{overlap} --nodes={num_nodes} --ntasks-per-node={devices} python -m qwlit train …"
    if launched_by_torchrun():
        unset = "if torchrun did not start this process, run: unset TORCHELASTIC_RUN_ID WORLD_SIZE RANK LOCAL_RANK"
        if launched != world_size:
            reason = "WORLD_SIZE is not set" if launched is None else f"{launched} processes were launched"
            raise ConfigError(
                f"{reason}, but {setting} is {world_size}; launch {world_size} processes or change these settings;"
                f" {unset}"
            )
        check_rank_of_launcher({"RANK": world_size, "LOCAL_RANK": devices}, setting, unset)
        check_port()
    elif launched_by_srun():
        for name in SET_BY_SRUN:
            whole_number(name)
        check_port()
        if launched != world_size:
            raise ConfigError(
                f"{launched} processes were launched, but {setting} is {world_size}; launch {world_size} processes"
                f" instead of SLURM_NTASKS={launched}, `{srun}`, or change these settings"
            )
        limits = {"SLURM_PROCID": world_size, "SLURM_LOCALID": devices}
        check_rank_of_launcher(limits, setting, f"start all ranks with `{srun}`")
        if "SLURM_NTASKS_PER_NODE" not in os.environ:
            # With --ntasks alone Slurm may put any number of tasks on a node.
            raise ConfigError(
                f"--ntasks={tasks} does not say how many tasks a node has; use --ntasks-per-node={devices}: `{srun}`"
            )
    elif in_slurm_job() and not under_agent() and (tasks > 1 or (num_nodes > 1 and "NODE_RANK" not in os.environ)):
        alone = "; or let qwlit start all: `env -u SLURM_NTASKS python -m qwlit train …`" if num_nodes == 1 else ""
        raise ConfigError(
            f"this Slurm job has {tasks} tasks (SLURM_NTASKS), but only one process was started; start it with srun:"
            f" `{srun}`{alone}"
        )
    else:
        check_rank_variables(devices, num_nodes)


def _too_small(config: HardwareConfig, available: Devices) -> bool:
    return config.gpu_memory_gb is not None and available.memory_gb < USABLE_SHARE * config.gpu_memory_gb


def _needed(config: HardwareConfig) -> str:
    count = "a CUDA device" if config.devices in (1, "auto") else f"{config.devices} CUDA devices"
    return count if config.gpu_memory_gb is None else f"{count} of {config.gpu_memory_gb} GB"


def _accelerator(config: HardwareConfig, available: Devices, profile: str) -> Literal["cpu", "cuda"]:
    if config.accelerator == "auto":
        return "cuda" if available.num_cuda else "cpu"
    if config.accelerator == "cuda" and not available.num_cuda:
        raise ConfigError(f"hardware={profile} needs {_needed(config)}, but this machine has none. {_REMEDY}")
    return config.accelerator


def _precision(
    config: HardwareConfig, accelerator: str, available: Devices, determinism: Determinism
) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    if determinism == "strict":
        return "32-true"
    if config.precision == "bf16-mixed" and accelerator == "cuda" and not available.has_bf16:
        raise ConfigError(
            f"hardware.precision=bf16-mixed: {available.name} has no bfloat16;"
            " set hardware.precision=16-mixed or 32-true"
        )
    if config.precision != "auto":
        return config.precision
    if accelerator == "cpu":
        return "32-true"
    return "bf16-mixed" if available.has_bf16 else "16-mixed"


def resolve_attention(requested: AttentionChoice, *, machine: Machine, determinism: Determinism) -> AttentionKernel:
    """Choose the attention kernel.

    Raises:
        ConfigError: model.attention does not work with the other settings.
    """
    obstacle = why_not_varlen(machine)
    if determinism == "strict":
        return "eager"
    if requested == "varlen" and obstacle:
        raise ConfigError(f"model.attention=varlen: {obstacle}; set model.attention=auto")
    if requested == "auto":
        return "sdpa" if obstacle else "varlen"
    return requested


def why_not_varlen(machine: Machine) -> str | None:
    """Return what prevents torch's variable-length kernel; None if nothing does."""
    if machine.accelerator != "cuda":
        return "varlen needs CUDA"
    if machine.precision != "bf16-mixed":
        return f"varlen needs hardware.precision=bf16-mixed, not {machine.precision}"
    return None


def resolve_compile(
    requested: bool | Literal["auto"], machine: Machine, obstacle: str | None, *, trust_profile: bool = False
) -> tuple[bool, str | None]:
    """Decide whether to compile the decoder layers; "auto" compiles on CUDA.

    Args:
        obstacle: the setting that prevents compiling.
        trust_profile: do not look for a compiler on this machine.

    Returns:
        The decision, and the reason where something prevents compiling.

    Raises:
        ConfigError: hardware.compile=true, but something prevents it.
    """
    wanted = machine.accelerator == "cuda" if requested == "auto" else requested
    if not wanted:
        return False, None
    obstacle = obstacle or (None if trust_profile else _missing_compiler(machine))
    if obstacle and requested != "auto":
        raise ConfigError(f"hardware.compile=true: {obstacle}; set hardware.compile=auto")
    return obstacle is None, obstacle


def _missing_compiler(machine: Machine) -> str | None:
    """Return what torch.compile needs and this machine lacks; None where nothing is missing."""
    # On CUDA, Triton needs a C compiler for its launchers; on CPU, torch generates C++.
    language, variable, names = ("C", "CC", ("cc", "gcc", "clang"))
    if machine.accelerator == "cpu":
        language, variable, names = ("C++", "CXX", ("c++", "g++", "clang++"))
    elif find_spec("triton") is None:
        return "Triton is not installed"
    if any(which(name) for name in (os.environ.get(variable, ""), *names) if name):
        return None
    return f"there is no {language} compiler ({', '.join(names)}, or {variable}=…)"
