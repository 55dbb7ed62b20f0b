"""What `data.path` names: files, folders, globs, and data sets of the Hugging Face hub."""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwlit.core.errors import DataError, nearest
from qwlit.core.files import resolve_path, write_json_atomic
from qwlit.core.waiting import PROBE_SECONDS, answer_within

JSON, TABLE, TEXT = "JSON", "table", "text"
KINDS = {".jsonl": JSON, ".json": JSON, ".parquet": TABLE, ".csv": TABLE, ".txt": TEXT}
COMPRESSED = ".gz"
HUB = "hf:"
# Assumption: text in gzip or Parquet takes about a fifth of its size.
TYPICAL_COMPRESSION = 5
# A file changed within so short a time of being hashed might change again without its time stamp telling.
RACY_SECONDS = 2.0


@dataclass(frozen=True)
class File:
    """One data file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def suffix(self) -> str:
        """The ending that tells what is in it, without `.gz`."""
        name = self.path.name.lower().removesuffix(COMPRESSED)
        return Path(name).suffix

    @property
    def is_compressed(self) -> bool:
        return self.path.name.lower().endswith(COMPRESSED)

    @property
    def is_readable_kind(self) -> bool:
        return self.suffix in KINDS and not (self.is_compressed and self.suffix == ".parquet")

    @property
    def name(self) -> str:
        return self.path.name

    def num_bytes(self) -> int:
        return self.path.stat().st_size

    def estimated_bytes(self) -> float:
        return self.num_bytes() * (TYPICAL_COMPRESSION if self.is_compressed or self.suffix == ".parquet" else 1)

    def digest(self, cache_root: Path) -> str:
        """Return the SHA-256 of the content; kept in `cache_root`, so that an unchanged file is not read again."""
        try:
            if (found := self.known_digest(cache_root)) is not None:
                return found
            stat = self.path.stat()
            with self.path.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"data file '{self}' cannot be read: {error.strerror}") from error
        if time.time() - stat.st_ctime > RACY_SECONDS:
            cache_root.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._note(cache_root), {"stamp": _stamp(stat), "sha256": digest})
        return digest

    def known_digest(self, cache_root: Path) -> str | None:
        """Return the digest if an unchanged file has been read before."""
        try:
            entry = json.loads(self._note(cache_root).read_text(encoding="utf-8"))
            return str(entry["sha256"]) if entry["stamp"] == _stamp(self.path.stat()) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _note(self, cache_root: Path) -> Path:
        return cache_root / f"{hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:32]}.digest"


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


@dataclass(frozen=True)
class HubData:
    """A split of a data set on the hub, read through the library `datasets`."""

    name: str
    """ORG/NAME, or a folder that `datasets` can load."""
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{HUB}{'/'.join(filter(None, (self.name, self.config)))}:{self.split}"

    def estimated_bytes(self) -> float:
        return float("inf")  # known only once it is here, and seldom small

    def digest(self, cache_root: Path) -> str:
        """Return the library's fingerprint of the data."""
        return f"{self.split} {self.load()._fingerprint}"

    def load(self) -> Any:
        """Return the split as a sequence of rows: from the hub, or where it cannot be reached from the cache.

        Raises:
            DataError: neither has such data.
        """
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        logging.getLogger("datasets").setLevel(logging.ERROR)
        unreachable = None if Path(self.name).is_dir() else self._probe()
        try:
            with _offline() if unreachable else nullcontext():
                return datasets.load_dataset(self.name, self.config, split=self.split)
        except Exception as error:  # of the network, of the hub, of the data set's own files
            reason = (unreachable or str(error) or type(error).__name__).splitlines()[0][:200]
            raise DataError(
                f"{self} cannot be loaded ({reason}); where the hub cannot be reached, set data.path to files,"
                " or HF_HOME to a cache that holds it"
            ) from None

    def _probe(self) -> str | None:
        """Return why the hub cannot be asked for the data: left alone, the library retries for half a minute."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            answer_within(PROBE_SECONDS, lambda: HfApi().dataset_info(self.name, timeout=PROBE_SECONDS))
        except HfHubHTTPError:
            return None  # it was reached; the library knows best what its answer means
        except Exception as error:  # whatever HTTP library the hub client uses has its own family of errors
            return f"the hub cannot be reached: {(str(error) or type(error).__name__).splitlines()[0]}"
        return None


@contextmanager
def _offline() -> Iterator[None]:
    """Let the libraries look into their caches only."""
    import datasets.config
    import huggingface_hub.constants

    settings: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


Source = File | HubData


def find_sources(path: str) -> list[Source]:
    """Return what `path` names: a file, a folder's data files in sorted order, a glob's, or a data set of the hub.

    Raises:
        DataError: nothing is there, or nothing of a known kind, or files of several kinds.
    """
    if not path:
        raise DataError("data.path or data.val_path: a path is empty")
    if path.startswith(HUB):
        return [_hub_data(path)]
    root = resolve_path(path)
    try:
        if root.is_dir():
            return _folder(path, root)
        if root.is_file():
            file = File(root)
            if not file.is_readable_kind:
                raise DataError(f"data file '{path}' must end in {', '.join(KINDS)} (text ones also {COMPRESSED})")
            return [file]
        if re.search(r"[*?\[]", path):
            return _glob(path, root)
        if root.is_symlink() or root.exists():
            what = "a link that leads nowhere" if root.is_symlink() else "neither a file nor a folder"
            raise DataError(f"data.path or data.val_path: '{path}' is {what}")
        names = [child.name for child in root.parent.iterdir()] if root.parent.is_dir() else []
    except OSError as error:
        raise DataError(f"data.path or data.val_path: '{path}' cannot be read: {error.strerror}") from error
    raise DataError(f"data.path or data.val_path: '{path}' does not exist.{nearest(root.name, names)}")


def _hub_data(path: str) -> HubData:
    match = re.fullmatch(r"([^:]+)(?::(.+))?", path.removeprefix(HUB))
    if match is None:
        raise DataError(f"data.path={path}: write hf:ORG/NAME, hf:ORG/NAME:SPLIT or hf:ORG/NAME/CONFIG:SPLIT")
    name, split = match.group(1), match.group(2) or "train"
    if name.startswith((os.sep, ".")):
        return HubData(name, None, split)
    organisation, *rest = name.split("/")
    config = "/".join(rest[1:]) or None
    return HubData("/".join((organisation, *rest[:1])), config, split)


def _folder(path: str, root: Path) -> list[Source]:
    children = [File(child) for child in sorted(root.iterdir()) if child.name[0] not in "._"]
    named = [file for file in children if file.is_readable_kind]
    if lost := [file for file in named if not file.path.exists()]:
        raise DataError(f"data folder '{path}': {lost[0]} is a link that leads nowhere")
    files = [file for file in named if file.path.is_file()]
    if not files:
        deeper = any(child.is_dir() and child.name[0] not in "._" for child in root.iterdir())
        hint = f"; for folders in it write '{path.rstrip('/')}/**/*.jsonl'" if deeper else ""
        raise DataError(f"data folder '{path}' holds no {', '.join(KINDS)} file{hint}")
    return _of_one_kind(path, files)


def _glob(path: str, root: Path) -> list[Source]:
    # pathlib's ** does not follow links to folders, which may lead in circles.
    start = Path(root.anchor)
    try:
        found = sorted(start.glob(str(root.relative_to(start))))
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"data.path or data.val_path: '{path}' is no pattern: {error}") from None
    # Like folders, and like a shell, a pattern takes hidden files and folders only where it names them.
    found = [child for child in found if not any(p[0] in "._" for p in child.parts if p not in root.parts)]
    files = [File(child) for child in {child.resolve(): child for child in found if child.is_file()}.values()]
    if not files:
        raise DataError(f"data.path or data.val_path: no file matches '{path}'")
    if unknown := [file for file in files if not file.is_readable_kind]:
        raise DataError(f"'{path}' matches {unknown[0]}, which does not end in {', '.join(KINDS)}")
    return _of_one_kind(path, files)


def _of_one_kind(path: str, files: list[File]) -> list[Source]:
    """A README.txt beside the rows is not data; rather ask than train on it."""
    kinds = {KINDS[file.suffix] for file in files}
    if len(kinds) > 1:
        suffixes = sorted({file.suffix for file in files})
        raise DataError(f"'{path}' holds {' and '.join(suffixes)} files; name one kind, e.g. '*{suffixes[0]}'")
    return list(files)
