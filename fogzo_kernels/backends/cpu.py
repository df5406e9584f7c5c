"""C++ on the CPU (csrc/cpu): lists of tensors in one call, spread over PyTorch's threads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]  # noqa: F401  registers torch.ops.fogzo_cpu; an ImportError is the reason shown
from ..spec.call import Draw, Losses, Measure, Mix, Update
from ..spec.grid import Grid
from ..spec.noise import DISTRIBUTIONS
from ..spec.straight_through import StraightThrough

Tensors = Sequence[Tensor]
native = torch.ops.fogzo_cpu
#: The native ops refuse by themselves, by a RuntimeError and before anything is written, all that
#: fogzo_kernels/ops refuses of lists on the CPU.
CHECKS_LISTS = True


def unavailable(device: torch.device) -> str | None:
    """None on the CPU."""
    return None if device.type == "cpu" else "it runs on the CPU only"


def noise(numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor:
    """u = C m, float32, shape (numel,)."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    native.noise(out, *drawn(draw), direction)
    return out


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int, root: bool) -> Tensor:
    """Sum of the squares of delta * g, float64, or its root, float32; whatever the number of threads."""
    out = torch.empty((), dtype=torch.float64)
    native.guide_sumsq(out, grads, alphas, r)
    return out.sqrt_().float() if root else out


def perturb_quantize_(
    plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    direction: int, grid: Grid, block: int,
) -> None:  # fmt: skip
    """Write Q(w + eps v) and Q(w - eps v) in one pass."""
    native.perturb_quantize(
        plus, minus, latents, grads, alphas, *drawn(draw), *mixed(mix), direction, *grid_of(grid, block)
    )


def estimate_gradient_(
    grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses, r: int, block: int
) -> None:
    """Replace g by G in one pass over all directions."""
    native.estimate_gradient(
        grads, counters_of(losses), alphas, *drawn(draw), *mixed(mix), losses.plus, losses.minus, r, block
    )


def estimate_update_(
    latents: Tensors, quantized: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    losses: Losses, grid: Grid, update: Update, block: int,
) -> None:  # fmt: skip
    """G, the optimizer's step and Q(theta) in one pass."""
    first, second = (*update.states, [], [])[:2]
    native.estimate_update(
        latents, update.masters, first, second, quantized, counters_of(losses), grads, alphas, *drawn(draw),
        *mixed(mix), losses.plus, losses.minus, *grid_of(grid, block), *update_of(update),
    )  # fmt: skip


def quantize_(out: Tensors, latents: Tensors, alphas: Tensors, grid: Grid, block: int) -> None:
    """Write Q(theta)."""
    native.quantize(out, latents, alphas, *grid_of(grid, block))


def straight_through_backward_(
    out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
    straight_through: StraightThrough, block: int,
) -> None:  # fmt: skip
    """Write g * h'(theta)."""
    native.straight_through_backward(
        out, grads, latents, alphas, *grid_of(grid, block), straight_through.variant
    )


def measure_alphas_(alphas: Tensors, tensors: Tensors, measure: Measure) -> None:
    """Write max(factor * (statistic + add), least) of each cell."""
    native.measure_alphas(alphas, tensors, *measure)


def learned_backward_(
    out: Tensors, alpha_grads: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
    straight_through: StraightThrough, factors: Sequence[float],
    block: int,
) -> None:  # fmt: skip
    """Write g * h'(theta), and the gradients of the alphas; whatever the number of threads."""
    native.learned_backward(
        out, alpha_grads, grads, latents, alphas, *grid_of(grid, block), straight_through.variant, factors
    )


def hadamard_(out: Tensors, tensors: Tensors, block: int) -> None:
    """Write the Hadamard transform of each block."""
    native.hadamard(out, tensors, block)


# ---- arguments of the native ops (csrc/cpu/nouns.h)


def drawn(draw: Draw) -> tuple[str, float, Tensor, Tensor, Sequence[int], list[int]]:
    """Distribution and its C, seed, step, tensor ids, and layouts in a row."""
    C = DISTRIBUTIONS.get(draw.distribution, 0.0)  # the op names the known ones
    return draw.distribution, C, draw.seed, draw.step, draw.tensor_ids, [*chain.from_iterable(draw.layouts)]


def mixed(mix: Mix) -> tuple[Tensor, Tensor, float]:
    """N, 1 - beta and eps."""
    return mix.norm, mix.one_minus_beta, mix.epsilon


def grid_of(grid: Grid, block: int) -> tuple[int, int, float, int, int]:
    """qmin, qmax, offset and r, and the block of the transform or 0."""
    return grid.qmin, grid.qmax, grid.offset, grid.r, block


def update_of(update: Update) -> tuple[str, list[str], list[float], Tensor, Tensor]:
    """The rule's variant, its hyperparameters' names and values, lr, and the optimizer's step."""
    h = update.rule.hyperparameters
    return update.rule.variant, list(h), list(h.values()), update.lr, update.optimizer_step


def counters_of(losses: Losses) -> Tensors:
    """As a list of one or none."""
    return [] if losses.counters is None else [losses.counters]
