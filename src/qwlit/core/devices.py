"""The accelerators of this machine."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Devices:
    """The CUDA devices that this process sees; `name` is that of the first."""

    num_cuda: int
    name: str
    has_bf16: bool
    memory_gb: float = 0.0
    """Memory of the smallest device, 10^9 bytes; without a device, what this process may use of the host's."""

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 peak of one device, FLOP/s; None where it is unknown."""
        return next((peak for name, peak in PEAK_FLOPS.items() if name in self.name), None)


# From NVIDIA's data sheets, without sparsity: the SXM form unless the name says PCIe or NVL; the RTX 4090 with float32
# accumulation (Ada architecture white paper, 2023).
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
}

# MFU of large runs that do not wait for data, with FLOPs counted as here: PaLM 46 %, torchtitan 33-39 %.
USUAL_MFU = 0.4


def detect_devices() -> Devices:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return Devices(num_cuda=0, name="CPU", has_bf16=False, memory_gb=host_memory() / 1e9)
    # Ampere (compute capability 8) is the first with native bf16: NVIDIA A100 data sheet, 2020.
    return Devices(
        num_cuda=count,
        name=torch.cuda.get_device_name(0),
        has_bf16=torch.cuda.get_device_capability(0)[0] >= 8,
        memory_gb=min(torch.cuda.get_device_properties(index).total_memory for index in range(count)) / 1e9,
    )


def host_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes of host memory that this process may use: the machine's, or a smaller limit of cgroups or Slurm.

    Args:
        cgroups: where the control groups are mounted.
        own: the file that names the groups of this process, `id:controllers:path` on each line.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits(cgroups, own)]
    # sbatch sets one of the two where a job asks for memory, in MiB (sbatch's manual, output environment variables).
    per_node, per_cpu = os.environ.get("SLURM_MEM_PER_NODE", ""), os.environ.get("SLURM_MEM_PER_CPU", "")
    cpus = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if per_node.isdecimal():
        limits.append(int(per_node) * 2**20)
    elif per_cpu.isdecimal() and cpus.isdecimal():
        limits.append(int(per_cpu) * int(cpus) * 2**20)
    # 0 asks Slurm for all memory of the node.
    return min(limit for limit in limits if limit > 0)


def _cgroup_limits(cgroups: Path, own: Path) -> Iterator[int]:
    """Yield the limits of this process's groups and of the groups around them; `max` in place of a number is none."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # Version 2 has no controllers in its line.
        top, name = (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
        inner = top / group.lstrip("/")
        for folder in (inner, *inner.parents):
            with suppress(OSError, ValueError):
                yield int((folder / name).read_text())
            if folder == top:
                break
