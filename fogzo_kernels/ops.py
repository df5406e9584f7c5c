"""Each op's schema, fake and dispatch, side by side. Imports torch and no backend by name.

Ops take a list of tensors, as ``torch._foreach_*`` does. Scalars that change each step (seed,
step, one_minus_beta, norm, losses) are tensors, so that a new value neither recompiles a graph
nor waits for the device. ``layouts`` holds offset, inner and stride of each tensor in a row.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import validation
from .backends import select
from .spec.call import Draw, Losses, Mix, Update
from .spec.grid import Grid
from .spec.noise import MAX_DIRECTION, MAX_TENSOR_ID, Layout, check_range
from .spec.straight_through import StraightThrough
from .spec.update import UpdateRule

GRID = "int qmin, int qmax, float offset, int r"
NAMES = "SymInt[] tensor_ids, SymInt[] layouts"
STATE = "Tensor norm, Tensor seed, Tensor step, Tensor one_minus_beta"


class ListOp:
    """A custom op over lists. Eager calls on plain tensors skip the dispatcher, which takes longer over a
    list of small tensors than the kernel does; whatever traces, wraps or profiles gets the op.
    """

    def __init__(self, name: str, mutates_args: tuple[str, ...], schema: str, run: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(name, run, mutates_args=mutates_args, schema=schema)
        self.run = run
        parameters = list(inspect.signature(run).parameters)
        self.mutated = [parameters.index(argument) for argument in mutates_args]
        self.register_fake = self.op.register_fake

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or watched() or not plain(args):
            return self.op(*map(detached, args))
        with torch.no_grad():
            found = self.run(*args)
        for i in self.mutated:
            torch.autograd.graph.increment_version(args[i])
        return found


def list_op(name: str, *, mutates_args: tuple[str, ...], schema: str) -> Callable[[Callable[..., Any]], ListOp]:
    return lambda run: ListOp(name, mutates_args, schema, run)


def detached(argument: Any) -> Any:
    """Autograd has no formula for these ops, and none of their results needs one."""
    if isinstance(argument, list):
        return [t.detach() if isinstance(t, Tensor) and t.requires_grad else t for t in argument]
    return argument


def watched() -> bool:
    """Whether some mode, transform or profiler must see the ops."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}


def plain(args: Sequence[Any]) -> bool:
    """No tensor is of a subclass, which may have its own idea of an op."""
    kinds: set[type] = set()
    for argument in args:
        if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
            kinds.update(map(type, argument))
        else:
            kinds.add(type(argument))
    return {kind for kind in kinds if issubclass(kind, Tensor)} <= PLAIN


def triples(layouts: Sequence[int]) -> Sequence[Layout]:
    return cached_triples(tuple(layouts))


@functools.lru_cache(validation.KEPT)
def cached_triples(layouts: tuple[int, ...]) -> tuple[Layout, ...]:
    return tuple(zip(layouts[::3], layouts[1::3], layouts[2::3], strict=True))


# ---- noise


@torch.library.custom_op(
    "fogzo::noise",
    mutates_args=(),
    schema="(SymInt numel, str distribution, Tensor seed, Tensor step, SymInt direction,"
    " SymInt tensor_id, SymInt[] layout, Device device, str? backend) -> Tensor",
)
def noise(
    numel: int, distribution: str, seed: Tensor, step: Tensor, direction: int, tensor_id: int,
    layout: Sequence[int], device: torch.device, backend: str | None,
) -> Tensor:  # fmt: skip
    validation.seed_and_step(seed, step, device)
    validation.values([], 1, step)
    check_range("direction", direction, MAX_DIRECTION)
    check_range("tensor_id", tensor_id, MAX_TENSOR_ID)
    where = triples(layout)[0]
    validation.layout(where, numel)
    return select(backend, device).noise(
        numel, Draw(distribution, seed, step, [tensor_id], [where]), direction, device
    )


@noise.register_fake
def _(numel: int, distribution: str, seed: Tensor, step: Tensor, direction: int, tensor_id: int,
      layout: Sequence[int], device: torch.device, backend: str | None) -> Tensor:  # fmt: skip
    return torch.empty(numel, device=device)


# ---- guide norm


@list_op(
    "fogzo::guide_sumsq",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor[] alphas, int r, bool root, str? backend) -> Tensor",
)
def guide_sumsq(
    grads: Sequence[Tensor], alphas: Sequence[Tensor], r: int, root: bool, backend: str | None
) -> Tensor:
    device = validation.guide_arguments(grads, alphas)
    validation.values(alphas, r)
    if not grads:  # on no device
        return torch.zeros((), dtype=torch.float32 if root else torch.float64)
    return select(backend, device).guide_sumsq(grads, alphas, r, root)


@guide_sumsq.register_fake
def _(grads: Sequence[Tensor], alphas: Sequence[Tensor], r: int, root: bool, backend: str | None) -> Tensor:
    device = validation.guide_arguments(grads, alphas)
    return torch.empty((), dtype=torch.float32 if root else torch.float64, device=device)


# ---- perturb and quantize


@list_op(
    "fogzo::perturb_quantize_",
    mutates_args=("plus", "minus"),
    schema="(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor[] latents, Tensor[] grads,"
    f" Tensor[] alphas, {STATE}, SymInt direction, {NAMES}, {GRID}, str distribution,"
    " float epsilon, str? backend) -> ()",
)
def perturb_quantize_(
    plus: Sequence[Tensor], minus: Sequence[Tensor], latents: Sequence[Tensor],
    grads: Sequence[Tensor], alphas: Sequence[Tensor], norm: Tensor, seed: Tensor, step: Tensor,
    one_minus_beta: Tensor, direction: int, tensor_ids: Sequence[int], layouts: Sequence[int],
    qmin: int, qmax: int, offset: float, r: int, distribution: str, epsilon: float,
    backend: str | None,
) -> None:  # fmt: skip
    device = validation.perturb_arguments(
        plus, minus, latents, grads, alphas, norm, seed, step, one_minus_beta, tensor_ids, layouts
    )
    where = triples(layouts)
    check_range("direction", direction, MAX_DIRECTION)
    validation.values(alphas, r, step, one_minus_beta)
    numels = validation.numels_of(latents)
    validation.shards(tensor_ids, where, numels)
    validation.memory(
        {"plus": plus, "minus": minus},
        {"latents": latents, "grads": grads, "alphas": alphas, "norm": [norm]},
        numels,
    )
    select(backend, device).perturb_quantize_(
        plus, minus, latents, grads, alphas, Draw(distribution, seed, step, tensor_ids, where),
        Mix(norm, one_minus_beta, epsilon), direction, Grid(qmin, qmax, offset, r),
    )  # fmt: skip


@perturb_quantize_.register_fake
def _(plus: Sequence[Tensor], minus: Sequence[Tensor], latents: Sequence[Tensor],
      grads: Sequence[Tensor], alphas: Sequence[Tensor], norm: Tensor, seed: Tensor, step: Tensor,
      one_minus_beta: Tensor, direction: int, tensor_ids: Sequence[int], layouts: Sequence[int],
      *_: Any) -> None:  # fmt: skip
    validation.perturb_arguments(
        plus, minus, latents, grads, alphas, norm, seed, step, one_minus_beta, tensor_ids, layouts
    )


# ---- estimate


@list_op(
    "fogzo::estimate_gradient_",
    mutates_args=("grads", "counters"),
    schema="(Tensor(a!)[] grads, Tensor(b!)[] counters, Tensor losses_plus, Tensor losses_minus,"
    f" Tensor[] alphas, {STATE}, {NAMES}, int r, str distribution, float epsilon,"
    " str? backend) -> ()",
)
def estimate_gradient_(
    grads: Sequence[Tensor], counters: Sequence[Tensor], losses_plus: Tensor,
    losses_minus: Tensor, alphas: Sequence[Tensor], norm: Tensor, seed: Tensor, step: Tensor,
    one_minus_beta: Tensor, tensor_ids: Sequence[int], layouts: Sequence[int], r: int,
    distribution: str, epsilon: float, backend: str | None,
) -> None:  # fmt: skip
    device = validation.estimate_arguments(
        grads, counters, losses_plus, losses_minus, alphas, norm, seed, step, one_minus_beta,
        tensor_ids, layouts,
    )  # fmt: skip
    where = triples(layouts)
    validation.values(alphas, r, step, one_minus_beta)
    numels = validation.numels_of(grads)
    validation.shards(tensor_ids, where, numels)
    losses = {"losses_plus": [losses_plus], "losses_minus": [losses_minus]}
    written, read = {"grads": grads, "counters": counters}, {"alphas": alphas, "norm": [norm], **losses}
    validation.memory(written, read, numels)
    select(backend, device).estimate_gradient_(
        grads, alphas, Draw(distribution, seed, step, tensor_ids, where), Mix(norm, one_minus_beta, epsilon),
        Losses(losses_plus, losses_minus, counters[0] if counters else None), r,
    )  # fmt: skip


@estimate_gradient_.register_fake
def _(grads: Sequence[Tensor], counters: Sequence[Tensor], losses_plus: Tensor,
      losses_minus: Tensor, alphas: Sequence[Tensor], norm: Tensor, seed: Tensor, step: Tensor,
      one_minus_beta: Tensor, tensor_ids: Sequence[int], layouts: Sequence[int],
      *_: Any) -> None:  # fmt: skip
    validation.estimate_arguments(
        grads, counters, losses_plus, losses_minus, alphas, norm, seed, step, one_minus_beta,
        tensor_ids, layouts,
    )  # fmt: skip


# ---- estimate, update and quantize: the fused tail

TAIL = (
    "Tensor(a!)[] latents, Tensor(b!)[] masters, Tensor(c!)[] quantized, Tensor(d!)[] counters,"
    " Tensor(e!)[] first, Tensor(f!)[] second, Tensor[] grads, Tensor losses_plus, Tensor losses_minus,"
    f" Tensor[] alphas, {STATE}, {NAMES}, {GRID}, str distribution, float epsilon, Tensor lr,"
    " Tensor optimizer_step, str kind, float[] hyperparameters, bool nesterov, str? backend"
)
STATES = {"adamw": ("exp_avgs", "exp_avg_sqs"), "sgd": ("momentum_buffers", "second")}


def hyperparameters_of(rule: UpdateRule) -> list[float]:
    """In the order of UpdateRule's fields, as :func:`rule_of` takes them."""
    return [rule.weight_decay, rule.beta1, rule.beta2, rule.eps, rule.momentum, rule.dampening]


def rule_of(kind: str, hyperparameters: Sequence[float], nesterov: bool) -> UpdateRule:
    weight_decay, beta1, beta2, eps, momentum, dampening = hyperparameters
    return UpdateRule(kind, weight_decay, beta1, beta2, eps, momentum, dampening, nesterov)


@list_op(
    "fogzo::estimate_update_",
    mutates_args=("latents", "masters", "quantized", "counters", "first", "second"),
    schema=f"({TAIL}) -> ()",
)
def estimate_update_(
    latents: Sequence[Tensor], masters: Sequence[Tensor], quantized: Sequence[Tensor],
    counters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor],
    grads: Sequence[Tensor], losses_plus: Tensor, losses_minus: Tensor, alphas: Sequence[Tensor],
    norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor, tensor_ids: Sequence[int],
    layouts: Sequence[int], qmin: int, qmax: int, offset: float, r: int, distribution: str,
    epsilon: float, lr: Tensor, optimizer_step: Tensor, kind: str,
    hyperparameters: Sequence[float], nesterov: bool, backend: str | None,
) -> None:  # fmt: skip
    rule = rule_of(kind, hyperparameters, nesterov)
    states = dict(zip(STATES[kind], (first, second), strict=True))
    device = validation.update_arguments(
        latents, masters, states, quantized, counters, grads, losses_plus, losses_minus, alphas,
        norm, seed, step, one_minus_beta, tensor_ids, layouts, rule, lr, optimizer_step,
    )  # fmt: skip
    where = triples(layouts)
    validation.values(alphas, r, step, one_minus_beta)
    validation.update_values(lr, optimizer_step)
    numels = validation.numels_of(latents)
    validation.shards(tensor_ids, where, numels[: len(alphas)])
    validation.memory(
        {"latents": latents, "masters": masters, **states, "quantized": quantized, "counters": counters},
        {"grads": grads, "alphas": alphas, "norm": [norm], "losses_plus": [losses_plus],
         "losses_minus": [losses_minus]},
        numels,
    )  # fmt: skip
    select(backend, device).estimate_update_(
        latents, quantized, grads, alphas, Draw(distribution, seed, step, tensor_ids, where),
        Mix(norm, one_minus_beta, epsilon),
        Losses(losses_plus, losses_minus, counters[0] if counters else None), Grid(qmin, qmax, offset, r),
        Update(rule, lr, optimizer_step, masters, [first, second][: rule.states]),
    )  # fmt: skip


@estimate_update_.register_fake
def _(latents: Sequence[Tensor], masters: Sequence[Tensor], quantized: Sequence[Tensor],
      counters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor],
      grads: Sequence[Tensor], losses_plus: Tensor, losses_minus: Tensor,
      alphas: Sequence[Tensor], norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor,
      tensor_ids: Sequence[int], layouts: Sequence[int], qmin: int, qmax: int, offset: float,
      r: int, distribution: str, epsilon: float, lr: Tensor, optimizer_step: Tensor, kind: str,
      hyperparameters: Sequence[float], nesterov: bool, backend: str | None) -> None:  # fmt: skip
    states = dict(zip(STATES[kind], (first, second), strict=True))
    validation.update_arguments(
        latents, masters, states, quantized, counters, grads, losses_plus, losses_minus, alphas,
        norm, seed, step, one_minus_beta, tensor_ids, layouts,
        rule_of(kind, hyperparameters, nesterov), lr, optimizer_step,
    )  # fmt: skip


# ---- quantize and its straight-through derivative


@list_op(
    "fogzo::quantize_",
    mutates_args=("out",),
    schema=f"(Tensor(a!)[] out, Tensor[] latents, Tensor[] alphas, {GRID}, str? backend) -> ()",
)
def quantize_(
    out: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor], qmin: int,
    qmax: int, offset: float, r: int, backend: str | None,
) -> None:  # fmt: skip
    device = validation.quantize_arguments(out, latents, alphas)
    validation.values(alphas, r)
    validation.memory({"out": out}, {"latents": latents, "alphas": alphas}, validation.numels_of(latents))
    if latents:
        select(backend, device).quantize_(out, latents, alphas, Grid(qmin, qmax, offset, r))


@quantize_.register_fake
def _(out: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor],
      *_: Any) -> None:  # fmt: skip
    validation.quantize_arguments(out, latents, alphas)


@list_op(
    "fogzo::straight_through_backward_",
    mutates_args=("grads",),
    schema=f"(Tensor(a!)[] grads, Tensor[] latents, Tensor[] alphas, {GRID}, str kind, bool clip,"
    " str? backend) -> ()",
)
def straight_through_backward_(
    grads: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor], qmin: int,
    qmax: int, offset: float, r: int, kind: str, clip: bool, backend: str | None,
) -> None:  # fmt: skip
    device = validation.straight_through_arguments(grads, latents, alphas)
    validation.values(alphas, r)
    validation.memory({"grads": grads}, {"latents": latents, "alphas": alphas}, validation.numels_of(latents))
    if latents:
        select(backend, device).straight_through_backward_(
            grads, grads, latents, alphas, Grid(qmin, qmax, offset, r), StraightThrough(kind, clip)
        )


@straight_through_backward_.register_fake
def _(grads: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor],
      *_: Any) -> None:  # fmt: skip
    validation.straight_through_arguments(grads, latents, alphas)


@torch.library.custom_op(
    "fogzo::quantize",
    mutates_args=(),
    schema=f"(Tensor latent, Tensor alpha, {GRID}, str kind, bool clip, str? backend) -> Tensor",
)
def quantize(
    latent: Tensor, alpha: Tensor, qmin: int, qmax: int, offset: float, r: int, kind: str,
    clip: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    device = validation.quantize_arguments(None, [latent], [alpha])
    validation.values([alpha], r)
    out = torch.empty_like(latent)
    select(backend, device).quantize_([out], [latent], [alpha], Grid(qmin, qmax, offset, r))
    return out


@quantize.register_fake
def _(latent: Tensor, alpha: Tensor, *_: Any) -> Tensor:
    validation.quantize_arguments(None, [latent], [alpha])
    return torch.empty_like(latent)


@torch.library.custom_op(
    "fogzo::straight_through_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor latent, Tensor alpha, {GRID}, str kind, bool clip, str? backend) -> Tensor",
)
def straight_through_backward(
    grad: Tensor, latent: Tensor, alpha: Tensor, qmin: int, qmax: int, offset: float, r: int,
    kind: str, clip: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    grad = grad.contiguous()
    device = validation.straight_through_arguments([grad], [latent], [alpha])
    validation.values([alpha], r)
    out = torch.empty_like(latent)
    select(backend, device).straight_through_backward_(
        [out], [grad], [latent], [alpha], Grid(qmin, qmax, offset, r), StraightThrough(kind, clip)
    )
    return out


@straight_through_backward.register_fake
def _(grad: Tensor, latent: Tensor, alpha: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(latent)


def _setup_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    latent, alpha, *ctx.options = inputs
    ctx.save_for_backward(latent, alpha)


def _quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    latent, alpha = ctx.saved_tensors
    g = straight_through_backward(grad, latent, alpha, *ctx.options)
    return (g, *[None] * (1 + len(ctx.options)))


quantize.register_autograd(_quantize_backward, setup_context=_setup_quantize)


class Quantized(torch.autograd.Function):
    """Q(latent) that the caller already has, with the gradient of :func:`quantize`: no kernel, no memory."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, alpha: Tensor, quantized: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(latent, alpha)
        ctx.options = options
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        latent, alpha = ctx.saved_tensors
        g = straight_through_backward(grads[0], latent, alpha, *ctx.options)
        return (g, *[None] * (2 + len(ctx.options)))
