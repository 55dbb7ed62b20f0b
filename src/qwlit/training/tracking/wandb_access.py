"""Check the access to W&B: its mode, the API key, and whether the server answers."""

import contextlib
import os
from dataclasses import dataclass
from typing import Any, Literal

from qwlit.core.errors import ConfigError, one_line
from qwlit.core.ranks import under_agent
from qwlit.training.config import LoggerConfig


@dataclass(frozen=True)
class Access:
    """How W&B stores what is logged."""

    mode: Literal["online", "offline", "disabled"]
    reason: str = ""
    """Why the mode is not online."""


def find_access(*, verify: bool = False) -> Access:
    """Read W&B's settings and credentials; with `verify` also ask its server, which may take 10 s.

    Raises:
        ConfigError: a variable has a value that W&B does not take, the key is wrong, WANDB_MODE needs a key and none
            is set, or the server does not answer.
    """
    import wandb
    from pydantic import ValidationError
    from wandb.errors import AuthenticationError

    # qwlit prints W&B's address itself; W&B still prints warnings and errors.
    try:
        settings = wandb.setup(wandb.Settings(quiet=True, show_info=False)).settings
    except RuntimeError as error:
        # The user has no home folder, as in a container under a number that has no name.
        raise ConfigError(f"logger=wandb: {one_line(str(error))} Set HOME to a folder, or logger=none") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        name = f"WANDB_{'_'.join(map(str, wrong['loc'])).upper()}"
        said = one_line(f"{wrong['msg']}, not {wrong['input']!r}")
        raise ConfigError(f"logger=wandb: {name}: {said}; set or unset the environment variable") from None
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
    """Refuse now what would fail when the run starts, perhaps after hours of tokenizing. For rank 0.

    Raises:
        ConfigError: W&B cannot be reached, or the settings do not fit its mode.
    """
    if under_agent() and not logger.wandb:
        raise ConfigError(
            "logger=none: this is a trial of a W&B sweep (WANDB_SWEEP_ID is set), and the sweep would get no metrics;"
            " add logger=wandb to the sweep's command"
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
        raise ConfigError(
            f"this is a trial of a W&B sweep, and the sweep gets no metrics while W&B is {_described(access)};"
            " run `wandb login`, or unset WANDB_MODE"
        )
    if logger.upload_checkpoints:
        raise ConfigError(
            f"logger.upload_checkpoints=true needs W&B online, but W&B is {_described(access)}; set it to false"
        )


def _described(access: Access) -> str:
    return f"{access.mode} ({access.reason})"


def stop_client() -> None:
    """End W&B's helper process; it does not send what it has not sent yet."""
    import wandb

    # If the helper was killed, teardown raises one of several exceptions.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
