"""The command line bounds how long waiting threads spin, and leaves what the user has set."""

import os
import subprocess
import sys

import pytest

from qwlit.core.threads import bound_spinning


def test_spinning_is_bounded_for_gnu_and_llvm() -> None:
    environment: dict[str, str] = {}
    bound_spinning(environment)
    assert environment == {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_variable_of_the_user_leaves_all_as_it_is(name: str) -> None:
    environment = {name: "0"}
    bound_spinning(environment)
    assert environment == {name: "0"}


def test_the_command_line_sets_the_bound_before_torch_is_imported() -> None:
    program = (
        "import os, sys, qwlit.__main__ as command; sys.argv[1:] = ['--version']; command.main();"
        " print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "KMP_", "OMP_WAIT"))}
    done = subprocess.run([sys.executable, "-c", program], env=unset, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "10000 False"
