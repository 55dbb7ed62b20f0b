"""Download a model's files from the Hugging Face hub, or say in one line why that is not possible."""

import logging
import re
from pathlib import Path

from qwlit.core.errors import ConfigError, first_line
from qwlit.core.waiting import PROBE_SECONDS, call_with_timeout

CONFIG_FILES = ["config.json"]
TOKENIZER_FILES = ["*.json", "*.txt", "*.jinja"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def looks_like_hub_id(name: str) -> bool:
    """Whether the name has the form OWNER/NAME; a path such as ./NAME does not count."""
    return HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def fetch(hub_id: str, patterns: list[str]) -> Path:
    """Return a local folder with the repository's files that match the patterns; download only what the cache lacks.

    First ask the hub for the model's info, with a short time-out. Without a network the download would wait for a
    time-out per file and address.

    Raises:
        ConfigError: the hub cannot be reached and the cache has no copy; or the repository does not exist, is private
            or is gated.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if not looks_like_hub_id(hub_id):
        raise ConfigError(f"model.hub_id={hub_id} is no hub id, such as Qwen/Qwen3-0.6B; a folder is model.path=FOLDER")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        call_with_timeout(PROBE_SECONDS, lambda: HfApi().model_info(hub_id, timeout=PROBE_SECONDS))
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError:
        raise ConfigError(f"{hub_id} needs its licence accepted on the hub, and a token (hf auth login)") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"{hub_id} is neither a folder here nor on the hub, or private (hf auth login)") from None
    except HfHubHTTPError as error:
        reason = f"the hub answered: {str(error).splitlines()[0]}"
    except Exception as error:  # the HTTP library of the hub client raises errors of its own
        reason = f"the hub cannot be reached: {first_line(error)}"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{hub_id} could not be fetched ({reason}); "
            "set model.path=FOLDER to a local copy, model.init=random with model.tokenizer=FOLDER, or experiment=demo"
        ) from None
