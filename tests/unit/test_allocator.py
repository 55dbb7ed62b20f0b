"""The command line lets torch's allocator expand its segments, and leaves what the user has set."""

import os
import subprocess
import sys

import pytest

from qwlit.core.allocator import expand_segments


def test_segments_expand() -> None:
    environment: dict[str, str] = {}
    expand_segments(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_variable_of_the_user_stays_alone(name: str) -> None:
    environment = {name: "max_split_size_mb:512"}
    expand_segments(environment)
    assert environment == {name: "max_split_size_mb:512"}


def test_torch_reads_what_the_command_line_sets() -> None:
    program = (
        "import sys, qwlit.__main__ as command; sys.argv[1:] = ['--version']; command.main();"
        " early = 'torch' in sys.modules; import torch; print(torch._C._accelerator_getAllocatorSettings(), early)"
    )
    unset = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", program], env=unset, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "expandable_segments:True False"
