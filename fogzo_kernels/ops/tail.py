"""estimate_adamw_, estimate_sgd_: the fused tail of a step (docs/contract.md, sections 4 and 5).

The estimate, an optimizer's step with it and the next Q(theta), in one pass over memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from ..backends import select
from ..spec.call import Draw, Losses, Mix, Update
from ..spec.dtypes import FLOATS, OUTPUTS
from ..spec.grid import Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.noise import Layout
from ..spec.straight_through import StraightThrough
from ..spec.update import KINDS, UpdateRule
from . import arguments, checks, memory
from .arguments import TensorOrList
from .listop import GRID, KEPT, NAMES, STATE, counters_of, grid_of, list_op, run_checked, triples


class NoiseOptions(TypedDict):
    grid: Grid
    straight_through: StraightThrough
    one_minus_beta: float | Tensor
    seed: int | Tensor


class TailOptions(NoiseOptions, total=False):
    """The keywords that :func:`estimate_adamw_` and :func:`estimate_sgd_` share."""

    step: int | Tensor
    tensor_ids: Sequence[int] | None
    layouts: Sequence[Layout] | None
    epsilon_scale: float
    masters: TensorOrList | None
    quantized: TensorOrList | None
    counters: Tensor | None
    transform: Hadamard | None
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
        latents: float32, bfloat16 or float16, updated in place. The first ``len(alphas)`` are quantized; the
            others take their gradient as it is.
        grads: of the latents' shapes.
        exp_avgs, exp_avg_sqs: float32 state, of the latents' shapes, zero before the first step.
        losses_plus, losses_minus: float32, shape (n,). With n = 0 the step is a plain
            straight-through one: G = g.
        alphas: float32: one element, one per row, or one per group of the last dimension.
        norm: guide norm N, 0-dim float32 on the device.
        lr: a number, or a 0-dim float64 tensor.
        optimizer_step: 1 at the first step, for the bias correction; a number or a 0-dim int64 tensor.
        grid, straight_through: the quantizer; ``straight_through`` fixes the noise's distribution and eps.
        one_minus_beta: 1 - beta, in 0..1, a number or a 0-dim float64 tensor.
        seed: unsigned 64 bits, or a 0-dim int64 tensor with those bits.
        step: of training, below 2^32; a number or a 0-dim int64 tensor; by default 0.
        tensor_ids: one per alpha; by default 0, 1, 2, ...
        layouts: where each quantized tensor lies in its parameter, (offset, inner, stride); by default whole.
        epsilon_scale: factor on the eps that ``straight_through`` fixes; by default 1.
        masters: float32 master copies of bfloat16 or float16 latents, updated in their place; latents receive
            the rounded copy.
        quantized: one output per alpha that receives the next Q(latent), or codes if int8.
        counters: int64, shape (3,), on the device; counts directions whose c_i was not finite, steps whose norm
            was not finite, and alphas that were not finite or not > 0.
        transform: of the quantizer, for the tensors that have an alpha, as for :func:`perturb_quantize_`;
            latents and grads are those of the weight as it is, ``quantized`` is in the rotated basis.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    If every direction is lost the gradients serve as they are; if the norm is not finite the step is
    skipped, and only ``quantized`` and ``counters`` are written.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range; nothing is
            written.
        RuntimeError: the backend is unavailable on the device.
    """
    beta1, beta2 = betas
    rule = UpdateRule("adamw", weight_decay=weight_decay, beta1=beta1, beta2=beta2, eps=eps)
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    losses = Losses(losses_plus, losses_minus, common.get("counters"))
    _tail(rule, states, latents, grads, alphas, losses, norm, (lr, optimizer_step), common)


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

    As :func:`estimate_gradient_` followed by ``torch.optim.SGD`` and :func:`quantize_`, but G is not rounded to
    the gradients' dtype, and the gradients stay as they were (contract section 4, the fused tail).

    Args:
        latents: float32, bfloat16 or float16, updated in place. The first ``len(alphas)`` are quantized; the
            others take their gradient as it is.
        grads: of the latents' shapes.
        momentum_buffers: float32 state, of the latents' shapes, zero before the first step; None without
            momentum.
        losses_plus, losses_minus: float32, shape (n,). With n = 0 the step is a plain
            straight-through one: G = g.
        alphas: float32: one element, one per row, or one per group of the last dimension.
        norm: guide norm N, 0-dim float32 on the device.
        lr: a number, or a 0-dim float64 tensor.
        momentum, dampening, weight_decay, nesterov: as ``torch.optim.SGD`` has them.
        optimizer_step: 1 at the first step, which is not dampened; a number or a 0-dim int64 tensor.
        grid, straight_through: the quantizer; ``straight_through`` fixes the noise's distribution and eps.
        one_minus_beta: 1 - beta, in 0..1, a number or a 0-dim float64 tensor.
        seed: unsigned 64 bits, or a 0-dim int64 tensor with those bits.
        step: of training, below 2^32; a number or a 0-dim int64 tensor; by default 0.
        tensor_ids: one per alpha; by default 0, 1, 2, ...
        layouts: where each quantized tensor lies in its parameter, (offset, inner, stride); by default whole.
        epsilon_scale: factor on the eps that ``straight_through`` fixes; by default 1.
        masters: float32 master copies of bfloat16 or float16 latents, updated in their place; latents receive
            the rounded copy.
        quantized: one output per alpha that receives the next Q(latent), or codes if int8.
        counters: int64, shape (3,), on the device; counts directions whose c_i was not finite, steps whose norm
            was not finite, and alphas that were not finite or not > 0.
        transform: of the quantizer, for the tensors that have an alpha, as for :func:`perturb_quantize_`;
            latents and grads are those of the weight as it is, ``quantized`` is in the rotated basis.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    If every direction is lost the gradients serve as they are; if the norm is not finite the step is
    skipped, and only ``quantized`` and ``counters`` are written.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range; nothing is
            written.
        RuntimeError: the backend is unavailable on the device.
    """
    rule = UpdateRule(
        "sgd", weight_decay=weight_decay, momentum=momentum, dampening=dampening, nesterov=nesterov
    )
    states = {"momentum_buffers": momentum_buffers}
    losses = Losses(losses_plus, losses_minus, common.get("counters"))
    _tail(rule, states, latents, grads, alphas, losses, norm, (lr, optimizer_step), common)


def _tail(
    rule: UpdateRule, states: Mapping[str, TensorOrList | None], latents: TensorOrList, grads: TensorOrList,
    alphas: TensorOrList, losses: Losses, norm: Tensor,
    numbers: tuple[float | Tensor, int | Tensor], common: TailOptions,
) -> None:  # fmt: skip
    """What every rule's public function does; ``numbers`` are lr and optimizer_step."""
    for name in TailOptions.__required_keys__ - set(common):
        raise TypeError(f"{name} must be given")
    for name in set(common) - set(TailOptions.__annotations__):
        raise TypeError(f"{name} is not a keyword of the fused tail: {', '.join(TailOptions.__annotations__)}")
    grid, straight_through = common["grid"], common["straight_through"]
    arguments.quantizer(grid, straight_through)
    latents, alphas = arguments.tensors("latents", latents), arguments.tensors("alphas", alphas)
    ids, where = arguments.names(common.get("tensor_ids"), common.get("layouts"), latents[: len(alphas)])
    given = [arguments.optional(name, tensors) for name, tensors in states.items()]
    hyperparameters = rule.hyperparameters
    op(
        latents, arguments.optional("masters", common.get("masters")),
        arguments.optional("quantized", common.get("quantized")),
        arguments.optional("counters", losses.counters), *[*given, [], []][:2],
        arguments.tensors("grads", grads), arguments.tensor("losses_plus", losses.plus),
        arguments.tensor("losses_minus", losses.minus), alphas, arguments.tensor("norm", norm),
        arguments.seed(common["seed"]), arguments.step(common.get("step", 0)),
        arguments.one_minus_beta(common["one_minus_beta"]), ids, where,
        grid.qmin, grid.qmax, grid.offset, grid.r, straight_through.distribution,
        arguments.epsilon(straight_through, grid, common.get("epsilon_scale", 1.0)),
        arguments.lr(numbers[0]), arguments.optimizer_step(numbers[1]), rule.kind, list(hyperparameters),
        list(hyperparameters.values()), rule.nesterov, common.get("backend"),
        block_of(common.get("transform")),
    )  # fmt: skip


@functools.lru_cache(KEPT)  # a training loop gives the same one at every step
def rule_of(kind: str, names: tuple[str, ...], values: tuple[float, ...], nesterov: bool) -> UpdateRule:
    """The rule that a schema writes as flat arguments."""
    return UpdateRule(kind, **dict(zip(names, values, strict=True)), nesterov=nesterov)


def states_of(rule: UpdateRule, given: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    """The lists of state that the rule's kind has; a schema has two."""
    count = len(KINDS[rule.kind])
    if any(given[count:]):
        raise ValueError(f"{rule.kind} must have {count} lists of state, got {len(given)}")
    return given[:count]


def check_lists(
    latents: Sequence[Tensor], grads: Sequence[Tensor], quantized: Sequence[Tensor], alphas: Sequence[Tensor],
    update: Update, block: int, layouts: Sequence[Layout],
) -> None:  # fmt: skip
    checks.tensor_list("latents", latents, FLOATS)
    checks.tensor_list("grads", grads, FLOATS, latents)
    if update.masters:
        checks.tensor_list("masters", update.masters, (torch.float32,), latents)
        if latents and latents[0].dtype == torch.float32:
            raise TypeError("latents must be bfloat16 or float16 where masters are given, got float32")
    for i, (name, tensors) in enumerate(zip(KINDS[update.rule.kind], update.states, strict=True)):
        if i < update.rule.states:
            checks.tensor_list(name, tensors, (torch.float32,), latents)
        elif tensors:
            raise ValueError(f"{name} must be None without momentum, got {len(tensors)} tensors")
    if quantized:
        checks.tensor_list("quantized", quantized, OUTPUTS, latents[: len(alphas)])
    checks.alpha_list(alphas, latents[: len(alphas)])
    checks.transformed("latents", latents[: len(alphas)], alphas, block, layouts)


def check_numbers(
    draw: Draw, mix: Mix, losses: Losses, update: Update, latents: Sequence[Tensor], quantizing: int
) -> None:
    """``quantizing`` of the latents have an alpha, and noise."""
    if quantizing > len(latents):
        raise ValueError(f"alphas must have at most {len(latents)} tensors, got {quantizing}")
    checks.mix(mix, latents)
    checks.draw(draw, latents[:quantizing])
    checks.losses(losses, mix.norm.device, least=0)
    checks.update(update, mix.norm.device)


@list_op(
    "fogzo::estimate_update_",
    mutates_args=("latents", "masters", "quantized", "counters", "first", "second"),
    schema="(Tensor(a!)[] latents, Tensor(b!)[] masters, Tensor(c!)[] quantized, Tensor(d!)[] counters,"
    " Tensor(e!)[] first, Tensor(f!)[] second, Tensor[] grads, Tensor losses_plus, Tensor losses_minus,"
    f" Tensor[] alphas, {STATE}, {NAMES}, {GRID}, str distribution, float epsilon, Tensor lr,"
    " Tensor optimizer_step, str kind, str[] hyperparameters, float[] values, bool nesterov,"
    " str? backend, int block=0) -> ()",
)
def op(
    latents: Sequence[Tensor], masters: Sequence[Tensor], quantized: Sequence[Tensor],
    counters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor], grads: Sequence[Tensor],
    losses_plus: Tensor, losses_minus: Tensor, alphas: Sequence[Tensor], norm: Tensor, seed: Tensor,
    step: Tensor, one_minus_beta: Tensor, tensor_ids: Sequence[int], layouts: Sequence[int], qmin: int,
    qmax: int, offset: float, r: int, distribution: str, epsilon: float, lr: Tensor, optimizer_step: Tensor,
    kind: str, hyperparameters: Sequence[str], values: Sequence[float], nesterov: bool, backend: str | None,
    block: int = 0,
) -> None:  # fmt: skip
    draw = Draw(distribution, seed, step, tensor_ids, triples(layouts))
    mix = Mix(norm, one_minus_beta, epsilon)
    losses = Losses(losses_plus, losses_minus, counters_of(counters))
    rule = rule_of(kind, tuple(hyperparameters), tuple(values), nesterov)
    update = Update(rule, lr, optimizer_step, masters, states_of(rule, (first, second)))

    def check() -> None:
        check_lists(latents, grads, quantized, alphas, update, block, draw.layouts)
        memory.alphas(alphas, r)
        numels = memory.numels_of(latents)
        memory.shards(draw, numels[: len(alphas)])
        states = dict(zip(KINDS[kind], update.states, strict=True))
        memory.overlaps(
            {"latents": latents, "masters": masters, **states, "quantized": quantized, "counters": counters},
            {"grads": grads, "alphas": alphas, "norm": [norm], "losses_plus": [losses_plus],
             "losses_minus": [losses_minus]},
            numels,
        )  # fmt: skip

    check_numbers(draw, mix, losses, update, latents, len(alphas))
    memory.numbers(draw, mix, update)
    used = update._replace(states=update.states[: rule.states])
    run_checked(
        select(backend, norm.device), check, "estimate_update_", latents, quantized, grads, alphas, draw, mix,
        losses, grid_of(qmin, qmax, offset, r), used, block,
    )  # fmt: skip


@op.register_fake
def _(latents: Sequence[Tensor], masters: Sequence[Tensor], quantized: Sequence[Tensor],
      counters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor],
      grads: Sequence[Tensor], losses_plus: Tensor, losses_minus: Tensor,
      alphas: Sequence[Tensor], norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor,
      tensor_ids: Sequence[int], layouts: Sequence[int], qmin: int, qmax: int, offset: float,
      r: int, distribution: str, epsilon: float, lr: Tensor, optimizer_step: Tensor, kind: str,
      hyperparameters: Sequence[str], values: Sequence[float], nesterov: bool,
      backend: str | None, block: int = 0) -> None:  # fmt: skip
    rule = rule_of(kind, tuple(hyperparameters), tuple(values), nesterov)
    update = Update(rule, lr, optimizer_step, masters, states_of(rule, (first, second)))
    draw = Draw(distribution, seed, step, tensor_ids, triples(layouts))
    losses = Losses(losses_plus, losses_minus, counters_of(counters))
    check_numbers(draw, Mix(norm, one_minus_beta, epsilon), losses, update, latents, len(alphas))
    check_lists(latents, grads, quantized, alphas, update, block, draw.layouts)
