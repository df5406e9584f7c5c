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
    """Write Q(latent), or its codes where ``out`` is int8, of a list of tensors (contract, section 3).

    Q = delta * (code + offset), where code is the nearest in qmin..qmax, ties to even.

    Args:
        out: outputs of the latents' shapes, one dtype: float32, bfloat16, float16, or int8 for codes.
        latents: weights before quantization: contiguous, one dtype (float32, bfloat16 or float16), one device.
        alphas: scales, float32, one tensor per latent: of one element, one per row, or one per group of a row.
        grid: the values that a quantized weight may take, such as ``Grid.uniform(2)``.
        transform: the Hadamard transform of the quantizer, or None. The outputs belong to the transformed
            latents. Its blocks divide the last dimension, and no block has two alphas.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> w, alpha = torch.tensor([0.9, -0.2, -3.0]), torch.tensor([0.5])
        >>> codes = torch.empty(3, dtype=torch.int8)
        >>> fk.functional.quantize_(codes, w, alpha, grid=fk.Grid.uniform(2))
        >>> codes
        tensor([ 1,  0, -2], dtype=torch.int8)
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
    """Return Q(latent); differentiable in ``latent`` and ``alpha``.

    The gradient of the latent is the straight-through one, h'(latent) * dL/dQ (contract, section 1). An alpha
    that requires grad gets LSQ's gradient (arXiv 1902.08153), as from :func:`learned_backward_`.

    Args:
        latent: weight before quantization: contiguous; float32, bfloat16 or float16.
        alpha: scale, float32, contiguous: of one element, one per row, or one per group of the last dimension.
        grid: the values that a quantized weight may take, such as ``Grid.uniform(2)``.
        straight_through: the straight-through estimator; it must fit ``grid``.
        quantized: Q(latent), if you have it already, from :func:`estimate_adamw_` for example. The call then
            returns it, and computes only the gradient. None: the call computes it.
        alpha_factor: finite factor on alpha's gradient. LSQ's is 1 / sqrt(n qmax) for n elements that share an
            alpha.
        transform: a Hadamard transform before quantization, or None. The result is that of the transformed
            latent; the gradient is that of the latent, before the transform. Its blocks divide the last
            dimension, and no block has two alphas.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Returns:
        A tensor of the latent's shape and dtype.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> w = torch.tensor([0.9, -0.2, -3.0], requires_grad=True)
        >>> how = {"grid": fk.Grid.uniform(2), "straight_through": fk.StraightThrough("identity")}
        >>> q = fk.functional.quantize(w, torch.tensor([0.5]), **how)
        >>> q.sum().backward()
        >>> q.tolist(), w.grad  # the third weight is clipped, the first is within half a step of the end
        ([0.5, 0.0, -1.0], tensor([0., 1., 0.]))
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
    """Return the values delta * (code + offset) of int8 codes, as an op would write them.

    Args:
        codes: int8, contiguous, as :func:`quantize_` and :func:`perturb_quantize_` write them.
        alpha: scale, float32: of one element, one per row, or one per group of the last dimension.
        grid: the grid that the codes belong to.
        dtype: float32, bfloat16 or float16.

    Returns:
        A tensor of the codes' shape and of ``dtype``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range.

    Example:
        >>> codes, alpha = torch.tensor([1, 0, -2], dtype=torch.int8), torch.tensor([0.5])
        >>> fk.functional.dequantize(codes, alpha, grid=fk.Grid.uniform(2), dtype=torch.float32)
        tensor([ 0.5000,  0.0000, -1.0000])
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
