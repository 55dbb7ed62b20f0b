"""Which process this is, known from the environment before any process group exists."""

import os

# torchrun sets RANK, srun SLURM_PROCID; Lightning's own launcher sets LOCAL_RANK, and NODE_RANK on several machines.
# Under srun a LOCAL_RANK can only come from a launcher below it, so it is asked before SLURM_PROCID.


def is_rank_zero() -> bool:
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    if "LOCAL_RANK" in os.environ:
        return os.environ["LOCAL_RANK"] == "0" and os.environ.get("NODE_RANK", "0") == "0"
    return os.environ.get("SLURM_PROCID", "0") == "0"
