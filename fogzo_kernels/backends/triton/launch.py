"""Host side of a launch: scalars as kernel arguments, dtypes, sizes, device and stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec.call import Draw, Mix
from ...spec.dtypes import OUTPUTS
from ...spec.grid import Grid
from ...spec.noise import DISTRIBUTIONS
from .elements import M_FACTOR

TILE = 2048  # elements per loop iteration
NUM_WARPS = 4

Tensors = Sequence[Tensor]
Scalar = Tensor | int
DTYPES = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in OUTPUTS}


def unavailable(device: torch.device) -> str | None:
    """None on a CUDA device, or on the CPU in Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs on the CPU only"
    if device.type != "cuda":
        return "it needs a CUDA GPU, or TRITON_INTERPRET=1 for the CPU"
    return None


def launch(kernel, programs: int, device: torch.device, *args, **kwargs) -> None:
    """Launch on the tensors' device and its current stream; nothing for no programs."""
    if programs:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*args, **{"num_warps": NUM_WARPS, **kwargs})


# ---- kernel arguments


def rounded(x: float) -> float:
    """The nearest float32."""
    return torch.tensor(x, dtype=torch.float32).item()


def on_host(t: Tensor) -> bool:
    """Whether the host can read a scalar without waiting for the device."""
    return t.device.type == "cpu"


def host_or_device(t: Tensor) -> Scalar:
    """A scalar's value, or the tensor for the kernel to read."""
    return int(t) if on_host(t) and not triton.knobs.runtime.interpret else t


def bits_or_device(t: Tensor) -> Scalar:
    """A float64: on the device read by the kernel; on the CPU passed by its bits, as a float argument would
    be rounded."""
    found = host_or_device(t.view(torch.int64))
    return found if isinstance(found, int) else t


def named(draw: Draw) -> tuple[Scalar, Scalar]:
    """Seed and step."""
    return host_or_device(draw.seed), host_or_device(draw.step)


def noise_scale(draw: Draw) -> float:
    """C over the factor that the kernels' noise has over m."""
    return DISTRIBUTIONS[draw.distribution] / M_FACTOR.get(draw.distribution, 1.0)


def mixed(draw: Draw, mix: Mix) -> dict[str, object]:
    """N, and sqrt(beta) and sqrt(1 - beta) C, or what the kernel makes them of."""
    scale, omb = noise_scale(draw), mix.one_minus_beta
    found: dict[str, object] = {"norm": mix.norm, "NOISE_SCALE": scale}
    if not on_host(omb):
        return found | {"one_minus_beta": omb, "sqrt_beta": 0.0, "noise_scale": 0.0}
    root, size = math.sqrt(1.0 - float(omb)), math.sqrt(float(omb)) * scale
    return found | {"one_minus_beta": None, "sqrt_beta": rounded(root), "noise_scale": rounded(size)}


def grid_of(grid: Grid) -> dict[str, float]:
    """All float32, which hold them exactly."""
    return {"offset": grid.offset, "qmin": float(grid.qmin), "qmax": float(grid.qmax), "r": float(grid.r)}
