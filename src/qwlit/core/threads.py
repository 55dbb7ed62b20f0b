"""How long OpenMP's threads spin while they wait for work."""

import os
from collections.abc import MutableMapping

# Read by GNU's OpenMP (torch for Linux brings it): turns of a waiting loop before a thread sleeps.
GNU, GNU_TURNS = "GOMP_SPINCOUNT", "10000"
# Read by LLVM's and Intel's OpenMP (torch for macOS and Windows): milliseconds; 1 is the shortest that is not 0.
LLVM, LLVM_MILLISECONDS = "KMP_BLOCKTIME", "1"


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads spin for a short time; call it before torch is imported. A variable that is set stays.

    Threads that sleep at once (OMP_WAIT_POLICY=PASSIVE) must be woken hundreds of times a step: on a quiet machine that
    costs 11 to 33 % of the speed. Beside a busy process sleeping is faster, because threads that spin keep a core that
    others wait for. Figures: benchmarks/results/threads.json.
    """
    if not {"OMP_WAIT_POLICY", GNU, LLVM}.intersection(environment):
        environment.update({GNU: GNU_TURNS, LLVM: LLVM_MILLISECONDS})
