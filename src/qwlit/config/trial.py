"""Trials of a W&B sweep: the overrides that the agent passes, and the names of the run folders."""

import os
import re

from qwlit.training.config import WANDB_CONFIG_KEY

# The agent passes the whole W&B config of a resumed trial: also the keys of qwlit and of the client.
NO_SETTINGS = (WANDB_CONFIG_KEY, "_wandb", "wandb_version")
LONGEST = 199
# The agent writes Python's None, alone or inside a list, where YAML needs null.
NONE = re.compile(r"(?<=[=\[, ])None(?=$|[\], ])")


def agent_overrides(arguments: list[str]) -> list[str]:
    """Return those of the agent's arguments that are settings, written as a user types them."""
    return [NONE.sub("null", argument) for argument in arguments if argument.partition("=")[0] not in NO_SETTINGS]


def trial_name(name: str) -> str:
    """Return a run name that is unique to the trial; a resumed trial gets the same name."""
    id = os.environ["WANDB_RUN_ID"]
    return f"{name[: LONGEST - len(id)]}-{id}"
