"""How torch's allocator divides a GPU's memory."""

import os
from collections.abc import MutableMapping

NAME, SETTING = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
OLDER_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def expand_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let freed memory serve tensors of other sizes; call it before torch is imported. A variable that is set stays.

    Micro-batches have other lengths each time. With segments of fixed size, what one of them frees may fit no tensor of
    the next one (torch's CUDA notes, "Optimizing memory usage").
    """
    if not {NAME, *OLDER_NAMES}.intersection(environment):
        environment[NAME] = SETTING
