"""Write files and folders that are complete or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields another place to write a file in; at the end the file moves to ``path``."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that is there, got {path}")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        made = Path(temporary, path.name)
        yield made
        _to_disk(made)
        os.replace(made, path)


@contextmanager
def whole_folder(path: str | os.PathLike[str], mark: str) -> Iterator[Path]:
    """As :func:`whole_file`, for a folder; it replaces an empty folder or a folder with a file ``mark``."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder must be in one that is there, got {path}")
    if path.exists() and not (path.is_dir() and ((path / mark).exists() or not any(path.iterdir()))):
        raise FileExistsError(f"folder must be new, empty or an export of before, got {path}")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        made, before = Path(temporary, "made"), Path(temporary, "before")
        made.mkdir()
        yield made
        for file in made.iterdir():
            _to_disk(file)
        if path.exists():
            os.replace(path, before)
        try:
            os.replace(made, path)
        except BaseException:
            if before.exists():
                os.replace(before, path)
            raise


def _to_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
