"""Builds fogzo_kernels._cuda for setup.py: which architectures, nvcc's commands, its objects.

nvcc is called from here and not by PyTorch's BuildExtension, which refuses where PyTorch itself has no
CUDA: the module uses nothing of PyTorch, so one build serves any.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
import torch
from setuptools import Extension
from torch.utils.cpp_extension import BuildExtension

from cuda_units import Unit, units

VARIABLE, ARCHITECTURES = "FOGZO_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
NAME = "fogzo_kernels._cuda"
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",  # only std::fma may fuse: the contract pins every rounding
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Werror=switch",
]


def find_nvcc() -> str | None:
    """Of CUDA_HOME, or else of the path, or else of the Python package nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    packaged = sorted(glob(f"{sysconfig.get_paths()['purelib']}/nvidia/cu*/bin/nvcc"))
    known = (f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    for candidate in (*known, *packaged[-1:]):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    return None


def left_out() -> str | None:
    """None if CUDA is built, or why it is not; an error where it was asked for and cannot be."""
    wanted, nvcc = os.environ.get(VARIABLE) or "auto", find_nvcc()
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"{VARIABLE} must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return f"{VARIABLE}=0"
    if wanted == "1" and nvcc is None:
        raise SystemExit(f"{VARIABLE}=1 must have nvcc on the path or under CUDA_HOME, found none")
    if wanted == "1":
        return None
    if nvcc is None:
        return "nvcc was not found"
    return None if torch.version.cuda else f"this PyTorch has no CUDA ({VARIABLE}=1 builds it all the same)"


def architectures() -> list[str]:
    """Compute capabilities such as 9.0 or 10.0+PTX."""
    text = os.environ.get(ARCHITECTURES) or DEFAULT_ARCHITECTURES
    found = [word for word in re.split(r"[;,\s]+", text) if word]
    for word in found:
        if not re.fullmatch(r"\d+\.\d[a-f]?(\+PTX)?", word):
            raise SystemExit(
                f"{ARCHITECTURES} must be compute capabilities such as {DEFAULT_ARCHITECTURES}, got {word!r}"
            )
    return found


def gencode(word: str) -> list[str]:
    """nvcc's options for one of them."""
    number = word.removesuffix("+PTX").replace(".", "")
    options = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if word.endswith("+PTX"):
        options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def compile_objects(nvcc: str, folder: Path, debug: bool = False) -> list[str]:
    """An object for each unit, the longest compilations side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    options = [*NVCC_FLAGS, *(option for word in architectures() for option in gencode(word))]
    options += ["-lineinfo", "-UNDEBUG"] if debug else []

    def compile_one(unit: Unit) -> str:
        out = str(folder / f"{unit.name}.o")
        subprocess.run([nvcc, *options, *unit.defines, "-c", str(unit.source), "-o", out], check=True)
        return out

    found = units()
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(1, min(jobs, len(found)))) as pool:
        return list(pool.map(compile_one, found))


def extension(debug: bool) -> Extension | None:
    """The module without its kernels, which BuildNative compiles; None where CUDA is left out."""
    reason = left_out()
    if reason:
        print(f"fogzo_kernels: the CUDA backend is left out: {reason}", flush=True)
        return None
    nvcc = find_nvcc()
    assert nvcc is not None
    home = Path(nvcc).resolve().parents[1]
    libraries = [f"{home}/lib64", f"{home}/lib", "/usr/local/cuda/lib64"]
    return Extension(
        NAME,
        ["csrc/cuda/module.cpp"],
        include_dirs=[pybind11.get_include()],
        depends=sorted(glob("csrc/*.h") + glob("csrc/cuda/*")),
        define_macros=[
            ("FOGZO_NVCC", f'"{nvcc_version(nvcc)}"'),
            ("FOGZO_CUDA_ARCHITECTURES", f'"{" ".join(architectures())}"'),
        ],
        extra_compile_args=["-std=c++17", "-fvisibility=hidden", "-O0" if debug else "-O2"],
        library_dirs=[path for path in libraries if os.path.isdir(path)],
        # the runtime is a part of the module, so that it imports where there is no driver
        libraries=["cudart_static", "dl", "rt", "pthread"],
        language="c++",
    )


class BuildNative(BuildExtension):
    """PyTorch's build, and nvcc's objects linked into the CUDA module."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == NAME:
            nvcc = find_nvcc()
            assert nvcc is not None
            debug = os.environ.get("DEBUG") == "1"
            ext.extra_objects = compile_objects(nvcc, Path(self.build_temp) / "cuda", debug)
        super().build_extension(ext)
