"""The functional API: stable, the base of other front ends (docs/contract.md).

Every op takes lists of tensors, a whole model in one call; a list of one tensor may be given bare.
Tensors are contiguous; latents, grads and outputs are float32, bfloat16 or float16, one dtype per
list, and outputs may be int8 to hold codes. An alpha is float32 with one element (per tensor), one
per row, or one per group of the last dimension. ``seed`` (unsigned 64 bits), ``step`` and
``one_minus_beta`` are numbers, or 0-dim tensors (int64, int64, float64) on the CPU or on the
device; so are ``lr`` (float64) and ``optimizer_step`` (int64). ``backend=None`` means the variable
``FOGZO_BACKEND``, else the best one available. Bad input raises TypeError or ValueError, a backend
that is unavailable RuntimeError, before anything is written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from . import ops, validation
from .spec.grid import Grid
from .spec.noise import (
    DISTRIBUTIONS,
    MAX_SEED,
    MAX_STEP,
    Layout,
    check_range,
    signed64,
)
from .spec.straight_through import StraightThrough
from .spec.update import UpdateRule

if TYPE_CHECKING:
    from typing_extensions import Unpack

TensorOrList = Tensor | Sequence[Tensor]


def noise(
    numel: int,
    distribution: str,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    direction: int = 0,
    tensor_id: int = 0,
    layout: Layout | None = None,
    device: str | torch.device = "cpu",
    backend: str | None = None,
) -> Tensor:
    """The noise u of a parameter or a shard of it, mean 0 and variance 1 (contract section 2).

    Args:
        distribution: ``uniform``, ``rademacher``, ``triangular``, ``logistic`` or ``gaussian``.
        layout: ``(offset, inner, stride)``: local element j is element
            ``offset + (j // inner) * stride + j % inner`` of the whole parameter.

    Returns:
        float32 tensor of shape (numel,).
    """
    check_range("numel", numel, 2**51)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    where = _layouts([layout] if layout is not None else None, [numel], "layout")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found: Tensor = ops.noise(
        numel, distribution, _seed(seed), _step(step), direction, tensor_id, where,
        device, backend,
    )  # fmt: skip
    return found


def guide_sumsq(grads: TensorOrList, alphas: TensorOrList, *, grid: Grid, backend: str | None = None) -> Tensor:
    """Sum of the squares of the gradient in step units, delta * g (contract section 1).

    Add those of several devices or lists before taking the root. The same bits in every run.

    Returns:
        0-dim float64 tensor.
    """
    return _guide(grads, alphas, grid, False, backend)


def guide_norm(grads: TensorOrList, alphas: TensorOrList, *, grid: Grid, backend: str | None = None) -> Tensor:
    """The guide norm N = ||delta * g|| over all tensors (paper section 3; contract section 1).

    Returns:
        0-dim float32 tensor.
    """
    return _guide(grads, alphas, grid, True, backend)


def _guide(grads: TensorOrList, alphas: TensorOrList, grid: Grid, root: bool, backend: str | None) -> Tensor:
    validation.instance("grid", grid, Grid)
    found: Tensor = ops.guide_sumsq(_list("grads", grads), _list("alphas", alphas), grid.r, root, backend)
    return found


def perturb_quantize_(
    plus: TensorOrList | None,
    minus: TensorOrList | None,
    latents: TensorOrList,
    grads: TensorOrList,
    alphas: TensorOrList,
    norm: Tensor,
    *,
    grid: Grid,
    straight_through: StraightThrough,
    one_minus_beta: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor = 0,
    direction: int = 0,
    tensor_ids: Sequence[int] | None = None,
    layouts: Sequence[Layout] | None = None,
    epsilon_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """Write Q(w + eps v) into ``plus`` and Q(w - eps v) into ``minus``; either may be None.

    v = sqrt(beta) s g_w / N + sqrt(1 - beta) u mixes the guide with noise drawn in place (paper
    section 3; contract sections 1 and 4). Latents and grads are only read.

    Args:
        plus, minus: outputs of the latents' shapes; int8 outputs receive codes.
        grads: straight-through gradients, of the latents' shapes.
        norm: guide norm, 0-dim float32 on the device. If it is 0 or not finite, v is noise alone.
        one_minus_beta: 1 - beta, in 0..1; float64, because useful values reach 1e-9. In a compiled
            graph give a tensor: each new number would compile again.
        tensor_ids: by default 0, 1, 2, ...; no two tensors may draw the same noise.
        layouts: where each tensor lies in its parameter (see :func:`noise`); by default whole.
        epsilon_scale: factor on the eps that ``straight_through`` fixes.
    """
    validation.instance("straight_through", straight_through, StraightThrough)
    straight_through.check_grid(grid)
    latents = _list("latents", latents)
    ids, where = _names(tensor_ids, layouts, latents)
    ops.perturb_quantize_(
        _optional("plus", plus), _optional("minus", minus), latents, _list("grads", grads),
        _list("alphas", alphas), norm, _seed(seed), _step(step), _one_minus_beta(one_minus_beta),
        direction, ids, where, grid.qmin, grid.qmax, grid.offset, grid.r,
        straight_through.distribution, _epsilon(straight_through, grid, epsilon_scale), backend,
    )  # fmt: skip


def estimate_gradient_(
    grads: TensorOrList,
    losses_plus: Tensor,
    losses_minus: Tensor,
    alphas: TensorOrList,
    norm: Tensor,
    *,
    grid: Grid,
    straight_through: StraightThrough,
    one_minus_beta: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor = 0,
    tensor_ids: Sequence[int] | None = None,
    layouts: Sequence[Layout] | None = None,
    epsilon_scale: float = 1.0,
    counters: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Replace each straight-through gradient by the FOGZO estimate G, in one pass, in place.

    G = (1/n) sum_i c_i v_i / delta with c_i = (L_i+ - L_i-) / (2 eps) (paper section 3; contract
    section 1); v_i is drawn again from its names, so all of them must be those of
    :func:`perturb_quantize_`, with direction i for loss i.

    Args:
        losses_plus, losses_minus: float32, shape (n,), on the device.
        counters: int64, shape (3,), on the device; counts directions whose c_i was not finite (they
            count as 0), steps whose norm was not finite, and alphas that were not finite or not
            > 0. If every direction or the norm is lost, the gradients stay as they were.
    """
    validation.instance("straight_through", straight_through, StraightThrough)
    straight_through.check_grid(grid)
    grads = _list("grads", grads)
    ids, where = _names(tensor_ids, layouts, grads)
    ops.estimate_gradient_(
        grads, [] if counters is None else [counters], losses_plus, losses_minus,
        _list("alphas", alphas), norm, _seed(seed), _step(step), _one_minus_beta(one_minus_beta),
        ids, where, grid.r, straight_through.distribution,
        _epsilon(straight_through, grid, epsilon_scale), backend,
    )  # fmt: skip


class NoiseOptions(TypedDict):
    grid: Grid
    straight_through: StraightThrough
    one_minus_beta: float | Tensor
    seed: int | Tensor


class TailOptions(NoiseOptions, total=False):
    """The arguments that :func:`estimate_adamw_` and :func:`estimate_sgd_` share."""

    step: int | Tensor
    tensor_ids: Sequence[int] | None
    layouts: Sequence[Layout] | None
    epsilon_scale: float
    masters: TensorOrList | None
    quantized: TensorOrList | None
    counters: Tensor | None
    backend: str | None


def estimate_adamw_(
    latents: TensorOrList,
    grads: TensorOrList,
    exp_avgs: TensorOrList,
    exp_avg_sqs: TensorOrList,
    losses_plus: Tensor,
    losses_minus: Tensor,
    alphas: TensorOrList,
    norm: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    optimizer_step: int | Tensor,
    **common: Unpack[TailOptions],
) -> None:
    """The FOGZO estimate, AdamW's step with it and the next Q(latent), in one pass over memory.

    As :func:`estimate_gradient_` followed by ``torch.optim.AdamW`` (decoupled decay, bias
    correction) and :func:`quantize_`, but G is not rounded to the gradients' dtype, and the gradients
    stay as they were (contract section 4, the fused tail).

    Args:
        latents: updated in place. The first ``len(alphas)`` are quantized; the others take their
            gradient as it is.
        exp_avgs, exp_avg_sqs: float32 state, of the latents' shapes, zero before the first step.
        losses_plus, losses_minus: float32, shape (n,). With n = 0 the step is a plain
            straight-through one: G = g.
        optimizer_step: 1 at the first step; for the bias correction.
        common: ``grid``, ``straight_through``, ``one_minus_beta``, ``seed``, ``step``, ``tensor_ids``,
            ``layouts``, ``epsilon_scale``, ``counters`` and ``backend`` as in
            :func:`estimate_gradient_`, and

            ``masters``: float32 master copies of bfloat16 or float16 latents, updated in their place;
            latents receive the rounded copy.

            ``quantized``: one output per alpha that receives the next Q(latent), or codes if int8.

    If every direction is lost the gradients serve as they are; if the norm is not finite the step is
    skipped, and only ``quantized`` and ``counters`` are written.
    """
    beta1, beta2 = betas
    rule = UpdateRule("adamw", weight_decay=weight_decay, beta1=beta1, beta2=beta2, eps=eps)
    _estimate_update(
        rule, latents, grads, exp_avgs, exp_avg_sqs, losses_plus, losses_minus, alphas, norm, lr,
        optimizer_step, **common,
    )  # fmt: skip


def estimate_sgd_(
    latents: TensorOrList,
    grads: TensorOrList,
    momentum_buffers: TensorOrList | None,
    losses_plus: Tensor,
    losses_minus: Tensor,
    alphas: TensorOrList,
    norm: Tensor,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    optimizer_step: int | Tensor,
    **common: Unpack[TailOptions],
) -> None:
    """The FOGZO estimate, SGD's step with it and the next Q(latent), in one pass over memory.

    As :func:`estimate_adamw_`, with the update of ``torch.optim.SGD``.

    Args:
        momentum_buffers: float32 state, zero before the first step; None without momentum.
        common: as in :func:`estimate_adamw_`.
    """
    rule = UpdateRule(
        "sgd", weight_decay=weight_decay, momentum=momentum, dampening=dampening, nesterov=nesterov
    )
    _estimate_update(
        rule, latents, grads, momentum_buffers, None, losses_plus, losses_minus, alphas, norm, lr,
        optimizer_step, **common,
    )  # fmt: skip


def _estimate_update(
    rule: UpdateRule, latents: TensorOrList, grads: TensorOrList, first: TensorOrList | None,
    second: TensorOrList | None, losses_plus: Tensor, losses_minus: Tensor, alphas: TensorOrList,
    norm: Tensor, lr: float | Tensor, optimizer_step: int | Tensor, *, grid: Grid,
    straight_through: StraightThrough, one_minus_beta: float | Tensor, seed: int | Tensor,
    step: int | Tensor = 0, tensor_ids: Sequence[int] | None = None,
    layouts: Sequence[Layout] | None = None, epsilon_scale: float = 1.0,
    masters: TensorOrList | None = None, quantized: TensorOrList | None = None,
    counters: Tensor | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    validation.instance("straight_through", straight_through, StraightThrough)
    straight_through.check_grid(grid)
    latents, alphas = _list("latents", latents), _list("alphas", alphas)
    ids, where = _names(tensor_ids, layouts, latents[: len(alphas)])
    first_name, second_name = ops.STATES[rule.kind]
    ops.estimate_update_(
        latents, _optional("masters", masters), _optional("quantized", quantized),
        [] if counters is None else [counters], _optional(first_name, first),
        _optional(second_name, second), _list("grads", grads), losses_plus, losses_minus, alphas,
        norm, _seed(seed), _step(step), _one_minus_beta(one_minus_beta), ids, where, grid.qmin,
        grid.qmax, grid.offset, grid.r, straight_through.distribution,
        _epsilon(straight_through, grid, epsilon_scale), _lr(lr), _optimizer_step(optimizer_step),
        rule.kind, ops.hyperparameters_of(rule), rule.nesterov, backend,
    )  # fmt: skip


def quantize(
    latent: Tensor,
    alpha: Tensor,
    *,
    grid: Grid,
    straight_through: StraightThrough,
    quantized: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Q(latent), of the latent's shape and dtype; differentiable in ``latent``.

    The gradient is the straight-through one, g = h'(latent) * dL/dQ (contract section 1).

    Args:
        quantized: Q(latent), where it is known already (from :func:`estimate_adamw_`, say). It is
            returned as it is; only the gradient is computed.
    """
    validation.instance("straight_through", straight_through, StraightThrough)
    straight_through.check_grid(grid)
    options = (
        grid.qmin, grid.qmax, grid.offset, grid.r, straight_through.kind, straight_through.clip, backend
    )  # fmt: skip
    if quantized is None:
        found: Tensor = ops.quantize(latent, alpha, *options)
        return found
    validation.quantize_arguments([quantized], [latent], [alpha])
    found = ops.Quantized.apply(latent, alpha, quantized, *options)
    return found


def quantize_(
    out: TensorOrList,
    latents: TensorOrList,
    alphas: TensorOrList,
    *,
    grid: Grid,
    backend: str | None = None,
) -> None:
    """Write Q(latent), or its codes where ``out`` is int8, for a list of tensors."""
    validation.instance("grid", grid, Grid)
    ops.quantize_(
        _list("out", out), _list("latents", latents), _list("alphas", alphas), grid.qmin,
        grid.qmax, grid.offset, grid.r, backend,
    )  # fmt: skip


def dequantize(codes: Tensor, alpha: Tensor, *, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The values delta * (code + offset) of int8 codes: the bits that a ``dtype`` output gets."""
    validation.instance("codes", codes, Tensor)
    validation.instance("alpha", alpha, Tensor)
    validation.instance("grid", grid, Grid)
    if codes.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {validation.names([codes.dtype])}")
    if dtype not in validation.FLOATS:
        raise TypeError(f"dtype must be {validation.names(validation.FLOATS)}, got {validation.names([dtype])}")
    validation.alpha_list([alpha], [codes])
    validation.values([alpha], grid.r)
    length = codes.numel() // max(alpha.numel(), 1)
    delta = (alpha.flatten() * grid.r).unsqueeze(1)
    values = delta * (codes.reshape(alpha.numel(), length).float() + grid.offset)
    return values.to(dtype).view(codes.shape)


def straight_through_backward_(
    grads: TensorOrList,
    latents: TensorOrList,
    alphas: TensorOrList,
    *,
    grid: Grid,
    straight_through: StraightThrough,
    backend: str | None = None,
) -> None:
    """Multiply gradients with respect to Q by h'(latent), in place (contract section 1)."""
    validation.instance("straight_through", straight_through, StraightThrough)
    straight_through.check_grid(grid)
    ops.straight_through_backward_(
        _list("grads", grads), _list("latents", latents), _list("alphas", alphas), grid.qmin,
        grid.qmax, grid.offset, grid.r, straight_through.kind, straight_through.clip, backend,
    )  # fmt: skip


# ---- arguments


def _list(name: str, tensors: TensorOrList) -> list[Tensor]:
    if not isinstance(tensors, Tensor | Sequence):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(tensors).__name__}")
    found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for kind in set(map(type, found)):
        if not issubclass(kind, Tensor):
            i = list(map(type, found)).index(kind)
            raise TypeError(f"{name}[{i}] must be a tensor, got {kind.__name__}")
    return found


def _optional(name: str, tensors: TensorOrList | None) -> list[Tensor]:
    return [] if tensors is None else _list(name, tensors)


def _lr(value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    validation.learning_rate(value)
    return torch.tensor(value, dtype=torch.float64)


def _optimizer_step(value: int | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    check_range("optimizer_step", value, 2**63)
    return torch.tensor(value, dtype=torch.int64)


def _seed(seed: int | Tensor) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    check_range("seed", seed, MAX_SEED)
    return torch.tensor(signed64(seed), dtype=torch.int64)


def _step(step: int | Tensor) -> Tensor:
    if isinstance(step, Tensor):
        return step
    check_range("step", step, MAX_STEP)
    return torch.tensor(step, dtype=torch.int64)


def _one_minus_beta(value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    validation.unit_interval("one_minus_beta", value)
    return torch.tensor(value, dtype=torch.float64)


def _names(
    tensor_ids: Sequence[int] | None, layouts: Sequence[Layout] | None, tensors: list[Tensor]
) -> tuple[list[int], list[int]]:
    if tensor_ids is not None and not isinstance(tensor_ids, Sequence):
        raise TypeError(f"tensor_ids must be a list of int, got {type(tensor_ids).__name__}")
    ids = list(range(len(tensors))) if tensor_ids is None else list(tensor_ids)
    return ids, _layouts(layouts, list(map(Tensor.numel, tensors)), "layouts")


@functools.lru_cache(validation.KEPT)
def _unsharded(numels: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x for n in numels for x in (0, max(n, 1), max(n, 1)))


def _layouts(layouts: Sequence[Layout] | None, numels: list[int], name: str) -> list[int]:
    if layouts is None:
        known = set(map(type, numels)) == {int}  # not symbolic
        return list((_unsharded if known else _unsharded.__wrapped__)(tuple(numels)))
    for i, layout in enumerate(layouts):
        if not isinstance(layout, Sequence):
            raise TypeError(f"{name}[{i}] must be (offset, inner, stride), got {layout}")
        if len(layout) != 3:
            raise ValueError(f"{name}[{i}] must be (offset, inner, stride), got {layout}")
    return [x for layout in layouts for x in layout]


def _epsilon(straight_through: StraightThrough, grid: Grid, epsilon_scale: float) -> float:
    validation.epsilon_scale(epsilon_scale)
    return straight_through.epsilon(grid, epsilon_scale)
