"""Find and read the safetensors files of a model folder."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlit.core.errors import ConfigError
from qwlit.model.folder import INDEX, WEIGHTS, read_json_object

if TYPE_CHECKING:
    import torch

Files = Mapping[Path, frozenset[str] | None]
"""The tensors to read from each file: those that the index names; None: all, because there is no index."""
# Older versions of transformers saved these buffers; the model computes them from its configuration.
COMPUTED_BUFFERS = ("rotary_emb.inv_freq",)


def weight_files(folder: Path) -> Files:
    """Return the files that make up the model.

    Raises:
        ConfigError: there are no such files, or the index names one that is missing or outside of the folder.
    """
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).is_file():
        pickled = sorted(entry.name for entry in folder.glob("*.bin"))
        if pickled:
            raise ConfigError(
                f"{folder} has only pickled weights ({pickled[0]}), which can run code when read; convert them: "
                "save_pretrained in transformers writes safetensors"
            )
        raise ConfigError(f"{folder} has no weights ({WEIGHTS}); copy them there, or set model.init=random")
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    tensors: dict[str, set[str]] = defaultdict(set)
    for tensor, file in (weight_map if isinstance(weight_map, dict) else {}).items():
        tensors[str(file)].add(str(tensor))
    if outside := [file for file in tensors if Path(file).name != file]:
        raise ConfigError(f"{folder / INDEX} names {outside[0]}, which is no file of its folder; copy the model again")
    missing = sorted(file for file in tensors if not (folder / file).is_file())
    if missing or not tensors:
        raise ConfigError(f"{folder / INDEX} names missing files: {first_few(missing) or 'none at all'}; copy them too")
    return {folder / file: frozenset(tensors[file]) for file in sorted(tensors)}


def read_shapes(files: Files) -> dict[str, list[int]]:
    """Return each tensor's shape by its name, from the files' headers. It raises what `read_tensors` raises."""
    return {name: list(tensor.get_shape()) for name, tensor in _read_headers(files)}


def _read_headers(files: Files) -> Iterator[tuple[str, Any]]:
    """Yield what `read_tensors` yields, from one opening of each file: enough for shapes and dtypes."""
    for file, wanted in files.items():
        with _open(file) as opened:
            for name in _names(opened, file, wanted):
                yield name, opened.get_slice(name)


def read_tensors(files: Files) -> Iterator[tuple[str, Any]]:
    """Yield each tensor's name and a handle. A slice of the handle reads only those rows from the file.

    If two files have the same tensor, it comes from the file that the index names, as in transformers.

    Raises:
        ConfigError: a file is cut off or damaged, or lacks a tensor that the index names.
    """
    for file, wanted in files.items():
        with _open(file) as opened:
            names = _names(opened, file, wanted)
        for name in names:
            # The pages of an open file that were read count as the process's memory, so open it for each one.
            with _open(file) as opened:
                yield name, opened.get_slice(name)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is cut off or damaged ({error}); copy or download it again") from None


def _names(opened: Any, file: Path, wanted: frozenset[str] | None) -> list[str]:
    """Return the names of the tensors to read from an open file."""
    names = list(opened.keys())
    if wanted is not None and (absent := sorted(wanted.difference(names))):
        raise ConfigError(f"{file} lacks {first_few(absent)}, which the index says it holds; copy it again")
    return [name for name in names if (wanted is None or name in wanted) and not name.endswith(COMPUTED_BUFFERS)]


def stored_dtype(folder: Path) -> "torch.dtype":
    """Return the dtype that most tensors of the folder's weights have."""
    import torch

    # safetensors' names of the dtypes that can be trained.
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    counts = Counter(str(tensor.get_dtype()) for _, tensor in _read_headers(weight_files(folder)))
    (most, _), *_ = counts.most_common(1)
    if most not in names:
        raise ConfigError(f"{folder}: the weights are of type {most}; give the model in {', '.join(names)}")
    return names[most]


# Enough blocks to detect other weights, and few enough to read quickly from a model of any size.
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096


def fingerprint_files(files: Files) -> str:
    """Return a hash of names, sizes, headers and evenly spaced blocks of the files."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            for block in range(SAMPLED_BLOCKS + 1):
                handle.seek(max(0, size - BLOCK_BYTES) * block // SAMPLED_BLOCKS)
                digest.update(handle.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def describe_differences(found: Mapping[str, list[int]], expected: Mapping[str, list[int]], *, unexpected: str) -> str:
    """Name the tensors that are missing, unexpected or of another shape; return "" if there are none.

    Args:
        unexpected: what the message calls tensors that are not expected.
    """
    findings = {
        "missing": [name for name in expected if name not in found],
        unexpected: [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    return "; ".join(f"{what}: {first_few(names)}" for what, names in findings.items() if names)


def first_few(names: list[str]) -> str:
    """Name the first three, and say how many more there are."""
    limit = 3
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
