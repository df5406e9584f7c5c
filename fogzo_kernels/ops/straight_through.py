"""straight_through_backward_: dL/dQ -> the straight-through gradient g (docs/contract.md, sections 1 and 4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..spec.grid import FLOATS, Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.straight_through import FLAT, NO_SECOND, StraightThrough
from . import arguments
from .arguments import TensorOrList
from .listop import GRID, ListOp, OfOne


def straight_through_backward_(
    grads: TensorOrList,
    latents: TensorOrList,
    alphas: TensorOrList,
    *,
    grid: Grid,
    straight_through: StraightThrough,
    transform: Hadamard | None = None,
    backend: str | None = None,
) -> None:
    """Multiply gradients with respect to Q by h'(latent), in place (contract, section 1).

    :class:`fogzo_kernels.StraightThrough` says what h' is.

    Args:
        grads: dL/dQ, which receive dL/dlatent: of the latents' shapes, contiguous, float32, bfloat16 or
            float16.
        latents: weights before quantization: contiguous, one dtype (float32, bfloat16 or float16), one device.
        alphas: scales, float32, one tensor per latent: of one element, one per row, or one per group of the
            last dimension.
        grid: the values that a quantized weight may take, such as ``Grid.uniform(2)``.
        straight_through: the straight-through estimator; it must fit ``grid``.
        transform: the Hadamard transform of the quantizer, or None. Then dL/dQ belongs to the transformed
            weight, and ``grads`` receive the gradient of the latent, before the transform.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range. Nothing is written
            then.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> w, g, alpha = torch.tensor([0.3, -3.0]), torch.tensor([2.0, 2.0]), torch.tensor([0.5])
        >>> how = {"grid": fk.Grid.uniform(2), "straight_through": fk.StraightThrough("identity")}
        >>> fk.functional.straight_through_backward_(g, w, alpha, **how)
        >>> g  # the second weight is clipped
        tensor([2., 0.])
    """
    lists = {"grads": grads, "latents": latents, "alphas": alphas}
    quantizer = arguments.quantizer(grid, straight_through)
    op(**lists, **quantizer, backend=backend, block=block_of(transform))


op = ListOp(
    f"straight_through_backward_(Tensor(a!)[] grads, Tensor[] latents, Tensor[] alphas, {GRID},"
    " str straight_through, str? backend, int block=0) -> ()",
    {"latents": FLOATS, "grads": FLOATS},
)
#: The backward of quantize, on one tensor and not in place.
backward = OfOne(
    op,
    f"straight_through_backward(Tensor grad, Tensor latent, Tensor alpha, {GRID}, str straight_through,"
    " str? backend, int block=0) -> Tensor",
    {"out": "latents"},
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, latent, alpha, *ctx.options = inputs
    ctx.save_for_backward(latent, alpha)


def _second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of a loss with a derivative in it: h' times the gradient again, as this is linear in ``grad``."""
    variant, _, block = ctx.options[-3:]
    if block or variant not in FLAT:
        raise RuntimeError(NO_SECOND.format(f"a transformed {variant}" if block else variant))
    latent, alpha = ctx.saved_tensors
    return backward.op(grad, latent, alpha, *ctx.options), *[None] * (2 + len(ctx.options))


backward.op.register_autograd(_second, setup_context=_setup)
