"""The files of a store, and how each is proven to be what was written.

meta.json is bound to the folder's name and holds its own hash, the size of each file, and the hash of hashes.bin, which
holds a hash of every block. So from the name on, everything that is read is verified.
"""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwlit.core.files import fsync_folder, write_json_atomic, write_text_atomic
from qwlit.data.blocks import Damage, HashedFile, HashedWriter, content_hash, damage_of, num_blocks, read_file
from qwlit.data.encoded_batch import DTYPES

# Part of the folder's name, so that stores of other versions are left alone.
LAYOUT_VERSION = 2
META, HASHES, QUARANTINE, MARKER = "meta.json", "hashes.bin", "quarantine.jsonl", "damaged.txt"
HASH_DTYPE = "<u8"
# The loss mask is the highest bit of each token: a sample is then one range of one file.
TOKENS, TOKENS_DTYPE, MASK_BIT = "tokens", "<u4", 31
ENDS = "ends"
COLUMNS = {name: dtype for name, dtype in DTYPES.items() if name not in (TOKENS, "mask")} | {ENDS: "<i8"}
"""The arrays with one number per sample: those of a batch, and where in the tokens each sample ends."""
MOST_MARKED = 1000


def store_folder(cache_root: Path, fingerprint: str) -> Path:
    return cache_root / f"{fingerprint[:32]}-{LAYOUT_VERSION}"


def array_file(name: str) -> str:
    return f"{name}.bin"


FILES = (*map(array_file, (TOKENS, *COLUMNS)), QUARANTINE)
"""The files whose blocks have hashes, in the order of hashes.bin."""


def write_meta(folder: Path, facts: dict[str, Any], files: Iterable[HashedWriter]) -> None:
    """Write the hashes of finished files, and meta.json with `facts`, among them the fingerprint."""
    written = {file.path.name: file for file in files}
    hashes = np.array([h for name in FILES for h in written[name].hashes], dtype=HASH_DTYPE).tobytes()
    with closing(HashedWriter(folder / HASHES)) as file:
        file.write(hashes)
    sizes = {name: written[name].num_bytes for name in FILES}
    facts = facts | {"bytes": sizes, "hashes": content_hash(hashes)}
    write_json_atomic(folder / META, facts | {"seal": _seal(facts)})


def _seal(facts: dict[str, Any]) -> int:
    return content_hash(json.dumps(facts, sort_keys=True).encode("utf-8"))


class StoreFolder:
    """A finished store's folder. Its files stay open: they can be read also after the folder is deleted or replaced."""

    def __init__(self, path: Path) -> None:
        """Verify meta.json, hashes.bin and the sizes of all files.

        Raises:
            Damage: a file is missing or not what was written, or the folder is marked as damaged.
        """
        self.path = path
        try:
            self._inode = path.stat().st_ino
        except OSError as error:
            raise damage_of(path, error) from None
        if (reason := marked_damage(path)) is not None:
            raise Damage(reason)
        self.facts = _read_meta(path)
        sizes = self.facts["bytes"]
        ends = np.cumsum([num_blocks(sizes[name]) for name in FILES])
        data = read_file(path / HASHES)
        if content_hash(data) != self.facts["hashes"]:
            raise Damage(f"{HASHES} is not what was written")
        hashes = np.split(np.frombuffer(data, HASH_DTYPE), ends[:-1])
        self.files = {name: HashedFile(path / name, sizes[name], of) for name, of in zip(FILES, hashes, strict=True)}

    def column(self, name: str) -> NDArray[Any]:
        """Read and verify an array with one number per sample."""
        return np.frombuffer(b"".join(self.files[array_file(name)].blocks()), COLUMNS[name])

    def mark_damaged(self, reason: str) -> bool:
        """Note that the folder is damaged, unless another process has built it again; return whether that worked."""
        try:
            if self.path.stat().st_ino == self._inode:
                write_text_atomic(self.path / MARKER, reason)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(read_file(folder / META))
        seal, name = facts.pop("seal"), store_folder(folder.parent, facts["fingerprint"]).name
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damage(f"{META} is not what was written") from None
    if seal != _seal(facts):
        raise Damage(f"{META} is not what was written")
    if name != folder.name:
        raise Damage(f"{META} is that of another store")
    return facts


def marked_damage(folder: Path) -> str | None:
    """Return the damage that a process found in the folder; None if none did."""
    try:
        return read_file(folder / MARKER)[:MOST_MARKED].decode("utf-8", errors="replace")
    except Damage:
        return None


def replace_folder(folder: Path, temporary: Path) -> None:
    """Give `temporary` the name `folder`, in place of what has it now. The caller holds the lock on `folder`."""
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.damaged.tmp")
    if os.path.lexists(folder):
        # Other processes go on reading the files that they have opened.
        folder.rename(replaced)
    # Renaming is atomic: a folder with the final name is always complete.
    temporary.rename(folder)
    fsync_folder(folder.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Remove a folder or file, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
