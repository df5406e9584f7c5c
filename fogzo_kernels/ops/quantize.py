"""quantize, quantize_, dequantize: Q(w), its codes, the values of codes (docs/contract.md, 3 and 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import check_name
from ..spec.grid import FLOATS, OUTPUTS, Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.straight_through import StraightThrough
from . import arguments, checks, learned, memory, straight_through, transforms
from .arguments import TensorOrList
from .listop import GRID, ListOp, OfOne, is_plain

# ---- a list, into given memory


def quantize_(
    out: TensorOrList,
    latents: TensorOrList,
    alphas: TensorOrList,
    *,
    grid: Grid,
    transform: Hadamard | None = None,
    backend: str | None = None,
) -> None:
    """Write Q(latent), or its codes where ``out`` is int8, for a list of tensors (contract section 3).

    Args:
        out: of the latents' shapes, of one dtype: float32, bfloat16, float16, or int8 for codes.
        latents: contiguous, of one dtype (float32, bfloat16 or float16) and device.
        alphas: float32, one for each latent: one element, one per row, or one per group of the last dimension.
        transform: H of each block, before it is quantized: what is written is of the rotated latent, in that
            basis. Its blocks divide the last dimension, and each has one alpha.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend is unavailable on the device.
    """
    checks.instance("grid", grid, Grid)
    lists = {"out": out, "latents": latents, "alphas": alphas}
    op_of_lists(**lists, **arguments.flat_grid(grid), backend=backend, block=block_of(transform))


op_of_lists = ListOp(
    f"quantize_(Tensor(a!)[] out, Tensor[] latents, Tensor[] alphas, {GRID}, str? backend, int block=0) -> ()",
    {"latents": FLOATS, "out": OUTPUTS},
)


# ---- one tensor, differentiable


def quantize(
    latent: Tensor,
    alpha: Tensor,
    *,
    grid: Grid,
    straight_through: StraightThrough,
    quantized: Tensor | None = None,
    alpha_factor: float = 1.0,
    transform: Hadamard | None = None,
    backend: str | None = None,
) -> Tensor:
    """Q(latent), of the latent's shape and dtype; differentiable in ``latent`` and ``alpha``.

    The gradient is the straight-through one, g = h'(latent) * dL/dQ (contract section 1). An alpha that
    requires one gets LSQ's (Esser et al., ICLR 2020, arXiv 1902.08153), as from :func:`learned_backward_`.

    Args:
        latent: contiguous, float32, bfloat16 or float16.
        alpha: float32, contiguous: one element, one per row, or one per group of the last dimension.
        quantized: Q(latent), where it is known already (from :func:`estimate_adamw_`, say). It is
            returned as it is; only the gradient is computed.
        alpha_factor: finite; what alpha's gradient is multiplied by, LSQ's
            1 / sqrt(elements that share an alpha * qmax), say.
        transform: H of each block, before it is quantized: the result is of the rotated latent, in that basis,
            and the gradient comes back to the latent's, H(h' * dL/dQ). Blocks divide the last dimension, and
            each has one alpha.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.
        RuntimeError: the backend is unavailable on the device.
    """
    checks.instance("straight_through", straight_through, StraightThrough)
    straight_through.check_grid(grid)
    checks.instance("latent", latent, Tensor)
    checks.instance("alpha", alpha, Tensor)
    check_name(backend)
    checks.real("alpha_factor", alpha_factor)
    # torch.compile(dynamic=True) may have made symbols of these numbers, which a backward cannot take
    numbers = int(grid.qmin), int(grid.qmax), float(grid.offset), int(grid.r)
    options = *numbers, straight_through.variant, backend, float(alpha_factor), int(block_of(transform))
    if quantized is None:
        if is_plain(latent, alpha):
            return _plain(latent, alpha, options)
        values: Tensor = (transformed if transforms.active() else one.op)(latent, alpha, *options)
        return values
    checks.tensor_list("latents", [latent], FLOATS)
    checks.alphas([alpha], "latents", [latent], options[-1])
    checks.tensor_list("quantized", [quantized], FLOATS, [latent])
    values = Quantized.apply(latent, alpha, quantized, *options)
    return values


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


def _plain(latent: Tensor, alpha: Tensor, options: tuple[Any, ...]) -> Tensor:
    """Q(latent) where nothing looks at ops."""
    if torch.is_grad_enabled() and (latent.requires_grad or alpha.requires_grad):
        values: Tensor = PlainQuantized.apply(latent, alpha, options)
    else:
        values = one.direct(latent, alpha, *options)
    return values


class PlainQuantized(torch.autograd.Function):
    """The op and its derivative as one node, without the dispatcher.

    A Function with a ``setup_context`` binds its arguments by their names, which takes longer than the kernel.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, alpha: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(latent, alpha)
        ctx.options = options
        values: Tensor = one.direct(latent, alpha, *options)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        learns = ctx.needs_input_grad[1]
        return *gradients(grads[0], *ctx.saved_tensors, learns, *ctx.options), None


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


# ---- back


def dequantize(codes: Tensor, alpha: Tensor, *, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The values delta * (code + offset) of int8 codes: the bits that a ``dtype`` output gets.

    Args:
        codes: int8, contiguous, as :func:`quantize_` and :func:`perturb_quantize_` write them.
        alpha: float32: one element, one per row, or one per group of the last dimension.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``dtype`` tensor of the codes' shape.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.
    """
    checks.instance("codes", codes, Tensor)
    checks.instance("alpha", alpha, Tensor)
    checks.instance("grid", grid, Grid)
    if codes.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {checks.named([codes.dtype])}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {checks.named(FLOATS)}, got {checks.named([dtype])}")
    checks.alphas([alpha], "codes", [codes], 0)
    memory.alphas([alpha], grid.r)
    length = codes.numel() // max(alpha.numel(), 1)
    delta = (alpha.flatten() * grid.r).unsqueeze(1)
    values = delta * (codes.reshape(alpha.numel(), length).float() + grid.offset)
    return values.to(dtype).view(codes.shape)
