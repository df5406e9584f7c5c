"""C++ on the CPU (csrc/cpu): lists of tensors in one call, spread over PyTorch's threads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]  # noqa: F401  registers torch.ops.fogzo_cpu; an ImportError is the reason shown
from ..spec.call import Draw, Losses, Mix, Update
from ..spec.grid import Grid
from ..spec.noise import DISTRIBUTIONS, Layout
from ..spec.straight_through import StraightThrough

Tensors = Sequence[Tensor]
native = torch.ops.fogzo_cpu


def unavailable(device: torch.device) -> str | None:
    """None on the CPU."""
    return None if device.type == "cpu" else "it runs on the CPU only"


def noise(numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor:
    """u = C m, float32, shape (numel,)."""
    out = torch.empty(numel, device=device)
    native.noise(
        out, draw.distribution, DISTRIBUTIONS[draw.distribution], int(draw.seed), int(draw.step), direction,
        draw.tensor_ids[0], draw.layouts[0],
    )  # fmt: skip
    return out


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int, root: bool) -> Tensor:
    """Sum of the squares of delta * g, float64, or its root, float32; whatever the number of threads."""
    out = torch.empty((), dtype=torch.float64)
    native.guide_sumsq(out, grads, alphas, r)
    return out.sqrt_().float() if root else out


def perturb_quantize_(
    plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    direction: int, grid: Grid,
) -> None:  # fmt: skip
    """Write Q(w + eps v) and Q(w - eps v) in one pass."""
    native.perturb_quantize(
        plus, minus, latents, grads, alphas, mix.norm, int(draw.seed), int(draw.step),
        float(mix.one_minus_beta), direction, draw.tensor_ids, flat(draw.layouts), grid.qmin, grid.qmax,
        grid.offset, grid.r, draw.distribution, DISTRIBUTIONS[draw.distribution], mix.epsilon,
    )  # fmt: skip


def estimate_gradient_(grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses, r: int) -> None:
    """Replace g by G in one pass over all directions."""
    native.estimate_gradient(
        grads, counters_of(losses), losses.plus, losses.minus, alphas, mix.norm, int(draw.seed),
        int(draw.step), float(mix.one_minus_beta), draw.tensor_ids, flat(draw.layouts), r,
        draw.distribution, DISTRIBUTIONS[draw.distribution], mix.epsilon,
    )  # fmt: skip


def estimate_update_(
    latents: Tensors, quantized: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    losses: Losses, grid: Grid, update: Update,
) -> None:  # fmt: skip
    """G, the optimizer's step and Q(theta) in one pass."""
    rule = update.rule
    hyperparameters = [rule.weight_decay, rule.beta1, rule.beta2, rule.eps, rule.momentum, rule.dampening]
    first, second = (*update.states, [], [])[:2]
    native.estimate_update(
        latents, update.masters, first, second, quantized, counters_of(losses), grads, losses.plus,
        losses.minus, alphas, mix.norm, int(draw.seed), int(draw.step), float(mix.one_minus_beta),
        draw.tensor_ids, flat(draw.layouts), grid.qmin, grid.qmax, grid.offset, grid.r, draw.distribution,
        DISTRIBUTIONS[draw.distribution], mix.epsilon, rule.variant, hyperparameters, float(update.lr),
        int(update.optimizer_step),
    )  # fmt: skip


def quantize_(out: Tensors, latents: Tensors, alphas: Tensors, grid: Grid) -> None:
    """Write Q(theta)."""
    native.quantize(out, latents, alphas, grid.qmin, grid.qmax, grid.offset, grid.r)


def straight_through_backward_(
    out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
    straight_through: StraightThrough,
) -> None:  # fmt: skip
    """Write g * h'(theta)."""
    native.straight_through_backward(
        out, grads, latents, alphas, grid.qmin, grid.qmax, grid.offset, grid.r,
        straight_through.kind, straight_through.clip,
    )  # fmt: skip


def counters_of(losses: Losses) -> Tensors:
    return [] if losses.counters is None else [losses.counters]


def flat(layouts: Sequence[Layout]) -> list[int]:
    return list(chain.from_iterable(layouts))
