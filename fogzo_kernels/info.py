"""``python -m fogzo_kernels.info``: versions, device, backends and how the native modules were built."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from . import __version__
from .backends import VARIABLE, available_backends, entry_points


def lines() -> list[str]:
    """Returns the lines that the command prints."""
    out = [f"fogzo_kernels {__version__}"]
    out += [f"python        {platform.python_version()} on {platform.machine()}"]
    out += [f"torch         {torch.__version__}", f"triton        {_version('triton')}"]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        out += [f"device        {torch.cuda.get_device_name()}, sm_{major}{minor}"]
    else:
        out += [f"device        cpu, {torch.get_num_threads()} threads"]
    out += [f"{VARIABLE} {os.environ.get(VARIABLE) or 'not set'}", "", "backends"]
    for name, reason in available_backends().items():
        out.append(f"  {name:10s} {'available' if reason is None else 'unavailable: ' + reason}")
    out += [f"  {reason}" for reason in entry_points()[1]]
    return [*out, "", "native modules", *(f"  {line}" for line in [*_native(), *_cuda()])]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _native() -> list[str]:
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        missing = "cannot import name" in str(error)
        return ["not built: the cpu backend is unavailable" if missing else f"cannot be imported: {error}"]
    built = [f"{name}: {value}" for name, value in _C.build_info().items()]
    isas = f"cpu kernels: {_C.cpu_isa()}, of {', '.join(_C.cpu_isas())}"
    return [f"module: {_C.__file__}", *built, isas]


def _cuda() -> list[str]:
    try:
        from . import _cuda  # type: ignore[attr-defined]
    except ImportError as error:
        missing = "cannot import name" in str(error)
        return [f"cuda kernels: {'not built' if missing else f'cannot be imported: {error}'}"]
    built = _cuda.build_info()
    return [f"cuda kernels: built by nvcc {built['nvcc']} for {built['architectures']}"]


if __name__ == "__main__":
    print("\n".join(lines()))
