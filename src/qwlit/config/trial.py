"""Trials of a W&B sweep: what their agent writes into the words, and what tells their run folders apart."""

import os
import re

from qwlit.training.tracking.config import WANDB_CONFIG_KEY

# A trial that is resumed gets its whole W&B config as arguments: beside the sweep's values ours and the client's own.
NO_SETTINGS = (WANDB_CONFIG_KEY, "_wandb", "wandb_version")
LONGEST = 199
# Python's way to write what YAML calls null, alone or inside a list.
NONE = re.compile(r"(?<=[=\[, ])None(?=$|[\], ])")


def agent_overrides(words: list[str]) -> list[str]:
    """Return the words that are settings, as they would be typed."""
    return [NONE.sub("null", word) for word in words if word.partition("=")[0] not in NO_SETTINGS]


def trial_name(name: str) -> str:
    """Return a name of the trial's own, which a resumed trial finds again."""
    id = os.environ["WANDB_RUN_ID"]
    return f"{name[: LONGEST - len(id)]}-{id}"
