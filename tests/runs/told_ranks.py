"""`python -m tests.runs.told_ranks train …`: qwlit whose ranks write what determinism set before they meet."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed

from qwlit.__main__ import main

meet = torch.distributed.init_process_group


def write_and_meet(*arguments, **options):
    found = {name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")}
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    found["cuda"] = torch.cuda.is_initialized()
    Path(f"rank-{options['rank']}.json").write_text(json.dumps(found))
    return meet(*arguments, **options)


if __name__ == "__main__":
    torch.distributed.init_process_group = write_and_meet
    sys.exit(main())
