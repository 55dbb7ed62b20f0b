"""Read data with the library `datasets`: from the Hugging Face hub, and from folders that `save_to_disk` wrote."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwlit.core.errors import DataError, first_line
from qwlit.core.files import load_json, read_small_text
from qwlit.core.waiting import PROBE_SECONDS, call_with_timeout
from qwlit.data.files import File
from qwlit.data.rows import MAX_ROW_BYTES, QuarantinedRow, Row
from qwlit.data.table_process import decoding, quarantined_row

HUB = "hf:"
SPLITS, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"
DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class HubData:
    """One split of a data set on the hub."""

    name: str
    """ORG/NAME, or a folder that `datasets` can load."""
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{HUB}{'/'.join(filter(None, (self.name, self.config)))}:{self.split}"

    def estimated_bytes(self) -> float:
        return float("inf")  # known only after the download, and usually large

    def digest(self, cache_root: Path) -> str:
        """Return the library's fingerprint of the data."""
        return f"{self.split} {self.load()._fingerprint}"

    def load(self) -> Any:
        """Return the split as a sequence of rows, from the hub or, if the hub cannot be reached, from the local cache.

        Raises:
            DataError: neither has this data.
        """
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        logging.getLogger("datasets").setLevel(logging.ERROR)
        unreachable = None if Path(self.name).is_dir() else self._why_unreachable()
        try:
            with _offline() if unreachable else nullcontext():
                return datasets.load_dataset(self.name, self.config, split=self.split)
        except Exception as error:  # the network, the hub, or the files of the data set
            reason = (unreachable or first_line(error))[:200]
            raise DataError(
                f"{self} cannot be loaded ({reason}); if the hub cannot be reached, set data.path to files,"
                " or HF_HOME to a cache that has it"
            ) from None

    def slices(self, source_index: int) -> Iterator[Any]:
        """Yield all rows as Arrow batches, and a QuarantinedRow for one that is too long.

        Raises:
            DataError: as `load`.
        """
        from qwlit.data.table_worker import BATCH_ROWS, long_row, slices

        line = 0
        for table in self.load().with_format("arrow").iter(BATCH_ROWS):
            for part, size in (each for batch in table.to_batches() for each in slices(batch, MAX_ROW_BYTES)):
                line += part.num_rows
                is_long = size > MAX_ROW_BYTES
                yield quarantined_row(source_index, line, long_row(part, size)) if is_long else part

    def _why_unreachable(self) -> str | None:
        """Return why the hub cannot be reached, None if it can. Without this check `datasets` retries for 30 s."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            call_with_timeout(PROBE_SECONDS, lambda: HfApi().dataset_info(self.name, timeout=PROBE_SECONDS))
        except HfHubHTTPError:
            return None  # the hub answered: `datasets` reports what is wrong
        except Exception as error:  # the error type depends on the HTTP library of the hub client
            return f"the hub cannot be reached: {first_line(error)}"
        return None


@contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` and `huggingface_hub` read only their caches."""
    import datasets.config
    import huggingface_hub.constants

    # The libraries read their environment variables only at import, so change their constants instead.
    settings: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


def parse_hub_path(path: str) -> HubData:
    """Parse hf:ORG/NAME[/CONFIG][:SPLIT], or raise DataError."""
    match = re.fullmatch(r"([^:]+)(?::(.+))?", path.removeprefix(HUB))
    if match is None:
        raise DataError(f"data.path={path}: write hf:ORG/NAME, hf:ORG/NAME:SPLIT or hf:ORG/NAME/CONFIG:SPLIT")
    name, split = match.group(1), match.group(2) or DEFAULT_SPLIT
    if name.startswith((os.sep, ".")):
        return HubData(name, None, split)
    organisation, *rest = name.split("/")
    config = "/".join(rest[1:]) or None
    return HubData("/".join((organisation, *rest[:1])), config, split)


@dataclass(frozen=True)
class SavedData:
    """A folder that `datasets.save_to_disk` wrote: Arrow files, and a JSON file that lists them."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def _arrow_files(self) -> list[File]:
        """Return the Arrow files in their order.

        Raises:
            DataError: the JSON file that lists them is damaged.
        """
        try:
            state = load_json(read_small_text(self.path / STATE))
            return [File(self.path / Path(entry["filename"]).name) for entry in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"data folder '{self}' was written by save_to_disk, but its {STATE} is damaged") from None

    def estimated_bytes(self) -> float:
        return float(sum(file.num_bytes() for file in self._arrow_files() if file.path.is_file()))

    def digest(self, cache_root: Path) -> str:
        """Return a hash of the Arrow files' content; see `File.digest`."""
        digests = [file.digest(cache_root) for file in self._arrow_files()]
        return hashlib.sha256(json.dumps(digests).encode("utf-8")).hexdigest()

    def known_digest(self, cache_root: Path) -> str | None:
        """Return the cached digest; None if a file is new or has changed."""
        known = all(file.known_digest(cache_root) for file in self._arrow_files())
        return self.digest(cache_root) if known else None

    def slices(self, source_index: int) -> Iterator[Any]:
        """Yield all rows as Arrow batches, and a QuarantinedRow for one that is too long.

        Raises:
            DataError: a file is damaged.
        """
        line = 0
        for file in self._arrow_files():
            with decoding(file, "Arrow") as table:
                for part in table.slices(source_index, line):
                    line += 1 if isinstance(part, QuarantinedRow) else part.num_rows
                    yield part


def find_saved_data(path: str, root: Path) -> SavedData | None:
    """Return the data set that `save_to_disk` wrote into the folder, or its split `train`; None for other folders.

    Raises:
        DataError: the folder has several splits, but none called `train`.
    """
    if (root / STATE).is_file() and (root / INFO).is_file():
        return SavedData(root)
    if not (root / SPLITS).is_file():
        return None
    if (root / DEFAULT_SPLIT / STATE).is_file():
        return SavedData(root / DEFAULT_SPLIT)
    splits = sorted(child.name for child in root.iterdir() if (child / STATE).is_file())
    named = ", ".join(f"{path.rstrip('/')}/{name}" for name in splits) or "but the folder of every split is missing"
    raise DataError(f"data folder '{path}' is a DatasetDict without the split '{DEFAULT_SPLIT}'; name one: {named}")


def read_data_set(source_index: int, source: HubData | SavedData) -> Iterator[Row | QuarantinedRow]:
    """Read the rows of a source; `line` counts them from 1.

    Raises:
        DataError: the data set cannot be loaded, or cannot be read to its end.
    """
    num_read = 0
    for part in source.slices(source_index):
        if isinstance(part, QuarantinedRow):
            num_read += 1
            yield part
            continue
        try:
            rows = _python_rows(part)
        except Exception as error:  # pyarrow and the features of `datasets` raise many types
            raise DataError(f"{source} cannot be read after row {num_read}: {first_line(error)[:200]}") from None
        yield from (Row(source_index, line, columns) for line, columns in enumerate(rows, start=num_read + 1))
        num_read += len(rows)


def _python_rows(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of an Arrow batch as Python values."""
    import datasets
    import pyarrow

    # The schema says how `datasets` reads the columns.
    dataset = datasets.Dataset(pyarrow.Table.from_batches([batch]))
    # Rows with images or audio are quarantined, so do not decode them: that would need more libraries.
    for column, feature in dataset.features.items():
        if hasattr(feature, "decode") and type(feature).__name__ != "Json":
            dataset = dataset.cast_column(column, replace(feature, decode=False))
    return list(dataset)
