"""What is read or freed does not stay in the process's memory."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwlit.model.weight_files import read_tensors

MIB = 2**20


def resident_mib(kind: str) -> float:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 2**10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_that_is_read_tensor_by_tensor_stays_out_of_memory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({f"t{number}": torch.zeros(2 * MIB) for number in range(16)}, file)
    before = resident_mib("RssFile")
    grown = 0.0
    for _, tensor in read_tensors({file: None}):
        tensor[:]
        grown = max(grown, resident_mib("RssFile") - before)
    assert grown < 24  # one tensor has 8 MiB, the file 128


FREED = """
import re, sys, torch
from pathlib import Path
from qwlit.model.cpu import return_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 2**10

model = torch.nn.Linear(2**14, 2**14 if sys.argv[1] == "large" else 2**10, bias=False, device="meta")
return_freed_memory(model)
torch.ones(7 * 2**20), torch.zeros(1)
before, kept = resident(), []
for _ in range(24):
    freed = torch.ones(2**20)
    kept.append(torch.ones(2**10))
    more = torch.ones(2**20 + 2**12 * len(kept))
    kept.append(torch.ones(2**10))
    del freed, more
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_tensors_of_a_large_model_go_back_to_the_system() -> None:
    def kept_mib(size: str) -> int:
        words = [sys.executable, "-c", FREED, size]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    assert kept_mib("large") < 4 <= kept_mib("small")
