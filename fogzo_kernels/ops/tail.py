"""estimate_adamw_, estimate_sgd_: the fused tail of a step (docs/contract.md, sections 4 and 5).

The estimate, an optimizer's step with it and the next Q(theta), in one pass over memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

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

Op = TypeVar("Op", bound=Callable[..., None])


class NoiseOptions(TypedDict):
    grid: Grid
    straight_through: StraightThrough
    one_minus_beta: float | Tensor
    seed: int | Tensor


class TailOptions(NoiseOptions, total=False):
    """The keywords that :func:`estimate_adamw_` and :func:`estimate_sgd_` share.

    If every direction is lost the gradients serve as they are; if the norm is not finite the step is
    skipped, and only ``quantized`` and ``counters`` are written.

    Args:
        grid, straight_through: the quantizer; ``straight_through`` fixes the noise's distribution and eps.
        one_minus_beta: 1 - beta, in 0..1, a number or a 0-dim float64 tensor.
        seed: unsigned 64 bits, or a 0-dim int64 tensor with those bits.
        step: of training, below 2^32; a number or a 0-dim int64 tensor; by default 0.
        tensor_ids: one per alpha; by default 0, 1, 2, ...
        layouts: where each quantized tensor lies in its parameter, (offset, inner, stride); by default whole.
        epsilon_scale: factor on the eps that ``straight_through`` fixes; by default 1.
        noise_factors: a factor of the noise of each tensor that has an alpha, from :func:`noise_factors`:
            float32, shape (alphas,), finite and >= 0, on the device; by default 1 (contract section 1).
        masters: float32 copies of bfloat16 or float16 latents, updated instead; latents are the rounded copy.
        quantized: one output per alpha that receives the next Q(latent), or codes if int8.
        counters: int64, shape (3,), on the device; counts directions whose c_i was not finite, steps whose norm
            was not finite, and alphas that were not finite or not > 0.
        transform: of the quantizer, for the tensors that have an alpha, as for :func:`perturb_quantize_`;
            latents and grads are those of the weight as it is, ``quantized`` is in the rotated basis.
        backend: by default ``FOGZO_BACKEND``, else the best available.
    """

    step: int | Tensor
    tensor_ids: Sequence[int] | None
    layouts: Sequence[Layout] | None
    epsilon_scale: float
    noise_factors: Tensor | None
    masters: TensorOrList | None
    quantized: TensorOrList | None
    counters: Tensor | None
    transform: Hadamard | None
    backend: str | None


def documented(function: Op) -> Op:
    """Put the shared keywords into the docstring of a function, in the place of ``common``."""
    if function.__doc__ and TailOptions.__doc__:
        shared = TailOptions.__doc__.partition("Args:\n")[2].rstrip()
        function.__doc__ = re.sub(" +common: .*", lambda match: shared, function.__doc__)
    return function


@documented
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
    **common: Unpack[TailOptions],
) -> None:
    """The FOGZO estimate, AdamW's step with it and the next Q(latent), in one pass over memory.

    As :func:`estimate_gradient_` followed by ``torch.optim.AdamW`` (decoupled decay, bias
    correction) and :func:`quantize_`, but G is not rounded to the gradients' dtype, and the gradients
    stay as they were (contract section 4, the fused tail).

    Args:
        latents: float32, bfloat16 or float16, updated in place. The first ``len(alphas)`` are quantized; the
            others take their gradient as it is.
        grads: of the latents' shapes.
        exp_avgs, exp_avg_sqs: float32 state, of the latents' shapes, zero before the first step.
        losses_plus, losses_minus: float32, shape (n,); with n = 0 the step is plain straight-through: G = g.
            None for both: guided noise, no probes, as :func:`estimate_gradient_` has it.
        alphas: float32: one element, one per row, or one per group of the last dimension.
        norm: guide norm N, 0-dim float32 on the device.
        lr: a number, or a 0-dim float64 tensor.
        optimizer_step: 1 at the first step, for the bias correction; a number or a 0-dim int64 tensor.
        common: the keywords of :class:`TailOptions`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend is unavailable on the device.
    """
    beta1, beta2 = betas
    rule = UpdateRule("adamw", weight_decay=weight_decay, beta1=beta1, beta2=beta2, eps=eps)
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists = {"latents": latents, "grads": grads, "alphas": alphas}
    numbers = {"lr": lr, "optimizer_step": optimizer_step}
    update(rule, states, lists, arguments.losses(losses_plus, losses_minus, norm), norm, numbers, common)


@documented
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
    **common: Unpack[TailOptions],
) -> None:
    """The FOGZO estimate, SGD's step with it and the next Q(latent), in one pass over memory.

    As :func:`estimate_gradient_` followed by ``torch.optim.SGD`` and :func:`quantize_`, but G is not rounded to
    the gradients' dtype, and the gradients stay as they were (contract section 4, the fused tail).

    Args:
        latents: float32, bfloat16 or float16, updated in place. The first ``len(alphas)`` are quantized; the
            others take their gradient as it is.
        grads: of the latents' shapes.
        momentum_buffers: float32, of the latents' shapes, zero before the first step; None without momentum.
        losses_plus, losses_minus: float32, shape (n,); with n = 0 the step is plain straight-through: G = g.
            None for both: guided noise, no probes, as :func:`estimate_gradient_` has it.
        alphas: float32: one element, one per row, or one per group of the last dimension.
        norm: guide norm N, 0-dim float32 on the device.
        lr: a number, or a 0-dim float64 tensor.
        momentum, dampening, weight_decay, nesterov: as ``torch.optim.SGD`` has them.
        optimizer_step: 1 at the first step, which is not dampened; a number or a 0-dim int64 tensor.
        common: the keywords of :class:`TailOptions`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend is unavailable on the device.
    """
    rule = UpdateRule(
        "sgd", weight_decay=weight_decay, momentum=momentum, dampening=dampening, nesterov=nesterov
    )
    states = {"momentum_buffers": momentum_buffers}
    lists = {"latents": latents, "grads": grads, "alphas": alphas}
    numbers = {"lr": lr, "optimizer_step": optimizer_step}
    update(rule, states, lists, arguments.losses(losses_plus, losses_minus, norm), norm, numbers, common)


def update(
    rule: UpdateRule,
    states: Mapping[str, TensorOrList | None],
    lists: Mapping[str, TensorOrList],
    losses: Mapping[str, Any],
    norm: Tensor,
    numbers: Mapping[str, float | Tensor],
    common: TailOptions,
) -> None:
    """What every rule's public function does; ``numbers`` are lr and optimizer_step."""
    for name in TailOptions.__required_keys__ - set(common):
        raise TypeError(f"{name} must be given")
    for name in set(common) - set(TailOptions.__annotations__):
        raise TypeError(f"{name} is not a keyword of the fused tail: {', '.join(TailOptions.__annotations__)}")
    given: dict[str, Any] = {"masters": None, "quantized": None, "counters": None, **common}
    backend, block = given.pop("backend", None), block_of(given.pop("transform", None))
    own = {name: given.pop(name) for name in ("masters", "quantized", "counters")}
    latents, alphas = (arguments.tensors(name, lists[name]) for name in ("latents", "alphas"))
    own["first"], own["second"] = [*(arguments.optional(*state) for state in states.items()), []][:2]
    noise = arguments.noisy(latents, norm, **given, count=len(alphas))
    scalars = {name: arguments.scalar(name, value) for name, value in numbers.items()}
    names, values = list(rule.hyperparameters), list(rule.hyperparameters.values())
    kind = {"kind": rule.kind, "hyperparameters": names, "values": values, "nesterov": rule.nesterov}
    op(**lists, **own, **losses, **noise, **scalars, **kind, backend=backend, block=block)


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
