"""Write files and folders that are complete or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike[str], mark: str | None = None) -> Iterator[Path]:
    """Yields another place to write a file in; at the end the file moves to ``path``.

    With ``mark`` it is a folder, which replaces an empty folder or a folder with a file of that name.
    """
    path = Path(path)
    if not path.parent.is_dir():
        what = "path must be in a folder" if mark is None else "folder must be in one"
        raise FileNotFoundError(f"{what} that is there, got {path}")
    may_go = path.is_dir() and (not any(path.iterdir()) or (path / (mark or "")).exists())
    if mark is not None and path.exists() and not may_go:
        raise FileExistsError(f"folder must be new, empty or an export of before, got {path}")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        made, before = Path(temporary, path.name), Path(temporary, f"{path.name}.before")
        if mark is not None:
            made.mkdir()
        yield made
        for file in [made] if mark is None else made.iterdir():
            _to_disk(file)
        if mark is not None and path.exists():
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
