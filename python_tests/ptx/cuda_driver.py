"""The CUDA backend without a GPU: its own host code, whose launches the executor runs."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from contextlib import nullcontext
from pathlib import Path

from . import launches
from .build import built_cuda, load, nvcc_missing
from .decode import Kernel
from .memory import runs_on_cpu, touchable, watch
from .modes import ARCH, FUSE, number, on_device
from .text import Module

NAME = "fogzo_kernels._cuda"
_files: dict[str, Path] = {}  # PTX by the kernels in it


def install() -> str | None:
    """Let the backend ``cuda`` run on CPU tensors, in this process; else the reason why not."""
    if reason := nvcc_missing():
        return reason
    folder, module = built_cuda(number(ARCH))
    for path in folder.glob("*.ptx"):
        _files.update(dict.fromkeys(re.findall(r"\.entry\s+([$\w]+)", path.read_text()), path))
    sys.modules[NAME] = load(NAME, module)
    from fogzo_kernels.backends import cuda as backend

    backend.unavailable = runs_on_cpu(backend.unavailable)
    backend.where = lambda device: (0, 0)
    backend.on = lambda device: nullcontext()
    if on_device():
        backend.on_host = lambda t: False
    watch(backend)
    return None


@functools.cache
def module_of(path: Path) -> Module:
    return Module(path.read_text())


@functools.cache
def kernel_of(name: str) -> Kernel:
    return Kernel(module_of(_files[name]), name, number(FUSE))


def launch(name: str, blocks: int, threads: int, parameters: int, shared: int) -> None:
    """Called by runtime.cpp; ``parameters``: where the only one lies."""
    kernel = kernel_of(name)
    data = ctypes.string_at(parameters, kernel.program.parameter_bytes)
    launches.run(kernel, blocks, threads, data, shared, touchable())
