"""The accelerators of this machine."""

import os
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Devices:
    """The CUDA devices that this process sees; `name` is that of the first."""

    num_cuda: int
    name: str
    has_bf16: bool
    memory_gb: float = 0.0
    """Memory of the smallest device, 10^9 bytes; without a device, the memory of the host."""

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


def detect_devices() -> Devices:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        host_memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        return Devices(num_cuda=0, name="CPU", has_bf16=False, memory_gb=host_memory_gb)
    # Ampere (compute capability 8) is the first with native bf16: NVIDIA A100 data sheet, 2020.
    return Devices(
        num_cuda=count,
        name=torch.cuda.get_device_name(0),
        has_bf16=torch.cuda.get_device_capability(0)[0] >= 8,
        memory_gb=min(torch.cuda.get_device_properties(index).total_memory for index in range(count)) / 1e9,
    )
