"""quantize, quantize_, dequantize: Q(w), its codes, the values of codes (docs/contract.md, 3 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.checks import hinted
from ..spec.grid import FLOATS, Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.straight_through import StraightThrough
from . import arguments, checks, memory, transforms
from .arguments import TensorOrList
from .differentiable import Options, Quantized, one, op_of_lists, plain, transformed
from .listop import is_plain

# ---- a list, into given memory


@hinted("quantize_ is an op over lists of tensors: did you mean quantize_model(model, quantizer)?")
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
    how = Options(grid, straight_through, transform, alpha_factor, backend)
    checks.instance("latent", latent, Tensor)
    checks.instance("alpha", alpha, Tensor)
    if quantized is None and is_plain(latent, alpha):
        return plain(latent, alpha, how)
    options = how.flat
    if quantized is None:
        values: Tensor = (transformed if transforms.active() else one.op)(latent, alpha, *options)
        return values
    checks.tensor_list("latents", [latent], FLOATS)
    checks.alphas([alpha], "latents", [latent], options[-1])
    checks.tensor_list("quantized", [quantized], FLOATS, [latent])
    values = Quantized.apply(latent, alpha, quantized, *options)
    return values


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
