"""Hand-written CUDA C++ on NVIDIA GPUs (csrc/cuda).

An op takes one launch over all tensors, which a plan (backends/gpu/plans.py) names to the kernels. The native
module knows nothing of PyTorch: it takes addresses, the device's number, the stream, and tuples of numbers and
names, which csrc/cuda/module.cpp reads.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..spec.call import Draw, Losses, Measure, Mix, Update
from ..spec.grid import Grid
from ..spec.noise import DISTRIBUTIONS
from ..spec.straight_through import StraightThrough
from .gpu import cells
from .gpu.plans import Plan, Tensors, plan

try:
    from .. import _cuda  # type: ignore[attr-defined]
except ImportError as error:  # the message becomes the reason shown
    if "cannot import name" not in str(error):
        raise
    raise ImportError("it is not built; FOGZO_BUILD_CUDA=1 builds it, with nvcc") from error


def unavailable(device: torch.device) -> str | None:
    """None on a CUDA device that the kernels were built for."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if device.index is None and torch.cuda.is_available():  # the current one, which may be another next time
        device = torch.device("cuda", torch.cuda.current_device())
    return unavailable_on(device)


@functools.cache  # every op asks, and the driver's answer stays
def unavailable_on(device: torch.device) -> str | None:
    """None, or why the kernels cannot run on this GPU."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    architectures = _cuda.build_info()["architectures"]
    major, minor = torch.cuda.get_device_capability(device)
    if not runs_on(architectures, major, minor):
        return (
            f"it was built for {architectures}, which cannot run on compute capability {major}.{minor}:"
            f" build it with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    return None


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether a build for ``architectures``, such as ``8.0 9.0+PTX``, has code for that capability."""
    for first, second, ptx in re.findall(r"(\d+)\.(\d+)(\+PTX)?", architectures):
        built = int(first), int(second)
        if (built[0] == major and built[1] <= minor) or (ptx and built <= (major, minor)):
            return True
    return False


# ---- arguments of the native ops


def where(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(device).cuda_stream


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device the current one."""
    return torch.cuda.device(device)


def on_host(t: Tensor) -> bool:
    """Whether the host can read a scalar without waiting for the device."""
    return t.device.type == "cpu"


def scalar(t: Tensor) -> tuple[int, int | float]:
    """A scalar's address, for the kernel to read, or 0 and its value."""
    return (0, t.item()) if on_host(t) else (t.data_ptr(), 0)


def drawn(draw: Draw, direction: int = 0) -> tuple[Any, ...]:
    C = DISTRIBUTIONS[draw.distribution]
    return draw.distribution, C, scalar(draw.seed), scalar(draw.step), direction


def mixed(mix: Mix) -> tuple[Any, ...]:
    factors = 0 if mix.factors is None else mix.factors.data_ptr()
    return mix.norm.data_ptr(), scalar(mix.one_minus_beta), mix.epsilon, factors


def measured(losses: Losses) -> tuple[int, int, int, int, bool]:
    """The losses' addresses and number; an op without directions does not count."""
    plus, minus, counters, guided = losses
    counter = counters.data_ptr() if counters is not None and losses.directions else 0
    return plus.data_ptr(), minus.data_ptr(), plus.numel(), counter, guided


def grid_of(grid: Grid) -> tuple[int, int, float, int]:
    return grid.qmin, grid.qmax, grid.offset, grid.r


def name_of(tensors: Tensors) -> str:
    """The name of the tensors' dtype; of no tensors, one that is never used."""
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else "float32"


def run(op: Callable[..., None], like: Tensors, p: Plan, dtypes: Sequence[Tensors], *arguments: Any) -> None:
    """Run a native op on the device of ``like``; ``dtypes``: the latents, gradients and outputs."""
    device = like[0].device
    planned = p.table.data_ptr(), p.owner.data_ptr(), p.programs, p.per_tensor, p.shard
    with on(device):
        op((where(device), planned, tuple(map(name_of, dtypes))), *arguments)


# ---- ops (docs/contract.md)


def noise(numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor:
    """u = C m, float32, shape (numel,)."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    p = plan([out], plus=[out], draw=draw)
    run(_cuda.noise, [out], p, [[out]] * 3, drawn(draw, direction))
    return out


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int, root: bool, per_tensor: bool) -> Tensor:
    """Sum of the squares of delta * g, float64, or its root, float32: two launches, no atomics."""
    device = grads[0].device
    p = plan(grads, grads=grads, alphas=alphas)
    partial = torch.empty(max(p.programs, 1), dtype=torch.float64, device=device)
    tensors = len(grads) if per_tensor else 0
    dtype = torch.float32 if root else torch.float64
    out = torch.empty(tensors if per_tensor else (), dtype=dtype, device=device)
    run(_cuda.guide_sumsq, grads, p, [grads] * 3, r, partial.data_ptr(), out.data_ptr(), root, tensors)
    return out


def perturb_quantize_(
    plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    direction: int, grid: Grid, block: int,
) -> None:  # fmt: skip
    """Write Q(w + eps v) and Q(w - eps v): one launch, one pass."""
    if not latents:
        return
    p = plan(latents, latents=latents, grads=grads, plus=plus, minus=minus, alphas=alphas, draw=draw)
    dtypes, written = [latents, grads, plus or minus], (bool(plus), bool(minus))
    nouns = drawn(draw, direction), mixed(mix)
    run(_cuda.perturb_quantize, latents, p, dtypes, *nouns, grid_of(grid), block, *written)


def estimate_gradient_(
    grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses, r: int, block: int
) -> None:
    """Replace g by G: one launch for the coefficients, one for all tensors and directions."""
    p = plan(grads, grads=grads, alphas=alphas, draw=draw)
    room, nouns = coefficients(mix, losses), (drawn(draw), mixed(mix), measured(losses))
    run(_cuda.estimate_gradient, [room], p, [grads] * 3, *nouns, r, block, room.data_ptr())


def estimate_update_(
    latents: Tensors, quantized: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    losses: Losses, grid: Grid, update: Update, block: int,
) -> None:  # fmt: skip
    """G, the optimizer's step and Q(theta): one launch for the coefficients, one for all tensors."""
    rule = update.rule
    p = plan(
        latents, latents=latents, grads=grads, plus=quantized, minus=update.masters, alphas=alphas,
        states=update.states, draw=draw,
    )  # fmt: skip
    room, nouns = coefficients(mix, losses), (drawn(draw), mixed(mix), measured(losses))
    scalars = scalar(update.lr), scalar(update.optimizer_step)
    optimizer = rule.variant, rule.hyperparameters, *scalars, bool(update.masters)
    arguments = grid_of(grid), block, optimizer, room.data_ptr(), bool(quantized)
    run(_cuda.estimate_update, [room], p, [latents, grads, quantized], *nouns, *arguments)


def coefficients(mix: Mix, losses: Losses) -> Tensor:
    """Room for what the first launch makes of the losses."""
    size = _cuda.COEFFICIENTS + losses.directions
    return torch.empty(size, dtype=torch.float32, device=mix.norm.device)


def quantize_(out: Tensors, latents: Tensors, alphas: Tensors, grid: Grid, block: int) -> None:
    """Write Q(theta): one launch."""
    p = plan(latents, latents=latents, plus=out, alphas=alphas)
    run(_cuda.quantize, latents, p, [latents, latents, out], grid_of(grid), block)


def straight_through_backward_(
    out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
    straight_through: StraightThrough, block: int,
) -> None:  # fmt: skip
    """Write g * h'(theta): one launch."""
    p = plan(latents, latents=latents, grads=grads, plus=out, alphas=alphas)
    arguments = grid_of(grid), straight_through.variant, block
    run(_cuda.straight_through_backward, latents, p, [latents, grads, out], *arguments)


def measure_alphas_(alphas: Tensors, tensors: Tensors, measure: Measure) -> None:
    """Write max(factor * (statistic + add), least) of each cell: one launch, and one for cells in pieces."""
    device, p = tensors[0].device, cells.plan(tensors, alphas)
    partial = torch.empty(p.programs if p.seconds else 0, dtype=torch.float64, device=device)
    tables = p.table.data_ptr(), p.owner.data_ptr(), p.second.data_ptr()
    planned = *tables, p.programs, p.seconds, name_of(tensors)
    with on(device):
        _cuda.measure_alphas(where(device), planned, tuple(measure), partial.data_ptr())


def learned_backward_(
    out: Tensors, alpha_grads: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
    straight_through: StraightThrough, factors: Sequence[float], block: int,
) -> None:  # fmt: skip
    """Write g * h'(theta) and the alphas' gradients: one launch, and one for alphas of several programs."""
    p = plan(
        latents, latents=latents, grads=grads, plus=out, alphas=alphas, alpha_grads=alpha_grads, factors=factors
    )
    partial = torch.empty(2 * p.programs, dtype=torch.float64, device=latents[0].device)
    sums = partial.data_ptr(), p.crossing.data_ptr(), p.crossing.numel()
    arguments = grid_of(grid), straight_through.variant, block, sums
    run(_cuda.learned_backward, latents, p, [latents, grads, out], *arguments)


def hadamard_(out: Tensors, tensors: Tensors, block: int) -> None:
    """Write the Hadamard transform of each block: one launch."""
    p = plan(tensors, latents=tensors, plus=out)
    run(_cuda.hadamard, tensors, p, [tensors, tensors, out], block)
