"""Which process this is, known from the environment before any process group exists.

torchrun and Lightning's own launcher set RANK/LOCAL_RANK, Slurm's srun sets SLURM_PROCID.
"""

import os


def global_rank() -> int:
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def is_rank_zero() -> bool:
    return global_rank() == 0
