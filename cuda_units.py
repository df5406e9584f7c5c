"""What the CUDA sources compile to: an object a file, and one for each distribution of some.

For setup.py, for the tests, which run their PTX on the CPU, and for the count of instructions.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
#: Sources that are compiled once for each distribution.
PER_DISTRIBUTION = ("estimate", "perturb", "tail")


class Unit(NamedTuple):
    """One compilation: the object's name, its source, and the macros that it defines."""

    name: str
    source: Path
    defines: tuple[str, ...]


def distributions() -> list[str]:
    """Those that csrc/names.h lists."""
    text = (CSRC / "names.h").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^#define FOGZO_DISTRIBUTIONS\(X\)(.*)$", text, re.MULTILINE)
    found: list[str] = re.findall(r"X\((\w+)", line)
    if not found:
        raise ValueError(f"names.h must list the distributions as X(name, ...), got {line!r}")
    return found


def units() -> list[Unit]:
    """Every compilation, in a fixed order."""
    found = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        if source.stem in PER_DISTRIBUTION:
            found += [
                Unit(f"{source.stem}_{d}", source, (f"-DFOGZO_DISTRIBUTION={d}",)) for d in distributions()
            ]
        else:
            found.append(Unit(source.stem, source, ()))
    return found


# ---- objects with PTX, which tests and benchmarks keep in build/


def run(*command: str) -> str:
    """What a command prints; an error shows what it said."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
    return result.stdout + result.stderr


def digest(files: Iterable[Path], *more: object) -> str:
    """A name for what is made of files and options."""
    found = hashlib.sha256(repr(more).encode())
    for path in sorted(files):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """The file; ``make`` writes it in one process, while others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_name(f"{path.name}.partial")
            make(partial)
            partial.rename(path)
    return path


def parallel(tasks: Iterable[Callable[[], Any]]) -> list[Any]:
    """Results of tasks that wait for compilers, on all cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def compiled(arch: int, advance: Callable[[], object] = lambda: None) -> Path:
    """A folder with an object (.o) and its PTX (.ptx) for each unit, for compute capability ``arch`` / 10.

    Sources, options and nvcc's version name it.
    """
    from build_cuda import NVCC_FLAGS, find_nvcc, nvcc_version

    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found: install nvidia-cuda-nvcc, or set CUDA_HOME")
    sources = [*CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.*")]
    commands = [(unit.name, unit.defines) for unit in units()]  # without paths: all checkouts share a build
    key = digest(sources, NVCC_FLAGS, nvcc_version(nvcc), commands)
    folder = ROOT / "build/cuda" / key / str(arch)

    def compile_one(unit: Unit) -> None:
        def make(path: Path) -> None:
            steps = folder / f"{unit.name}.steps"
            steps.mkdir(exist_ok=True)
            code = f"-gencode=arch=compute_{arch},code=compute_{arch}"
            keep = ("--keep", f"--keep-dir={steps}", "-diag-suppress=128")
            out = str(folder / f"{unit.name}.o")
            run(nvcc, *NVCC_FLAGS, code, *keep, *unit.defines, "-c", str(unit.source), "-o", out)
            next(steps.glob("*.ptx")).rename(path)
            shutil.rmtree(steps)

        once(folder / f"{unit.name}.ptx", make)
        advance()

    parallel([lambda unit=unit: compile_one(unit) for unit in units()])  # type: ignore[misc]
    return folder
