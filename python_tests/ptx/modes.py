"""What a run of the executor can vary, by one environment variable each.

A kernel must give the same bits, or bits within the contract's tolerance, in every mode.
"""

from __future__ import annotations

import os

ARCH, ORDER, APPROXIMATE, FUSE, SCALARS = (
    "FOGZO_PTX_ARCH",
    "FOGZO_PTX_ORDER",
    "FOGZO_PTX_APPROXIMATE",
    "FOGZO_PTX_FUSE",
    "FOGZO_PTX_SCALARS",
)
#: Values of each variable, the default first.
MODES = {
    ARCH: ("90", "80", "100"),  # compute capability
    ORDER: ("0", "1"),  # 0: all warps in step; else a seed of a random order
    APPROXIMATE: ("0", "1", "-1", "2"),  # approximate instructions: exact, at their bounds, between them
    FUSE: ("0", "1", "2"),  # products fused into sums, where PTX lets the assembler do so
    SCALARS: ("host", "device"),  # where seed, step and 1 - beta lie: in a CUDA graph, on the device
}


def mode(name: str) -> str:
    """The value of a variable."""
    value = os.environ.get(name) or MODES[name][0]
    if name == ORDER and value.isdecimal():
        return value
    if value not in MODES[name]:
        raise ValueError(f"{name} must be one of {', '.join(MODES[name])}, got {value!r}")
    return value


def number(name: str) -> int:
    return int(mode(name))


def on_device() -> bool:
    return mode(SCALARS) == "device"
