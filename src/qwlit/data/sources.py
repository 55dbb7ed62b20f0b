"""What `data.path` names: files, folders, globs, and data sets of the Hugging Face hub."""

import re
from pathlib import Path

from qwlit.core.errors import DataError, nearest
from qwlit.core.files import resolve_path
from qwlit.data.files import COMPRESSED, KINDS, File
from qwlit.data.hub import HUB, HubData, SavedData, hub_data, saved_data

__all__ = ["File", "HubData", "SavedData", "Source", "find_sources"]

Source = File | HubData | SavedData


def find_sources(path: str) -> list[Source]:
    """Return what `path` names: a file, a folder's data files in sorted order, a glob's, or a data set
    of the hub or in a folder written by `save_to_disk`.

    Raises:
        DataError: nothing is there, or nothing of a known kind, or files of several kinds.
    """
    if not path:
        raise DataError("data.path or data.val_path: a path is empty")
    if path.startswith(HUB):
        return [hub_data(path)]
    root = resolve_path(path)
    try:
        if root.is_dir():
            saved = saved_data(path, root)
            return [saved] if saved else _folder(path, root)
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
        folder = path.rpartition("/")[0] if "*" in path else path.rstrip("/")
        one_kind = f"{folder}/*{suffixes[0]}" if folder else f"*{suffixes[0]}"
        raise DataError(f"'{path}' holds {' and '.join(suffixes)} files; name one kind, e.g. '{one_kind}'")
    return list(files)
