"""Hand-written CUDA C++ on NVIDIA GPUs (csrc/cuda).

Host side: one launch per op over all tensors, which a plan (backends/gpu/plans.py) names to the kernels.
The native module knows nothing of PyTorch: it gets addresses, the device's number and the stream.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..spec.call import Draw, Losses, Measure, Mix, Update
from ..spec.grid import Grid
from ..spec.noise import DISTRIBUTIONS
from ..spec.straight_through import StraightThrough
from .gpu import cells
from .gpu.plans import Plan, learned_plan, plan

try:
    from .. import _cuda  # type: ignore[attr-defined]
except ImportError as error:  # the message becomes the reason shown
    if "cannot import name" not in str(error):
        raise
    raise ImportError("it is not built; FOGZO_BUILD_CUDA=1 builds it, with nvcc") from error

Tensors = Sequence[Tensor]


def unavailable(device: torch.device) -> str | None:
    """None on a CUDA device that the kernels were built for."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if device.index is None and torch.cuda.is_available():  # the current one, which may be another next time
        device = torch.device("cuda", torch.cuda.current_device())
    return unavailable_on(device)


@functools.cache  # every op asks, and the driver's answer stays
def unavailable_on(device: torch.device) -> str | None:
    """Of one GPU."""
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
    """Makes it current where it is not."""
    return torch.cuda.device(device)


def planned(p: Plan) -> tuple[int, int, int, bool, bool]:
    return p.table.data_ptr(), p.owner.data_ptr(), p.programs, p.per_tensor, p.shard


def on_host(t: Tensor) -> bool:
    """Whether the host can read a scalar without waiting for the device."""
    return t.device.type == "cpu"


def integer(t: Tensor) -> tuple[int, int]:
    """A scalar's address, for the kernel to read, or its value."""
    return (0, int(t)) if on_host(t) else (t.data_ptr(), 0)


def number(t: Tensor) -> tuple[int, float]:
    """The same of a float64."""
    return (0, float(t)) if on_host(t) else (t.data_ptr(), 0.0)


Drawn = tuple[str, float, tuple[tuple[int, int], tuple[int, int], tuple[int, float]]]


def drawn(draw: Draw, mix: Mix | None) -> Drawn:
    """Distribution, its C, and what changes from step to step; noise alone is not mixed."""
    one_minus_beta = (0, 0.0) if mix is None else number(mix.one_minus_beta)
    scalars = integer(draw.seed), integer(draw.step), one_minus_beta
    return draw.distribution, DISTRIBUTIONS[draw.distribution], scalars


def losses_of(losses: Losses, mix: Mix) -> tuple[int, int, int, int, int, float]:
    """An op without losses does not count."""
    plus, minus, counters = losses
    n = plus.numel()
    counter = counters.data_ptr() if counters is not None and n else 0
    return plus.data_ptr(), minus.data_ptr(), n, mix.norm.data_ptr(), counter, mix.epsilon


def grid_of(grid: Grid) -> tuple[int, int, float, int]:
    return grid.qmin, grid.qmax, grid.offset, grid.r


def name_of(tensors: Tensors) -> str:
    """Of their dtype; of no tensors, one that is never used."""
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else "float32"


# ---- ops (docs/contract.md)


def noise(numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor:
    """u = C m, float32, shape (numel,)."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    p = plan([out], plus=[out], tensor_ids=draw.tensor_ids, layouts=draw.layouts)
    with on(out.device):
        _cuda.noise(where(out.device), planned(p), drawn(draw, None), direction)
    return out


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int, root: bool) -> Tensor:
    """Sum of the squares of delta * g, float64, or its root, float32: two launches, no atomics."""
    device = grads[0].device
    p = plan(grads, grads=grads, alphas=alphas)
    partial = torch.empty(max(p.programs, 1), dtype=torch.float64, device=device)
    out = torch.empty((), dtype=torch.float32 if root else torch.float64, device=device)
    with on(device):
        _cuda.guide_sumsq(
            where(device), planned(p), name_of(grads), r, partial.data_ptr(), out.data_ptr(), root
        )
    return out


def perturb_quantize_(
    plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    direction: int, grid: Grid, block: int,
) -> None:  # fmt: skip
    """Write Q(w + eps v) and Q(w - eps v): one launch, one pass."""
    if not latents:
        return
    p = plan(
        latents, latents=latents, grads=grads, plus=plus, minus=minus, alphas=alphas,
        tensor_ids=draw.tensor_ids, layouts=draw.layouts,
    )  # fmt: skip
    device, dtypes = mix.norm.device, (name_of(latents), name_of(grads), name_of(plus or minus))
    with on(device):
        _cuda.perturb_quantize(
            where(device), planned(p), dtypes, bool(plus), bool(minus), drawn(draw, mix), direction,
            mix.norm.data_ptr(), grid_of(grid), mix.epsilon, block,
        )  # fmt: skip


def estimate_gradient_(
    grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses, r: int, block: int
) -> None:
    """Replace g by G: one launch for the coefficients, one for all tensors and directions."""
    device = mix.norm.device
    p = plan(grads, grads=grads, alphas=alphas, tensor_ids=draw.tensor_ids, layouts=draw.layouts)
    coefficients = torch.empty(
        _cuda.ESTIMATE_COEFFICIENTS + losses.plus.numel(), dtype=torch.float32, device=device
    )
    with on(device):
        _cuda.estimate_gradient(
            where(device), planned(p), name_of(grads), drawn(draw, mix), losses_of(losses, mix), r,
            coefficients.data_ptr(), block,
        )  # fmt: skip


def estimate_update_(
    latents: Tensors, quantized: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    losses: Losses, grid: Grid, update: Update, block: int,
) -> None:  # fmt: skip
    """G, the optimizer's step and Q(theta): one launch for the coefficients, one for all tensors."""
    device, rule = mix.norm.device, update.rule
    p = plan(
        latents, latents=latents, grads=grads, plus=quantized, minus=update.masters, alphas=alphas,
        states=update.states, tensor_ids=draw.tensor_ids, layouts=draw.layouts,
    )  # fmt: skip
    coefficients = torch.empty(
        _cuda.UPDATE_COEFFICIENTS + losses.plus.numel(), dtype=torch.float32, device=device
    )
    optimizer = rule.variant, rule.hyperparameters, number(update.lr), integer(update.optimizer_step)
    with on(device):
        _cuda.estimate_update(
            where(device), planned(p), (name_of(latents), name_of(grads), name_of(quantized)),
            bool(update.masters), bool(quantized), drawn(draw, mix), losses_of(losses, mix), grid_of(grid),
            optimizer, coefficients.data_ptr(), block,
        )  # fmt: skip


def quantize_(out: Tensors, latents: Tensors, alphas: Tensors, grid: Grid, block: int) -> None:
    """Write Q(theta): one launch."""
    device, p = latents[0].device, plan(latents, latents=latents, plus=out, alphas=alphas)
    dtypes = name_of(latents), name_of(latents), name_of(out)
    with on(device):
        _cuda.quantize(where(device), planned(p), dtypes, grid_of(grid), block)


def straight_through_backward_(
    out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
    straight_through: StraightThrough, block: int,
) -> None:  # fmt: skip
    """Write g * h'(theta): one launch."""
    device, p = latents[0].device, plan(latents, latents=latents, grads=grads, plus=out, alphas=alphas)
    dtypes = name_of(latents), name_of(grads), name_of(out)
    with on(device):
        _cuda.straight_through_backward(
            where(device), planned(p), dtypes, grid_of(grid), straight_through.variant, block
        )


def measure_alphas_(alphas: Tensors, tensors: Tensors, measure: Measure) -> None:
    """Write max(factor * (statistic + add), least) of each cell: one launch, and one for cells in pieces."""
    device, p = tensors[0].device, cells.plan(tensors, alphas)
    partial = torch.empty(p.programs if p.seconds else 0, dtype=torch.float64, device=device)
    planned = p.table.data_ptr(), p.owner.data_ptr(), p.second.data_ptr(), p.programs, p.seconds
    with on(device):
        _cuda.measure_alphas(where(device), planned, name_of(tensors), tuple(measure), partial.data_ptr())


def learned_backward_(
    out: Tensors, alpha_grads: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
    straight_through: StraightThrough, factors: Sequence[float], block: int,
) -> None:  # fmt: skip
    """Write g * h'(theta), and the gradients of the alphas: a launch, and one for those of several programs."""
    p = learned_plan(out, alpha_grads, grads, latents, alphas, factors)
    device, dtypes = latents[0].device, (name_of(latents), name_of(grads), name_of(out))
    partial = torch.empty(2 * p.programs, dtype=torch.float64, device=device)
    sums = partial.data_ptr(), p.crossing.data_ptr(), p.crossing.numel()
    with on(device):
        _cuda.learned_backward(
            where(device), planned(p), dtypes, grid_of(grid), straight_through.variant, sums, block
        )


def hadamard_(out: Tensors, tensors: Tensors, block: int) -> None:
    """Write the Hadamard transform of each block: one launch."""
    device, p = tensors[0].device, plan(tensors, latents=tensors, plus=out)
    with on(device):
        _cuda.hadamard(where(device), planned(p), (name_of(tensors), name_of(tensors), name_of(out)), block)
