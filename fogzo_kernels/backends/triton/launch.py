"""Host side of a launch: what a kernel is compiled for, its arguments, device and stream."""

from __future__ import annotations

import ctypes
import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import grid as spec
from ...spec.call import Draw, Mix
from ...spec.grid import OUTPUTS
from ...spec.hadamard import factor
from ...spec.noise import DISTRIBUTIONS
from ..gpu.plans import Plan, Tensors
from .elements import M_FACTOR, Grid

TILE = 2048  # elements per loop iteration
NUM_WARPS = 4

Scalar = Tensor | int
#: The gradient, the output and the gradient of alpha; or None where the plan's table says where they lie.
Given = tuple[Tensor | None, Tensor | None, Tensor | None]
IN_TABLE: Given = (None, None, None)
DTYPES = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in OUTPUTS}


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for; a kernel reads the fields that it needs."""

    tile: int = TILE  # elements of a turn of the loop
    single: bool = False  # turns take single elements, not tiles
    aligned: bool = True  # every tensor begins at a multiple of 16 bytes
    per_tensor: bool = True  # every alpha has one element
    shard: bool = False  # some layout skips elements
    latent: Any = None  # dtypes of Triton
    grad: Any = None
    out: Any = None
    distribution: str | None = None
    noise_scale: float = 1.0  # C over the factor that the kernels' noise has over m
    block: int = 0  # elements of a block of the Hadamard transform, or 0
    block_factor: float = 1.0  # float32
    plus: bool = True  # probes that are written
    minus: bool = True
    variant: str | None = None  # of the straight-through derivative, or of the optimizer's rule
    states: int = 0  # the optimizer's lists of state
    master: bool = False  # float32 copies of the latents are there
    one_direction: bool = False
    guided: bool = False  # noise in proportion to N, in place of losses
    unit: int | None = None  # of learned scales, as learned.unit_of() says

    def replaced(self, **fields: Any) -> Config:
        return replace(self, **fields)


def config_of(
    p: Plan, latents: Tensors = (), grads: Tensors = (), out: Tensors = (), block: int = 0, **fields: Any
) -> Config:
    """The configuration of a kernel that works on these tensors by a plan."""
    fields |= {"aligned": p.aligned, "per_tensor": p.per_tensor, "shard": p.shard}
    types = {"latent": dtype_of(latents), "grad": dtype_of(grads), "out": dtype_of(out)}
    return kept_config(block=block, block_factor=block_factor(block), **types, **fields)


kept_config = functools.lru_cache(256)(Config)  # a training loop has a few


def noise_fields(draw: Draw) -> dict[str, Any]:
    """The fields of a configuration for kernels with noise."""
    return {"distribution": draw.distribution, "noise_scale": noise_scale(draw.distribution)}


def block_factor(block: int) -> float:
    """The factor that makes the transform orthonormal, float32."""
    return rounded(factor(block)) if block else 1.0


def dtype_of(tensors: Tensors) -> Any:
    return DTYPES[tensors[0].dtype] if tensors else None


def unavailable(device: torch.device) -> str | None:
    """None on a CUDA device, or on the CPU in Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs on the CPU only"
    if device.type != "cuda":
        return "it needs a CUDA GPU, or TRITON_INTERPRET=1 for the CPU"
    return None


def launch(kernel, programs: int, device: torch.device, *args, **options) -> None:
    """Launch on the tensors' device and its current stream; nothing for no programs."""
    if programs:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*args, **{"num_warps": NUM_WARPS, **options})


# ---- kernel arguments


def rounded(x: float) -> float:
    """The nearest float32."""
    return ctypes.c_float(x).value


def on_host(t: Tensor) -> bool:
    """Whether the host can read a scalar without waiting for the device."""
    return t.is_cpu


def host_or_device(t: Tensor) -> Scalar:
    """A scalar's value, or the tensor for the kernel to read."""
    return int(t) if on_host(t) and not triton.knobs.runtime.interpret else t


def bits_or_device(t: Tensor) -> Scalar:
    """A float64: the tensor on a device, its bits on the CPU, as Triton would round a float argument."""
    x = host_or_device(t.view(torch.int64))
    return x if isinstance(x, int) else t


def draw_of(draw: Draw) -> tuple[Scalar, Scalar]:
    """Seed and step."""
    return host_or_device(draw.seed), host_or_device(draw.step)


def noise_scale(distribution: str) -> float:
    """C over the factor that the kernels' noise has over m."""
    return DISTRIBUTIONS[distribution] / M_FACTOR.get(distribution, 1.0)


def mix_of(draw: Draw, mix: Mix) -> tuple[Tensor, Tensor | None, float, float]:
    """N, then 1 - beta on a device, or else from the host sqrt(beta) and sqrt(1 - beta) C."""
    omb = mix.one_minus_beta
    if not on_host(omb):
        return mix.norm, omb, 0.0, 0.0
    size = math.sqrt(float(omb)) * noise_scale(draw.distribution)
    return mix.norm, None, rounded(math.sqrt(1.0 - float(omb))), rounded(size)


def grid_of(grid: spec.Grid) -> Grid:
    """All float32, which hold them exactly."""
    return Grid(grid.offset, float(grid.qmin), float(grid.qmax), float(grid.r))
