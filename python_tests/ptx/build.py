"""Builds the executor, and the CUDA backend whose launches go to it. ``python -m ptx.build`` builds both.

Each lies in ``build/`` under a hash of its sources and compiler.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
from cuda_units import compiled, digest, once, parallel, run, units  # noqa: E402

EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise RuntimeError("a C++ compiler is needed to run PTX on the CPU: install g++, or set CXX")
    return found


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


# ---- the executor

#: -ffp-contract=off: an instruction of PTX rounds as it says.
FLAGS = (
    "-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall",
    "-Wextra",
)  # fmt: skip


def built_executor() -> Path:
    sources = sorted((HERE / "executor").glob("*.cpp"))
    native = run(compiler(), "-march=native", "-Q", "--help=target")  # another CPU, another build
    key = digest([*sources, *(HERE / "executor").glob("*.h")], FLAGS, native, EXTENSION)

    def make(path: Path) -> None:
        objects = [str(path.with_name(f"{source.stem}.o")) for source in sources]
        parallel(
            [
                functools.partial(run, compiler(), *FLAGS, *includes(), "-c", str(source), "-o", out)
                for source, out in zip(sources, objects, strict=True)
            ]
        )
        run(compiler(), "-shared", *objects, "-o", str(path))

    return once(ROOT / "build/executor" / key / f"_executor{EXTENSION}", make)


@functools.cache
def executor() -> ModuleType:
    return load("_executor", built_executor())


# ---- the CUDA backend, as nvcc makes it: cuda/runtime.cpp takes the place of CUDA's runtime


def nvcc_missing() -> str | None:
    """None, or why the CUDA backend cannot be compiled."""
    if not (ROOT / "csrc/cuda").is_dir():
        return "the CUDA kernels' sources are not here: the tests of an installed package may lie alone"
    from build_cuda import find_nvcc

    return None if find_nvcc() else "nvcc was not found: install nvidia-cuda-nvcc, or set CUDA_HOME"


def built_cuda(arch: int, advance: Callable[[], object] = lambda: None) -> tuple[Path, Path]:
    """The folder of the kernels' PTX for a compute capability, and the module ``_cuda`` that launches them."""
    folder = compiled(arch, advance)
    own = [ROOT / "csrc/cuda/module.cpp", HERE / "cuda/runtime.cpp"]
    texts = ('-DFOGZO_NVCC="ptx"', f'-DFOGZO_CUDA_ARCHITECTURES="{arch // 10}.{arch % 10}"')
    flags = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", *texts, *includes())

    def link(path: Path) -> None:
        objects = [str(path.with_name(f"{source.stem}.o")) for source in own]
        for source, out in zip(own, objects, strict=True):
            run(compiler(), *flags, "-c", str(source), "-o", out)
        kernels = [str(folder / f"{unit.name}.o") for unit in units()]
        run(compiler(), "-shared", *kernels, *objects, "-o", str(path))

    return folder, once(folder / digest(own, flags) / f"_cuda{EXTENSION}", link)


def main() -> None:
    from tqdm import tqdm

    from .modes import ARCH, number

    built_executor()
    if reason := nvcc_missing():
        print(f"the CUDA backend is left out: {reason}", flush=True)
        return
    with tqdm(total=len(units()), desc="CUDA kernels", unit="file") as bar:
        built_cuda(number(ARCH), bar.update)


if __name__ == "__main__":
    main()
