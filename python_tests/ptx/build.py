"""Builds the executor, and the CUDA backend whose launches go to it. ``python -m ptx.build`` builds both.

Each lies in ``build/`` under a hash of its sources and compiler.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise RuntimeError("a C++ compiler is needed to run PTX on the CPU: install g++, or set CXX")
    return found


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
    return result.stdout


def digest(files: Iterable[Path], *more: object) -> str:
    found = hashlib.sha256(repr((sys.version, *more)).encode())
    for path in sorted(files):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def once(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """``folder/name``; ``make`` writes it in one process, while others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            partial = folder / f"{name}.partial"
            make(partial)
            partial.rename(done)
    return done


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def includes() -> list[str]:
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def parallel(tasks: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


# ---- the executor

#: -ffp-contract=off: an instruction of PTX rounds as it says.
FLAGS = (
    "-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
)  # fmt: skip


def built_executor() -> Path:
    sources = sorted((HERE / "executor").glob("*.cpp"))
    native = run(compiler(), "-march=native", "-Q", "--help=target")  # another CPU, another build
    key = digest([*sources, *(HERE / "executor").glob("*.h")], FLAGS, native)

    def make(path: Path) -> None:
        objects = [path.with_name(f"{source.stem}.o") for source in sources]
        parallel([
            functools.partial(run, compiler(), *FLAGS, *includes(), "-c", str(source), "-o", str(out))
            for source, out in zip(sources, objects, strict=True)
        ])  # fmt: skip
        run(compiler(), "-shared", *map(str, objects), "-o", str(path))

    return once(ROOT / "build/executor" / key, f"_executor{EXTENSION}", make)


@functools.cache
def executor() -> ModuleType:
    return load("_executor", built_executor())


# ---- the CUDA backend: host code and PTX as nvcc makes them, with cuda/runtime.cpp in the place of CUDA's runtime


def nvcc_missing() -> str | None:
    """None, or why the CUDA backend cannot be compiled."""
    if not (ROOT / "csrc/cuda").is_dir():
        return "the CUDA kernels' sources are not here: the tests of an installed package may lie alone"
    from build_cuda import find_nvcc

    return None if find_nvcc() else "nvcc was not found: install the packages nvidia-cuda-nvcc and nvidia-cuda-runtime"


def cuda_key() -> str:
    from build_cuda import NVCC_FLAGS, find_nvcc, nvcc_version

    csrc, nvcc = ROOT / "csrc", find_nvcc()
    assert nvcc is not None
    files = [*csrc.glob("*.h"), *(csrc / "cuda").glob("*"), *(HERE / "cuda").glob("*"), ROOT / "cuda_units.py"]
    return digest(files, NVCC_FLAGS, nvcc_version(nvcc))


def built_cuda(arch: int, advance: Callable[[], object] = lambda: None) -> tuple[Path, Path]:
    """The folder of the kernels' PTX for a compute capability, and the module ``_cuda`` that launches them."""
    from build_cuda import NVCC_FLAGS, find_nvcc
    from cuda_units import Unit, units

    folder, nvcc = ROOT / "build/ptx" / cuda_key(), find_nvcc()
    assert nvcc is not None

    def compile_one(unit: Unit) -> Path:
        place = folder / str(arch)

        def make(path: Path) -> None:
            steps = place / f"{unit.name}.steps"
            steps.mkdir(exist_ok=True)
            code = f"-gencode=arch=compute_{arch},code=compute_{arch}"
            out = place / f"{unit.name}.o"
            run(nvcc, *NVCC_FLAGS, code, "--keep", f"--keep-dir={steps}", "-diag-suppress=128", *unit.defines, "-c",
                str(unit.source), "-o", str(out))  # fmt: skip
            next(steps.glob("*.ptx")).rename(path)
            shutil.rmtree(steps)

        found = once(place, f"{unit.name}.ptx", make)
        advance()
        return found

    parallel([functools.partial(compile_one, unit) for unit in units()])

    def link(path: Path) -> None:
        texts = ('-DFOGZO_NVCC="ptx"', f'-DFOGZO_CUDA_ARCHITECTURES="{arch // 10}.{arch % 10}"')
        objects = [str(folder / str(arch) / f"{unit.name}.o") for unit in units()]
        flags = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", *texts, *includes())
        extra = []
        for source in (ROOT / "csrc/cuda/module.cpp", HERE / "cuda/runtime.cpp"):
            extra.append(str(folder / f"{source.stem}.o"))
            run(compiler(), *flags, "-c", str(source), "-o", extra[-1])
        run(compiler(), "-shared", *objects, *extra, "-o", str(path))

    return folder / str(arch), once(folder / str(arch), f"_cuda{EXTENSION}", link)


def main() -> None:
    from tqdm import tqdm

    from .modes import ARCH, number

    built_executor()
    if reason := nvcc_missing():
        print(f"the CUDA backend is left out: {reason}", flush=True)
        return
    from cuda_units import units

    with tqdm(total=len(units()), desc="CUDA kernels", unit="file") as bar:
        built_cuda(number(ARCH), bar.update)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
