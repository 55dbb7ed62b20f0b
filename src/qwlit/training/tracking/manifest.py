"""manifest.json: what a reader needs to judge or repeat a run. Only listed facts, so that no secret gets into it."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import qwlit
from qwlit.core.devices import GIB
from qwlit.core.secrets import hide_secrets
from qwlit.training.machine import Machine

PACKAGES = (
    *("torch", "lightning", "transformers", "peft", "bitsandbytes", "hydra-core", "omegaconf", "tokenizers", "numpy"),
    *("safetensors", "jinja2", "pyarrow", "datasets", "triton", "xxhash"),
)
"""What computes numbers or reads data and settings. Of one that is not installed, the version is null."""
VARIABLES = (
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("TORCH_BLAS_PREFER_CUBLASLT", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"),
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_NVLS_ENABLE"),
    *("OMP_NUM_THREADS", "OMP_DYNAMIC", "MKL_NUM_THREADS", "MKL_DYNAMIC", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("ATEN_CPU_CAPABILITY", "PYTHONHASHSEED"),
)
"""Environment variables that choose kernels or their number of threads; no other one is recorded."""
CPU_FLAGS = re.compile(r"(avx|amx|fma|sse4|sve|asimd|bf16|fp16)")


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of qwlit's own checkout and a hash of its changes; None when installed from a wheel.

    `changes` covers changed files of the checkout and new files of the package; it is null where there are none.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) not in folder.parents:
            return None
        # Fails where qwlit is installed from a wheel inside the checkout of another project.
        git("ls-files", "--error-unmatch", "__init__.py")
        digest = hashlib.sha256(git("diff", "HEAD").encode())
        for new in git("ls-files", "--others", "--exclude-standard").splitlines():
            digest.update(new.encode() + (folder / new).read_bytes())
        changed = digest.digest() != hashlib.sha256().digest()
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain")),
            "changes": digest.hexdigest()[:16] if changed else None,
        }
    except (OSError, UnicodeDecodeError, subprocess.SubprocessError):
        return None


def _cpu() -> dict[str, Any]:
    """Return the processor's model, the instructions that kernels choose by, and the ones that torch uses."""
    found: dict[str, str] = {}
    # Only Linux has this file.
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            found[name.strip()] = value.strip()
    flags = found.get("flags", found.get("Features", "")).split()
    return {
        "model": found.get("model name") or platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": " ".join(sorted(flag for flag in flags if CPU_FLAGS.match(flag))),
    }


def _math_libraries() -> dict[str, str]:
    """Return the versions of the libraries that compute on the CPU: MKL, oneDNN, OpenMP."""
    lines = [line.removeprefix("  - ") for line in torch.__config__.show().splitlines()]
    patterns = {"MKL": r"Math Kernel Library Version ([\d.]+)", "oneDNN": r"MKL-DNN v(\S+)", "OpenMP": r"OpenMP (\d+)"}
    found = {name: re.search(pattern, "\n".join(lines)) for name, pattern in patterns.items()}
    return {name: match[1] for name, match in found.items() if match}


def _cuda() -> dict[str, Any]:
    """Return the versions of CUDA, its libraries and the driver."""
    driver = None
    with suppress(OSError):
        driver = re.search(r"Module\s+(?:for \S+\s+)?(\d[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    return {
        "CUDA": torch.version.cuda,
        "driver": driver[1] if driver else None,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, nccl)) or None,
    }


def threads_of_rank(machine: Machine) -> int:
    """Return how many threads each rank computes with. Lightning sets them after the manifest has been written."""
    if machine.world_size == 1 or "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    from lightning.fabric.utilities.distributed import _suggested_max_num_threads

    return int(_suggested_max_num_threads(machine.devices))


def public_command(arguments: list[str]) -> list[str] | None:
    """Return the command line with *** for passwords, keys and tokens; None if a program of the user's own trains."""
    if Path(arguments[0]).name not in ("qwlit", "__main__.py"):
        return None
    return [hide_secrets(argument) for argument in arguments[1:]]


def build_manifest(machine: Machine, **facts: Any) -> dict[str, Any]:
    """Return versions and device together with the run's own facts (seed, attention, fingerprints, parameters…)."""
    return {
        "qwlit": qwlit.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "git": _git_state(Path(qwlit.__file__).parent),
        "command": public_command(sys.argv),
        "cpu": _cpu(),
        "libraries": _math_libraries() | (_cuda() if machine.accelerator == "cuda" else {}),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "device": machine.device_name,
        "accelerator": machine.accelerator,
        "device_memory_gib": round(machine.device_memory / GIB, 2),
        "devices": machine.devices,
        "num_nodes": machine.num_nodes,
        "strategy": machine.strategy,
        "precision": machine.precision,
        "has_bf16": machine.has_bf16,
        "activation_checkpointing": machine.activation_checkpointing,
        "offload_optimizer": machine.offload_optimizer,
        "reduce_once": machine.reduce_once,
        "num_threads": threads_of_rank(machine),
        "torch_flags": {
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "TF32": torch.backends.cuda.matmul.allow_tf32,
            "cuDNN benchmark": torch.backends.cudnn.benchmark,
        },
        **facts,
    }
