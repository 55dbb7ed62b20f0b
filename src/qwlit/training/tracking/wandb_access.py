"""Whether W&B is to be reached: its mode, an API key, a server that answers."""

import contextlib
import os
from dataclasses import dataclass
from typing import Any, Literal

from qwlit.core.errors import ConfigError, one_line
from qwlit.core.ranks import under_agent
from qwlit.training.tracking.config import LoggerConfig


@dataclass(frozen=True)
class Access:
    """How W&B takes what is logged."""

    mode: Literal["online", "offline", "disabled"]
    reason: str = ""
    """Why it is not online."""


def find_access(*, verify: bool = False) -> Access:
    """Ask W&B's settings and credentials; with `verify` also its server, which may take 10 s.

    Raises:
        ConfigError: the key is wrong, there is none though WANDB_MODE asks for one, or the server does not answer.
    """
    import wandb
    from wandb.errors import AuthenticationError

    # What a person has to know, we say; warnings and errors are still W&B's own.
    settings = wandb.setup(wandb.Settings(quiet=True, show_info=False)).settings
    if settings.mode in ("disabled", "offline", "dryrun"):
        chosen: Any = "disabled" if settings.mode == "disabled" else "offline"
        return Access(chosen, f"WANDB_MODE={settings.mode}" if "WANDB_MODE" in os.environ else f"`wandb {chosen}`")
    try:
        logged_in = wandb.login(prompt=False, verify=verify)
    except AuthenticationError as error:
        raise ConfigError(
            f"logger=wandb: {one_line(str(error))} Is there a network, and is the key right (`wandb login --relogin`)?"
            " Else set WANDB_MODE=offline or logger=none"
        ) from None
    if logged_in:
        return Access("online")
    if "WANDB_MODE" in os.environ:
        raise ConfigError(
            f"WANDB_MODE={os.environ['WANDB_MODE']}, but there is no API key; run `wandb login`,"
            " or set WANDB_MODE=offline or logger=none"
        )
    return Access("offline", "no API key, `wandb login` sets one")


def project_of(logger: LoggerConfig) -> str:
    return logger.project or os.environ.get("WANDB_PROJECT") or "qwlit"


def check_logger(logger: LoggerConfig) -> None:
    """Refuse now what would fail when the run begins, which may be hours of tokenizing later. For rank 0.

    Raises:
        ConfigError: W&B cannot be reached, or the settings do not go with how it is.
    """
    if under_agent() and not logger.wandb:
        raise ConfigError(
            "logger=none: this is a trial of a W&B sweep (WANDB_SWEEP_ID is set), which would see nothing of it;"
            " write logger=wandb into the sweep's command"
        )
    if not logger.wandb:
        return
    try:
        access = find_access(verify=True)
    finally:
        stop_client()
    if access.mode == "online":
        return
    if under_agent():
        raise ConfigError(f"this is a trial of a W&B sweep, which sees nothing of a run that is {_described(access)}")
    if logger.upload_checkpoints:
        raise ConfigError(
            f"logger.upload_checkpoints=true needs W&B online, and it is {_described(access)}; set it false"
        )


def _described(access: Access) -> str:
    return f"{access.mode} ({access.reason})"


def stop_client() -> None:
    """End W&B's helper process. What it has not sent by now is not sent."""
    import wandb

    # It may have been killed, and then says so in one way or another.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
