"""Where and of what a result was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import timing


def machine(device: torch.device) -> dict[str, Any]:
    """Which machine, with what versions, which commit and when: what a result is worth nothing without."""
    facts = {
        "python": platform.python_version(), "torch": torch.__version__, "processor": processor(),
        "commit": commit(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    try:
        facts["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        facts["triton"] = "not installed"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = f"sm_{found.major}{found.minor}"
        return {"device": found.name, "capability": capability, "multiprocessors": found.multi_processor_count,
                "memory_bytes": found.total_memory, "cache_bytes": timing.cache_bytes(device),
                "cuda": torch.version.cuda, **facts}  # fmt: skip
    return {"device": processor(), "kernels": kernels(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "cache_bytes": timing.cache_bytes(device), **facts}  # fmt: skip


def kernels() -> str:
    """The instruction set that the CPU's kernels are compiled for."""
    try:
        from fogzo_kernels import _C
    except ImportError:
        return "not built"
    return str(_C.cpu_isa())


def commit() -> str:
    """Of the checkout, with a + where files differ from it; "unknown" outside of one."""

    def said(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return said("rev-parse", "--short", "HEAD") + "+" * bool(said("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
