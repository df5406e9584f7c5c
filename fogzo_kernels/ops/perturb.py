"""perturb_quantize_: the probes' weights, Q(w + eps v) and Q(w - eps v) (docs/contract.md, 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..spec.grid import FLOATS, OUTPUTS, Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.noise import MAX_DIRECTION, Layout, check_range
from ..spec.straight_through import StraightThrough
from . import arguments, checks
from .arguments import TensorOrList
from .listop import GRID, NAMES, STATE, ListOp


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
    noise_factors: Tensor | None = None,
    transform: Hadamard | None = None,
    backend: str | None = None,
) -> None:
    """Write Q(w + eps v) into ``plus`` and Q(w - eps v) into ``minus``; either may be None.

    v = sqrt(beta) s g_w / N + sqrt(1 - beta) u mixes the guide with noise drawn in place (paper
    section 3; contract sections 1 and 4). Latents and grads are only read.

    Args:
        plus, minus: outputs of the latents' shapes, of one dtype; int8 outputs receive codes. They may share
            memory neither with each other nor with an input.
        latents: contiguous, of one dtype (float32, bfloat16 or float16) and device.
        grads: straight-through gradients, of the latents' shapes.
        alphas: float32, one for each latent: one element, one per row, or one per group of the last dimension.
        norm: guide norm N, 0-dim float32 on the device. If it is 0 or not finite, v is noise alone.
        grid, straight_through: the quantizer; ``straight_through`` fixes the noise's distribution and eps.
        one_minus_beta: 1 - beta, in 0..1, a number or a 0-dim float64 tensor, because useful values reach
            1e-9. In a compiled graph give a tensor: each new number would compile again.
        seed: unsigned 64 bits, or a 0-dim int64 tensor with those bits.
        step: of training, below 2^32; a number or a 0-dim int64 tensor.
        direction: which of the step's directions, below 2^16.
        tensor_ids: by default 0, 1, 2, ...; no two tensors may draw the same noise.
        layouts: where each tensor lies in its parameter, ``(offset, inner, stride)``: local element j is
            element ``offset + (j // inner) * stride + j % inner``; by default whole.
        epsilon_scale: factor on the eps that ``straight_through`` fixes.
        noise_factors: a factor of the noise of each tensor, from :func:`noise_factors`: float32, shape
            (tensors,), finite and >= 0, on the device; by default 1 for each (contract section 1).
        transform: of the quantizer: latents and grads are those of the weight as it is, and the outputs are of
            the rotated one, in that basis, which is where the noise goes. Its blocks divide the last
            dimension, and each has one alpha.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend is unavailable on the device.
    """
    latents = arguments.tensors("latents", latents)
    noise = arguments.noisy(
        latents, norm, grid, straight_through, one_minus_beta, seed, step, tensor_ids, layouts, epsilon_scale,
        noise_factors,
    )  # fmt: skip
    direction = check_range("direction", direction, MAX_DIRECTION)
    lists = {"plus": plus, "minus": minus, "latents": latents, "grads": grads, "alphas": alphas}
    op(**lists, **noise, direction=direction, backend=backend, block=block_of(transform))


def check(plus: Sequence[Tensor], minus: Sequence[Tensor], latents: Sequence[Tensor]) -> None:
    if latents and not plus and not minus:
        raise ValueError("plus and minus must not both be None")
    if plus and minus and plus[0].dtype != minus[0].dtype:
        raise TypeError(
            f"minus must have the dtype of plus, {checks.named([plus[0].dtype])},"
            f" got {checks.named([minus[0].dtype])}"
        )


op = ListOp(
    "perturb_quantize_(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor[] latents, Tensor[] grads,"
    f" Tensor[] alphas, {STATE}, SymInt direction, {NAMES}, {GRID}, str distribution,"
    " float epsilon, str? backend, int block=0, Tensor? noise_factors=None) -> ()",
    {"latents": FLOATS, "grads": FLOATS, "plus": OUTPUTS, "minus": OUTPUTS},
    check,
)
