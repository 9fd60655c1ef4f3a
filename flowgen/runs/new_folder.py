"""Folders that appear only once they are complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path

from flowgen.runs.files import is_temporary
from flowgen.runs.lock import in_use, is_abandoned


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Generator[Path]:
    """Yields an unfinished folder that is renamed to `folder` on success and removed on any error.

    Removes the unfinished folders that killed processes have left for the same `folder`. A link to an empty folder
    stays a link.

    Example:
        with new_folder("exported/digits") as unfinished:
            (unfinished / "README.md").write_text(card)
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    unfinished.mkdir()
    with in_use(unfinished):
        try:
            yield unfinished
            if folder.is_dir():
                folder.rmdir()  # an empty one; fails if files have appeared in it
            os.rename(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _remove_leftovers(folder: Path) -> None:
    for path in folder.parent.iterdir():
        if is_temporary(path.name, folder.name) and is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
