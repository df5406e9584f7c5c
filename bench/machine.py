"""Where and of what a result was measured.

``python -m bench.machine`` prints it as a line of JSON, with the tools that are there and the speed of a copy
and a triad.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import timing

ROOT = Path(__file__).parents[1]
#: What results depend on: files of these names, and all files in these folders.
SOURCES = ("fogzo_kernels", "csrc", "setup.py", "build_cuda.py", "cuda_units.py")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "g++")
STREAM_BYTES = 2**31  # that the copy and the triad move


def machine(device: torch.device) -> dict[str, Any]:
    """Which machine, with what versions, which commit and when: what a result is worth nothing without."""
    facts = {
        "python": platform.python_version(), "torch": torch.__version__, "processor": processor(),
        "commit": commit(), "sources": sources(), "date": time.strftime("%Y-%m-%d"),
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
    """Of the checkout, with a + where files differ from it; without git the variable COMMIT, or "unknown"."""

    def said(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return said("rev-parse", "--short", "HEAD") + "+" * bool(said("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT") or "unknown"


def sources(root: Path = ROOT) -> str:
    """A hash of the package's and the kernels' sources: the same wherever they were copied to."""
    found = hashlib.sha256()
    for name in SOURCES:
        top = root / name
        files = top.rglob("*") if top.is_dir() else [top]
        for path in sorted(path for path in files if path.suffix in SUFFIXES and path.is_file()):
            found.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def tools() -> dict[str, str]:
    """The version of each tool, or that it is not there."""
    found = {}
    for name in TOOLS:
        path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
        if path is None:
            found[name] = "not there"
            continue
        try:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5).stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
        lines = [line.strip() for line in said.splitlines() if "ersion" in line or "release" in line]
        found[name] = (lines or said.splitlines() or ["version unknown"])[0][:120]
    return found


def bandwidth(device: torch.device, bytes_moved: int) -> dict[str, float]:
    """GB/s of a copy and of a triad."""
    streams = timing.Streams(device, timing.Effort())
    found = timing.measure_all(streams.timed(bytes_moved), device, streams.effort)
    pairs = zip(timing.STREAMS, found, strict=True)
    return {f"{name}_gb_per_s": bytes_moved / one.median / 1e9 for name, one in pairs}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.machine", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bytes", type=int, default=STREAM_BYTES, help="that a copy moves; by default 2^31")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no CUDA GPU")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    print(json.dumps({**machine(device), "tools": tools(), **bandwidth(device, args.bytes)}), flush=True)


if __name__ == "__main__":
    main()
