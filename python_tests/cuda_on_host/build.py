"""Compiles csrc/cuda by the host's compiler, with on_host.h in place of CUDA, into a module ``_cuda``.

Once for each state of the sources: the module lies in build/cuda_on_host under a hash of them.
FOGZO_SANITIZE=address builds it with that sanitizer; run Python under it with LD_PRELOAD=libasan.so.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuda_units import Unit

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAME = "fogzo_kernels._cuda"


def sources() -> list[Unit]:
    from cuda_units import Unit, units  # lies beside csrc, which an installed package has not

    return [*units(), Unit("module", ROOT / "csrc/cuda/module.cpp", ())]


def flags() -> list[str]:
    import pybind11

    sanitize = os.environ.get("FOGZO_SANITIZE")
    return [
        "-std=c++20", "-O1", "-fPIC", "-pthread", "-ffp-contract=off", "-fvisibility=hidden", "-Werror=switch",
        "-DFOGZO_ON_HOST", '-DFOGZO_NVCC="none: on the host"', '-DFOGZO_CUDA_ARCHITECTURES="host"',
        f"-I{HERE}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}",
        *([f"-fsanitize={sanitize}", "-g"] if sanitize else []),
    ]  # fmt: skip


def digest() -> str:
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.*h"), *HERE.glob("*.h")]
    found = hashlib.sha256(f"{sys.version} {flags()}".encode())
    for unit in sources():
        found.update(f"{unit.name} {unit.defines}".encode() + unit.source.read_bytes())
    for path in sorted(headers):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def build() -> Path | None:
    """The module's file; None without a C++ compiler. An error of the compiler is raised."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    folder = ROOT / "build/cuda_on_host" / digest()
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (folder / "lock").open("w") as lock:  # one test process compiles, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            compile_all(compiler, folder, module)
    return module


def compile_all(compiler: str, folder: Path, module: Path) -> None:
    def run(*arguments: str) -> None:
        result = subprocess.run([compiler, *flags(), *arguments], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{compiler} {' '.join(arguments)} failed:\n{result.stderr[-4000:]}")

    def compile_one(unit: Unit) -> str:
        out = folder / f"{unit.name}.o"
        run(*unit.defines, "-x", "c++", "-c", str(unit.source), "-o", str(out))
        return str(out)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        objects = list(pool.map(compile_one, sources()))
    partial = folder / "linked.so"
    run("-shared", *objects, "-o", str(partial))
    partial.rename(module)  # a file under its name is whole
    for path in objects:
        Path(path).unlink()


def install() -> str | None:
    """Put the module in the place of the built one, for this process; else the reason why not."""
    if not (ROOT / "csrc/cuda").is_dir():
        return "the CUDA kernels' sources are not here: the tests of an installed package may lie alone"
    path = build()
    if path is None:
        return "a C++ compiler is needed to run the CUDA kernels on the CPU"
    sys.modules[NAME] = load(path)
    return None


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
