"""Stores damaged in twelve ways, three examples each."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.stores import tokens

NUM_SAMPLES, MEAN_LENGTH = 525, 130
META, HASHES, QUARANTINE, TOKENS = "meta.json", "hashes.bin", "quarantine.jsonl", "tokens.bin"


def rows(shift: int) -> list[Any]:
    """Two bad rows, and samples of several blocks; other samples for another shift, in files of the same sizes."""
    lengths = [MEAN_LENGTH - 10 + (index + shift) % 21 for index in range(NUM_SAMPLES)]
    return [b"{", *(tokens((index + shift) % 500, length) for index, length in enumerate(lengths)), b"{" * (1 + shift)]


@dataclass(frozen=True)
class Broken:
    """One way to damage a store."""

    damage: Callable[[Path, Path], object]
    """Damages the store in the first folder; the second one holds another store."""
    file: str
    """The file that must be named."""


def flip(file: str, bit: int = 0) -> Broken:
    """Flip a bit in the middle of the file, counted from the lowest one of a number."""

    def damage(folder: Path, other: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 8 * 4 + bit // 8] ^= 1 << bit % 8
        (folder / file).write_bytes(content)

    return Broken(damage, file)


def zero_page(file: str) -> Broken:
    """A page in the middle, or a small file up to there."""

    def damage(folder: Path, other: Path) -> None:
        content = (folder / file).read_bytes()
        start = len(content) // 2 // 4096 * 4096
        page = bytes(min(4096, len(content) - start))
        (folder / file).write_bytes(content[:start] + page + content[start + len(page) :])

    return Broken(damage, file)


def resize(file: str, by: int) -> Broken:
    return Broken(lambda folder, other: os.truncate(folder / file, (folder / file).stat().st_size + by), file)


def cut_to(share: float) -> Broken:
    return Broken(
        lambda folder, other: os.truncate(folder / TOKENS, int((folder / TOKENS).stat().st_size * share)), TOKENS
    )


def copy(*files: str, named: str = "") -> Broken:
    def damage(folder: Path, other: Path) -> None:
        for file in files:
            shutil.copy(other / file, folder)

    return Broken(damage, named or files[0])


def copy_all_but(*files: str, named: str) -> Broken:
    def damage(folder: Path, other: Path) -> None:
        shutil.copytree(other, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*files))

    return Broken(damage, named)


def edit(change: Callable[[dict[str, Any]], object]) -> Broken:
    def damage(folder: Path, other: Path) -> None:
        meta = json.loads((folder / META).read_text())
        change(meta)
        (folder / META).write_text(json.dumps(meta))

    return Broken(damage, META)


def remove(file: str) -> Broken:
    return Broken(lambda folder, other: (folder / file).unlink(), file)


def replace(file: str, make: Callable[[Path], object]) -> Broken:
    def damage(folder: Path, other: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return Broken(damage, file)


KINDS = {
    "a flipped bit": (flip(TOKENS), flip(TOKENS, bit=31), flip("ends.bin")),
    "a page of zeros": (zero_page(TOKENS), zero_page("lengths.bin"), zero_page("row_digests.bin")),
    "truncated": (resize(TOKENS, -4), resize("lines.bin", -4), resize(QUARANTINE, -1)),
    "extended": (resize(TOKENS, 4), resize("sources.bin", 4096), resize(HASHES, 8)),
    "another store's file": (copy(TOKENS), copy("lengths.bin"), copy("row_digests.bin")),
    "another store's content": (
        copy_all_but(named=META),
        copy_all_but(META, named=HASHES),
        copy_all_but(META, HASHES, named="lengths.bin"),
    ),
    "meta.json edited": (
        edit(lambda meta: meta["account"].update(read=1)),
        edit(lambda meta: meta["bytes"].update({TOKENS: 0})),
        edit(lambda meta: meta.pop("seal")),
    ),
    "another store's meta.json": (copy(META), copy(META, HASHES), edit(lambda meta: meta.update(fingerprint="0" * 64))),
    "the list of hashes": (flip(HASHES), remove(HASHES), resize(HASHES, -8)),
    "a missing file": (remove(TOKENS), remove(META), remove(QUARANTINE)),
    "no file": (
        replace(TOKENS, Path.mkdir),
        replace("lengths.bin", os.mkfifo),
        replace(META, lambda path: path.symlink_to(path)),
    ),
}
"""What is found at the start of a training."""
WHILE_READ = (cut_to(0), cut_to(0.5), flip(TOKENS))
"""What happens while a process reads the store."""
CASES = [(kind, number) for kind in KINDS for number in range(3)]
