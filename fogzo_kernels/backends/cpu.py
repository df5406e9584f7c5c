"""C++ on the CPU (csrc/cpu): lists of tensors in one call, spread over PyTorch's threads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]  # noqa: F401  registers torch.ops.fogzo_cpu; an ImportError is the reason shown
from ..grid import Grid
from ..noise import DISTRIBUTIONS, Layout
from ..straight_through import StraightThrough
from ..update import UpdateRule

Tensors = Sequence[Tensor]
native = torch.ops.fogzo_cpu


def unavailable(device: torch.device) -> str | None:
    """None on the CPU."""
    return None if device.type == "cpu" else "it runs on the CPU only"


def noise(
    numel: int, distribution: str, seed: Tensor, step: Tensor, direction: int, tensor_id: int,
    layout: Layout, device: torch.device,
) -> Tensor:  # fmt: skip
    """u = C m, float32, shape (numel,)."""
    out = torch.empty(numel, device=device)
    scale = DISTRIBUTIONS[distribution]
    native.noise(out, distribution, scale, int(seed), int(step), direction, tensor_id, layout)
    return out


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int, root: bool) -> Tensor:
    """Sum of the squares of delta * g, float64, or its root, float32; whatever the number of threads."""
    out = torch.empty((), dtype=torch.float64)
    native.guide_sumsq(out, grads, alphas, r)
    return out.sqrt_().float() if root else out


def perturb_quantize_(
    plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors,
    norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor, direction: int,
    tensor_ids: Sequence[int], layouts: Sequence[Layout], grid: Grid, distribution: str,
    epsilon: float,
) -> None:  # fmt: skip
    """Write Q(w + eps v) and Q(w - eps v) in one pass."""
    native.perturb_quantize(
        plus, minus, latents, grads, alphas, norm, int(seed), int(step), float(one_minus_beta),
        direction, tensor_ids, flat(layouts), grid.qmin, grid.qmax, grid.offset, grid.r,
        distribution, DISTRIBUTIONS[distribution], epsilon,
    )  # fmt: skip


def estimate_gradient_(
    grads: Tensors, counters: Tensors, losses_plus: Tensor, losses_minus: Tensor,
    alphas: Tensors, norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor,
    tensor_ids: Sequence[int], layouts: Sequence[Layout], r: int, distribution: str,
    epsilon: float,
) -> None:  # fmt: skip
    """Replace g by G in one pass over all directions."""
    native.estimate_gradient(
        grads, counters, losses_plus, losses_minus, alphas, norm, int(seed), int(step),
        float(one_minus_beta), tensor_ids, flat(layouts), r, distribution,
        DISTRIBUTIONS[distribution], epsilon,
    )  # fmt: skip


def estimate_update_(
    latents: Tensors, masters: Tensors, first: Tensors, second: Tensors, quantized: Tensors,
    counters: Tensors, grads: Tensors, losses_plus: Tensor, losses_minus: Tensor,
    alphas: Tensors, norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor,
    tensor_ids: Sequence[int], layouts: Sequence[Layout], grid: Grid, distribution: str,
    epsilon: float, rule: UpdateRule, lr: Tensor, count: Tensor,
) -> None:  # fmt: skip
    """G, the optimizer's step and Q(theta) in one pass."""
    hyperparameters = [rule.weight_decay, rule.beta1, rule.beta2, rule.eps, rule.momentum, rule.dampening]
    native.estimate_update(
        latents, masters, first, second, quantized, counters, grads, losses_plus, losses_minus,
        alphas, norm, int(seed), int(step), float(one_minus_beta), tensor_ids, flat(layouts),
        grid.qmin, grid.qmax, grid.offset, grid.r, distribution, DISTRIBUTIONS[distribution], epsilon,
        rule.variant, hyperparameters, float(lr), int(count),
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


def flat(layouts: Sequence[Layout]) -> list[int]:
    return list(chain.from_iterable(layouts))
