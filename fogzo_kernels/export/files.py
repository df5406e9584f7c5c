"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write it: another name in its folder, which it changes for its own at the end.

    Raises:
        FileNotFoundError: its folder is not there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that is there, got {path}")
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(number)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's own lets nobody else read it
        _to_disk(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: str | os.PathLike[str], mark: str) -> Iterator[Path]:
    """As :func:`whole_file`, for a folder; one that is there is replaced if it has a file ``mark``, or nothing.

    Raises:
        FileNotFoundError: the folder that it is to be in is not there.
        FileExistsError: there is something else.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder must be in one that is there, got {path}")
    if path.exists() and not (path.is_dir() and ((path / mark).exists() or not any(path.iterdir()))):
        raise FileExistsError(f"folder must be new, empty or an export of before, got {path}")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        for file in temporary.iterdir():
            _to_disk(file)
        if path.exists():
            before = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            os.replace(path, before / path.name)
            os.replace(temporary, path)
            shutil.rmtree(before)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _to_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found
