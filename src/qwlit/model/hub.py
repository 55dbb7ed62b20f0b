"""Download a model's files from the Hugging Face hub or ModelScope, or say in one line why that is not possible."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwlit.core.errors import ConfigError, first_line
from qwlit.core.extras import import_extra
from qwlit.core.waiting import PROBE_SECONDS, call_with_timeout

HubName = Literal["huggingface", "modelscope"]
CONFIG_FILES = ["config.json"]
TOKENIZER_FILES = ["*.json", "*.txt", "*.jinja"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def looks_like_hub_id(name: str) -> bool:
    """Whether the name has the form OWNER/NAME; a path such as ./NAME does not count."""
    return HUB_ID.fullmatch(name) is not None and not name.startswith(".")


@dataclass(frozen=True)
class _Client:
    """The client library of a hub."""

    name: str
    probe: Callable[[str], object]
    """Asks the hub for the model's info."""
    download: Callable[..., str]
    """Returns the local folder; `local_files_only=True` does not contact the hub."""
    refusals: dict[type[Exception], str]
    """What the hub refuses, by error."""
    answers: type[Exception]
    """Any other error that the hub answers with."""
    not_cached: type[Exception]


def fetch(hub_id: str, patterns: list[str], hub: HubName) -> Path:
    """Return a local folder with the repository's files that match the patterns; download only what the cache lacks.

    First ask the hub for the model's info, with a short time-out. Without a network the download would wait for a
    time-out per file and address.

    Raises:
        ConfigError: the hub cannot be reached and the cache has no copy; or the repository does not exist, is private
            or is gated.
    """
    if not looks_like_hub_id(hub_id):
        raise ConfigError(f"model.hub_id={hub_id} is no hub id, such as Qwen/Qwen3-0.6B; a folder is model.path=FOLDER")
    client = client_of(hub)
    try:
        call_with_timeout(PROBE_SECONDS, lambda: client.probe(hub_id))
        return Path(client.download(hub_id, allow_patterns=patterns))
    except tuple(client.refusals) as error:
        refusal = next(text for kind, text in client.refusals.items() if isinstance(error, kind))
        raise ConfigError(f"{hub_id} {refusal}") from None
    except Exception as error:  # the HTTP library of the hub client raises errors of its own
        answered = "answered" if isinstance(error, client.answers) else "cannot be reached"
        reason = f"{client.name} {answered}: {first_line(error)}"
    try:
        return Path(client.download(hub_id, allow_patterns=patterns, local_files_only=True))
    except client.not_cached:
        raise ConfigError(
            f"{hub_id} could not be fetched ({reason}); "
            "set model.path=FOLDER to a local copy, model.init=random with model.tokenizer=FOLDER, or experiment=demo"
        ) from None


def client_of(hub: HubName) -> _Client:
    """Import the client library of a hub.

    Raises:
        ConfigError: it is not installed.
    """
    return _modelscope() if hub == "modelscope" else _huggingface()


def _huggingface() -> _Client:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return _Client(
        "the hub",
        lambda hub_id: HfApi().model_info(hub_id, timeout=PROBE_SECONDS),
        snapshot_download,
        {
            GatedRepoError: "needs its licence accepted on the hub, and a token (hf auth login)",
            RepositoryNotFoundError: "is neither a folder here nor on the hub, or private (hf auth login)",
        },
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )


def _modelscope() -> _Client:
    api, downloads, errors = (
        import_extra(f"modelscope.hub.{name}", package="modelscope", setting="model.hub=modelscope")
        for name in ("api", "snapshot_download", "errors")
    )
    for logger in ("modelscope", "modelscope_hub"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    no_access = "needs access that you request on ModelScope, and a token (modelscope login)"
    return _Client(
        "ModelScope",
        lambda hub_id: api.HubApi().get_model(hub_id),
        downloads.snapshot_download,
        {
            errors.NotExistError: "is neither a folder here nor on ModelScope, or private (modelscope login)",
            errors.AuthenticationError: no_access,
            errors.PermissionDeniedError: no_access,
        },
        errors.APIError,
        errors.CacheNotFound,
    )
