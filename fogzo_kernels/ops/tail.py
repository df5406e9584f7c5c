"""estimate_adamw_, estimate_sgd_: the fused tail of a step (docs/contract.md, sections 4 and 5).

The estimate, an optimizer's step with it and the next Q(theta), in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec.call import Update
from ..spec.grid import FLOATS, OUTPUTS, Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.noise import Layout
from ..spec.straight_through import StraightThrough
from ..spec.update import KINDS, UpdateRule
from . import arguments, checks
from .arguments import TensorOrList
from .listop import GRID, NAMES, STATE, ListOp


def estimate_adamw_(
    latents: TensorOrList,
    grads: TensorOrList,
    exp_avgs: TensorOrList,
    exp_avg_sqs: TensorOrList,
    losses_plus: Tensor | None,
    losses_minus: Tensor | None,
    alphas: TensorOrList,
    norm: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    optimizer_step: int | Tensor,
    grid: Grid,
    straight_through: StraightThrough,
    one_minus_beta: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor = 0,
    tensor_ids: Sequence[int] | None = None,
    layouts: Sequence[Layout] | None = None,
    epsilon_scale: float = 1.0,
    noise_factors: Tensor | None = None,
    masters: TensorOrList | None = None,
    quantized: TensorOrList | None = None,
    counters: Tensor | None = None,
    transform: Hadamard | None = None,
    backend: str | None = None,
) -> None:
    """Make the FOGZO estimate, take AdamW's step with it and write the next Q(latent), in one pass over memory.

    The result is that of :func:`estimate_gradient_`, ``torch.optim.AdamW`` and :func:`quantize_` one after
    another, except that G is not rounded to the gradients' dtype and that the gradients stay as they were
    (contract, section 4, the fused tail; AdamW: arXiv 1711.05101).

    If the slope of every direction is not finite, the step takes the straight-through gradients. If the norm is
    not finite, the op skips the step and writes only ``quantized`` and ``counters``.

    Args:
        latents: weights, updated in place: contiguous, one dtype (float32, bfloat16 or float16), one device.
            The first ``len(alphas)`` are quantized; the others take their gradient as it is.
        grads: straight-through gradients of the latents' shapes; float32, bfloat16 or float16.
        exp_avgs, exp_avg_sqs: means of the gradient and of its square: float32, of the latents' shapes, 0
            before the first step.
        losses_plus, losses_minus: losses of the probes at +eps and -eps: float32, shape (n,), on the device.
            With n = 0 the step is plain straight-through. None for both: guided noise, without probes.
        alphas: scales of the first latents: float32, of one element, one per row, or one per group of a row.
        norm: guide norm N from :func:`guide_norm`: float32, 0-dim, on the device.
        lr: learning rate, a number or a 0-dim float64 tensor.
        betas: decay of the two means, each in 0..1, below 1.
        eps: number that is added to the root of the second mean, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        optimizer_step: number of the optimizer's step, 1 at the first, for the bias correction: an int or a
            0-dim int64 tensor.
        grid: the values that a quantized weight may take, such as ``Grid.uniform(2)``.
        straight_through: the straight-through estimator. It fixes the distribution of the noise and eps.
        one_minus_beta: share of the noise, 1 - beta, in 0..1: a number, or a 0-dim float64 tensor. A compiled
            graph compiles again for each new number.
        seed: seed of the noise: an int in 0..2^64 - 1, or a 0-dim int64 tensor with those bits.
        step: number of the training step, 0..2^32 - 1: an int or a 0-dim int64 tensor.
        tensor_ids: one number per alpha that names the noise, below 2^32 - 1, no two alike. None: 0, 1, 2, ...
        layouts: for shards, one ``(offset, inner, stride)`` per alpha: local element j is element ``offset + (j
            // inner) * stride + j % inner`` of the parameter. None: the tensors are whole.
        epsilon_scale: factor on the eps that ``straight_through`` fixes, finite, >= 0.
        noise_factors: of each tensor with an alpha, from :func:`noise_factors`: float32, (alphas,), on the
            device. None: 1.
        masters: float32 copies of bfloat16 or float16 latents. The op updates them and rounds them into the
            latents. None: the latents are updated.
        quantized: one output per alpha for the next Q(latent): float32, bfloat16, float16, or int8 for codes.
            None: it is not written.
        counters: int64, shape (3,), on the device. The op adds the number of directions whose slope c_i is not
            finite, of steps whose norm is not finite, and of alphas that are not finite or not > 0. None:
            nothing is counted.
        transform: the Hadamard transform of the quantizer, or None. Latents and gradients belong to the
            weight before the transform; ``quantized`` receives the transformed weight.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> w, g, m, v = torch.tensor([0.9, -0.2]), torch.tensor([3.0, -4.0]), torch.zeros(2), torch.zeros(2)
        >>> alpha, none = torch.tensor([0.5]), torch.empty(0)  # no losses: a plain straight-through step
        >>> how = {"grid": fk.Grid.uniform(2), "straight_through": fk.StraightThrough("identity")}
        >>> how |= {"one_minus_beta": 0.0, "seed": 0, "lr": 0.1, "weight_decay": 0.0, "optimizer_step": 1}
        >>> fk.functional.estimate_adamw_(w, g, m, v, none, none, alpha, torch.tensor(2.5), **how)
        >>> w
        tensor([ 0.8000, -0.1000])
    """
    beta1, beta2 = betas
    rule = UpdateRule("adamw", weight_decay=weight_decay, beta1=beta1, beta2=beta2, eps=eps)
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists = {"latents": latents, "grads": grads, "alphas": alphas, "masters": masters, "quantized": quantized}
    names = seed, step, tensor_ids, layouts
    noise = grid, straight_through, one_minus_beta, *names, epsilon_scale, noise_factors
    scalars = {"lr": lr, "optimizer_step": optimizer_step}
    own = {"counters": counters, **arguments.losses(losses_plus, losses_minus, norm)}
    update(rule, states, lists, norm, noise, scalars, own, transform, backend)


def estimate_sgd_(
    latents: TensorOrList,
    grads: TensorOrList,
    momentum_buffers: TensorOrList | None,
    losses_plus: Tensor | None,
    losses_minus: Tensor | None,
    alphas: TensorOrList,
    norm: Tensor,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    optimizer_step: int | Tensor,
    grid: Grid,
    straight_through: StraightThrough,
    one_minus_beta: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor = 0,
    tensor_ids: Sequence[int] | None = None,
    layouts: Sequence[Layout] | None = None,
    epsilon_scale: float = 1.0,
    noise_factors: Tensor | None = None,
    masters: TensorOrList | None = None,
    quantized: TensorOrList | None = None,
    counters: Tensor | None = None,
    transform: Hadamard | None = None,
    backend: str | None = None,
) -> None:
    """Make the FOGZO estimate, take SGD's step with it and write the next Q(latent), in one pass over memory.

    The result is that of :func:`estimate_gradient_`, ``torch.optim.SGD`` and :func:`quantize_` one after
    another, except that G is not rounded to the gradients' dtype and that the gradients stay as they were
    (contract, section 4, the fused tail).

    If the slope of every direction is not finite, the step takes the straight-through gradients. If the norm is
    not finite, the op skips the step and writes only ``quantized`` and ``counters``.

    Args:
        latents: weights, updated in place: contiguous, one dtype (float32, bfloat16 or float16), one device.
            The first ``len(alphas)`` are quantized; the others take their gradient as it is.
        grads: straight-through gradients of the latents' shapes; float32, bfloat16 or float16.
        momentum_buffers: float32, of the latents' shapes, 0 before the first step. None without momentum.
        losses_plus, losses_minus: losses of the probes at +eps and -eps: float32, shape (n,), on the device.
            With n = 0 the step is plain straight-through. None for both: guided noise, without probes.
        alphas: scales of the first latents: float32, of one element, one per row, or one per group of a row.
        norm: guide norm N from :func:`guide_norm`: float32, 0-dim, on the device.
        lr: learning rate, a number or a 0-dim float64 tensor.
        momentum: factor on the buffer, >= 0.
        dampening: share of the gradient that the buffer does not take, after the first step.
        weight_decay: weight decay that is added to the gradient, >= 0.
        nesterov: use Nesterov's form. It needs momentum > 0 and dampening 0.
        optimizer_step: number of the optimizer's step, 1 at the first, which is not dampened: an int or a 0-dim
            int64 tensor.
        grid: the values that a quantized weight may take, such as ``Grid.uniform(2)``.
        straight_through: the straight-through estimator. It fixes the distribution of the noise and eps.
        one_minus_beta: share of the noise, 1 - beta, in 0..1: a number, or a 0-dim float64 tensor. A compiled
            graph compiles again for each new number.
        seed: seed of the noise: an int in 0..2^64 - 1, or a 0-dim int64 tensor with those bits.
        step: number of the training step, 0..2^32 - 1: an int or a 0-dim int64 tensor.
        tensor_ids: one number per alpha that names the noise, below 2^32 - 1, no two alike. None: 0, 1, 2, ...
        layouts: for shards, one ``(offset, inner, stride)`` per alpha: local element j is element ``offset + (j
            // inner) * stride + j % inner`` of the parameter. None: the tensors are whole.
        epsilon_scale: factor on the eps that ``straight_through`` fixes, finite, >= 0.
        noise_factors: of each tensor with an alpha, from :func:`noise_factors`: float32, (alphas,), on the
            device. None: 1.
        masters: float32 copies of bfloat16 or float16 latents. The op updates them and rounds them into the
            latents. None: the latents are updated.
        quantized: one output per alpha for the next Q(latent): float32, bfloat16, float16, or int8 for codes.
            None: it is not written.
        counters: int64, shape (3,), on the device. The op adds the number of directions whose slope c_i is not
            finite, of steps whose norm is not finite, and of alphas that are not finite or not > 0. None:
            nothing is counted.
        transform: the Hadamard transform of the quantizer, or None. Latents and gradients belong to the
            weight before the transform; ``quantized`` receives the transformed weight.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> w, g, q = torch.tensor([0.9, -0.2]), torch.tensor([3.0, -4.0]), torch.empty(2)
        >>> alpha, none = torch.tensor([0.5]), torch.empty(0)  # no losses: a plain straight-through step
        >>> how = {"grid": fk.Grid.uniform(2), "straight_through": fk.StraightThrough("identity")}
        >>> how |= {"one_minus_beta": 0.0, "seed": 0, "lr": 0.1, "optimizer_step": 1, "quantized": q}
        >>> fk.functional.estimate_sgd_(w, g, None, none, none, alpha, torch.tensor(2.5), **how)
        >>> w, q.tolist()
        (tensor([0.6000, 0.2000]), [0.5, 0.0])
    """
    rule = UpdateRule(
        "sgd", weight_decay=weight_decay, momentum=momentum, dampening=dampening, nesterov=nesterov
    )
    states = {"momentum_buffers": momentum_buffers}
    lists = {"latents": latents, "grads": grads, "alphas": alphas, "masters": masters, "quantized": quantized}
    names = seed, step, tensor_ids, layouts
    noise = grid, straight_through, one_minus_beta, *names, epsilon_scale, noise_factors
    scalars = {"lr": lr, "optimizer_step": optimizer_step}
    own = {"counters": counters, **arguments.losses(losses_plus, losses_minus, norm)}
    update(rule, states, lists, norm, noise, scalars, own, transform, backend)


def update(
    rule: UpdateRule,
    states: Mapping[str, TensorOrList | None],
    lists: Mapping[str, Any],
    norm: Tensor,
    noise: tuple[Any, ...],
    scalars: Mapping[str, float | Tensor],
    own: dict[str, Any],
    transform: Hadamard | None,
    backend: str | None,
) -> None:
    """Call the op as every rule's public function does.

    ``noise`` has the arguments that say which noise is drawn and how it is mixed, in the order of
    :func:`arguments.noisy`; ``own`` the losses and counters.
    """
    latents, alphas = (arguments.tensors(name, lists[name]) for name in ("latents", "alphas"))
    own["first"], own["second"] = [*(arguments.optional(*state) for state in states.items()), []][:2]
    own |= arguments.noisy(latents, norm, *(*noise, len(alphas)))
    own |= {name: arguments.scalar(name, value) for name, value in scalars.items()}
    names, values = list(rule.hyperparameters), list(rule.hyperparameters.values())
    kind = {"kind": rule.kind, "hyperparameters": names, "values": values, "nesterov": rule.nesterov}
    op(**lists, **own, **kind, backend=backend, block=block_of(transform))


def check(
    latents: Sequence[Tensor], alphas: Sequence[Tensor], quantized: Sequence[Tensor], update: Update
) -> None:
    if update.masters:
        checks.tensor_list("masters", update.masters, (torch.float32,), latents)
        if latents and latents[0].dtype == torch.float32:
            raise TypeError("latents must be bfloat16 or float16 where masters are given, got float32")
    for name, tensors in zip(KINDS[update.rule.kind], update.states, strict=False):
        checks.tensor_list(name, tensors, (torch.float32,), latents)
    if quantized:
        checks.tensor_list("quantized", quantized, OUTPUTS, latents[: len(alphas)])


op = ListOp(
    "estimate_update_(Tensor(a!)[] latents, Tensor(b!)[] masters, Tensor(c!)[] quantized,"
    " Tensor(d!)[] counters, Tensor(e!)[] first, Tensor(f!)[] second, Tensor[] grads, Tensor losses_plus,"
    f" Tensor losses_minus, Tensor[] alphas, {STATE}, {NAMES}, {GRID}, str distribution, float epsilon,"
    " Tensor lr, Tensor optimizer_step, str kind, str[] hyperparameters, float[] values, bool nesterov,"
    " str? backend, int block=0, Tensor? noise_factors=None, bool guided=False) -> ()",
    {"latents": FLOATS, "grads": FLOATS},
    check,
)
