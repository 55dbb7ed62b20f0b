"""Find the sources that `data.path` names: files, folders, globs, and data sets of the Hugging Face hub."""

import re
from pathlib import Path

from qwlit.core.errors import DataError, nearest
from qwlit.core.files import resolve_path
from qwlit.data.files import COMPRESSED, KINDS, File
from qwlit.data.hub import HUB, HubData, SavedData, find_saved_data, parse_hub_path

__all__ = ["File", "HubData", "SavedData", "Source", "find_sources"]

Source = File | HubData | SavedData


def find_sources(path: str) -> list[Source]:
    """Return the sources that `path` names: one file, the sorted data files of a folder or glob, or one data set
    from the hub or from a folder that `save_to_disk` wrote.

    Raises:
        DataError: the path does not exist, has no file of a known kind, or has files of several kinds.
    """
    if not path:
        raise DataError("data.path or data.val_path: a path is empty")
    if path.startswith(HUB):
        return [parse_hub_path(path)]
    root = resolve_path(path)
    try:
        if root.is_dir():
            saved = find_saved_data(path, root)
            return [saved] if saved else _folder_files(path, root)
        if root.is_file():
            file = File(root)
            if not file.is_readable_kind:
                raise DataError(f"data file '{path}' must end in {', '.join(KINDS)} (text ones also {COMPRESSED})")
            return [file]
        if re.search(r"[*?\[]", path):
            return _glob_files(path, root)
        if root.is_symlink() or root.exists():
            what = "a broken link" if root.is_symlink() else "neither a file nor a folder"
            raise DataError(f"data.path or data.val_path: '{path}' is {what}")
        names = [child.name for child in root.parent.iterdir()] if root.parent.is_dir() else []
    except OSError as error:
        raise DataError(f"data.path or data.val_path: '{path}' cannot be read: {error.strerror}") from error
    hint = _hint(path) or nearest(root.name, names)
    # The settings of an earlier run may have been written in another folder.
    here = "" if hint or root.is_absolute() else f" A relative path starts at the current folder, {Path.cwd()}."
    raise DataError(f"data.path or data.val_path: '{path}' does not exist.{hint or here}")


def _hint(path: str) -> str:
    """Return how to write what the missing path seems to mean; "" if it looks like a path."""
    if "\\" in path:
        return " Is it a Windows path? Write it with /, on WSL as /mnt/c/…"
    if re.match(r"[\w-]+:\s*\S", path):
        return " For validation sets with names write 'data.val_path={NAME: PATH, NAME: PATH}'."
    return " For several files write [a,b]." if "," in path else ""


def _folder_files(path: str, root: Path) -> list[Source]:
    children = [File(child) for child in sorted(root.iterdir()) if child.name[0] not in "._"]
    named = [file for file in children if file.is_readable_kind]
    if broken := [file for file in named if not file.path.exists()]:
        raise DataError(f"data folder '{path}': {broken[0]} is a broken link")
    files = [file for file in named if file.path.is_file()]
    if not files:
        deeper = any(child.path.is_dir() for child in children)
        hint = f"; for folders in it write '{path.rstrip('/')}/**/*.jsonl'" if deeper else ""
        raise DataError(f"data folder '{path}' has no {', '.join(KINDS)} file{hint}")
    return _require_one_kind(path, files)


def _glob_files(path: str, root: Path) -> list[Source]:
    # pathlib's ** does not follow links to folders, so a circle of links cannot hang it.
    start = Path(root.anchor)
    try:
        matches = sorted(start.glob(str(root.relative_to(start))))
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"data.path or data.val_path: '{path}' is not a valid glob pattern: {error}") from None
    # As in a shell, a pattern matches hidden files and folders only if it names them.
    matches = [child for child in matches if not any(p[0] in "._" for p in child.parts if p not in root.parts)]
    files = [File(child) for child in {child.resolve(): child for child in matches if child.is_file()}.values()]
    if not files:
        raise DataError(f"data.path or data.val_path: no file matches '{path}'")
    if unknown := [file for file in files if not file.is_readable_kind]:
        raise DataError(f"'{path}' matches {unknown[0]}, which does not end in {', '.join(KINDS)}")
    return _require_one_kind(path, files)


def _require_one_kind(path: str, files: list[File]) -> list[Source]:
    """Refuse files of several kinds: a README.txt beside the data files must not become training data."""
    kinds = {KINDS[file.suffix] for file in files}
    if len(kinds) > 1:
        suffixes = sorted({file.suffix for file in files})
        folder = path.rpartition("/")[0] if "*" in path else path.rstrip("/")
        one_kind = f"{folder}/*{suffixes[0]}" if folder else f"*{suffixes[0]}"
        raise DataError(f"'{path}' has {' and '.join(suffixes)} files; name one kind, e.g. '{one_kind}'")
    return list(files)
