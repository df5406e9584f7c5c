"""Q(latent) of one tensor with its derivative: the op, the way around it, and transforms of ``torch.func``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, check_name, select
from ..spec.grid import FLOATS, OUTPUTS, Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.straight_through import StraightThrough
from . import checks, learned, straight_through, transforms
from .listop import GRID, ListOp, OfOne, is_plain

op_of_lists = ListOp(
    f"quantize_(Tensor(a!)[] out, Tensor[] latents, Tensor[] alphas, {GRID}, str? backend, int block=0) -> ()",
    {"latents": FLOATS, "out": OUTPUTS},
)
one = OfOne(
    op_of_lists,
    f"quantize(Tensor latent, Tensor alpha, {GRID}, str straight_through, str? backend,"
    " float alpha_factor=1.0, int block=0) -> Tensor",
    {"out": "latents"},
)


def gradients(
    grad: Tensor, latent: Tensor, alpha: Tensor, learns: bool, *options: Any
) -> tuple[Tensor, Tensor | None]:
    """Those of latent and alpha, in one pass."""
    *quantizer, backend, alpha_factor, block = options
    # a derivative of the derivative needs the op; without one it takes the dispatcher's time for nothing
    direct = not torch.is_grad_enabled() and is_plain(grad, latent, alpha)
    if learns:
        learn = learned.backward.direct if direct else learned.backward.op
        both: tuple[Tensor, Tensor] = learn(grad, latent, alpha, *quantizer, alpha_factor, backend, block)
        return both
    pass_straight = straight_through.backward.direct if direct else straight_through.backward.op
    return pass_straight(grad, latent, alpha, *quantizer, backend, block), None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    latent, alpha, *ctx.options = inputs
    ctx.save_for_backward(latent, alpha)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    learns = ctx.needs_input_grad[1]
    return *gradients(grad, *ctx.saved_tensors, learns, *ctx.options), *[None] * len(ctx.options)


one.op.register_autograd(_backward, setup_context=_setup)


@transforms.one_by_one
class Gradients(torch.autograd.Function):
    """The gradients that are needed, under a transform of ``torch.func``."""

    @staticmethod
    def forward(grad: Tensor, latent: Tensor, alpha: Tensor, *others: Any) -> tuple[Tensor, ...]:
        needed, options = others[:2], others[2:]
        both = gradients(grad.contiguous(), latent.contiguous(), alpha.contiguous(), needed[1], *options)
        return tuple(g for g, need in zip(both, needed, strict=True) if g is not None and need)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("a straight-through gradient must not be differentiated again: it has no derivative")


def _backward_in_transform(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    some = iter(Gradients.apply(grad, *ctx.saved_tensors, *needed, *ctx.options))
    return *(next(some) if need else None for need in needed), *[None] * len(ctx.options)


transformed = transforms.transformed(one.op, _setup, _backward_in_transform)


class Quantized(torch.autograd.Function):
    """Q(latent) that the caller already has, with the gradient of :func:`quantize`: no kernel, no memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(latent: Tensor, alpha: Tensor, quantized: Tensor, *options: Any) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        latent, alpha, _, *ctx.options = inputs
        ctx.save_for_backward(latent, alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, grads[0]), None


# ---- the way around the dispatcher


class Options:
    """What :func:`quantize` takes beside tensors, checked and converted once for any number of calls.

    Attributes:
        flat: as the op takes it.
    """

    def __init__(
        self,
        grid: Grid,
        straight_through: StraightThrough,
        transform: Hadamard | None,
        alpha_factor: float,
        backend: str | None,
    ) -> None:
        checks.instance("straight_through", straight_through, StraightThrough)
        straight_through.check_grid(grid)
        check_name(backend)
        checks.real("alpha_factor", alpha_factor)
        self.grid, self.straight_through, self.backend = grid, straight_through, backend
        # torch.compile(dynamic=True) may have made symbols of these numbers, which a backward cannot take
        self.factor, self.block = float(alpha_factor), int(block_of(transform))
        numbers = int(grid.qmin), int(grid.qmax), float(grid.offset), int(grid.r)
        self.flat = *numbers, straight_through.variant, backend, self.factor, self.block

    def direct(self, latent: Tensor, alpha: Tensor) -> tuple[Tensor, Backend | None]:
        """Q(latent) of plain tensors, and the backend that made it if that checks lists itself."""
        try:
            backend = select(self.backend, latent.device)
            if getattr(backend, "CHECKS_LISTS", False):
                out = torch.empty_like(latent)
                backend.quantize_([out], [latent], [alpha], self.grid, self.block)
                return out, backend
        except Exception:  # it is raised again below, in the words of the checks
            pass
        return one.direct(latent, alpha, *self.flat), None

    def gradients(self, backend: Backend, grad: Tensor, latent: Tensor, alpha: Tensor, learns: bool) -> Any:
        """Those of latent and alpha, from that backend."""
        out, grads, how = torch.empty_like(latent), [grad.contiguous()], (self.grid, self.straight_through)
        if not learns:
            backend.straight_through_backward_([out], grads, [latent], [alpha], *how, self.block)
            return out, None
        of_alpha = torch.empty_like(alpha)
        outs = [out], [of_alpha]
        backend.learned_backward_(*outs, grads, [latent], [alpha], *how, [self.factor], self.block)
        return out, of_alpha


def plain(latent: Tensor, alpha: Tensor, options: Options) -> Tensor:
    """Q(latent) where nothing looks at ops."""
    if not (torch.is_grad_enabled() and (latent.requires_grad or alpha.requires_grad)):
        return options.direct(latent, alpha)[0]
    values: Tensor = apply_plain(unwrap_if_dead(latent), unwrap_if_dead(alpha), options)
    return values


class PlainQuantized(torch.autograd.Function):
    """The op and its derivative as one node, without the dispatcher.

    A Function with a ``setup_context`` binds its arguments by their names, which takes longer than the kernel.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, alpha: Tensor, options: Options) -> Tensor:
        ctx.save_for_backward(latent, alpha)
        values, ctx.backend = options.direct(latent, alpha)
        ctx.options = options
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (latent, alpha), options = grads, ctx.saved_tensors, ctx.options
        learns = ctx.needs_input_grad[1]
        # a derivative of the derivative needs the op
        if ctx.backend is not None and not torch.is_grad_enabled() and is_plain(grad, latent, alpha):
            try:
                return *options.gradients(ctx.backend, grad, latent, alpha, learns), None
            except Exception:  # it is raised again below, in the words of the checks
                pass
        return *gradients(grad, latent, alpha, learns, *options.flat), None


#: Function.apply without the rest of what it does for transforms of ``torch.func``, a third of its time.
apply_plain = super(torch.autograd.Function, PlainQuantized).apply
unwrap_if_dead = torch._C._functorch.unwrap_if_dead
