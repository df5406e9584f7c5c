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
    """Write the weights of two probes: Q(w + eps v) into ``plus`` and Q(w - eps v) into ``minus``.

    v = sqrt(beta) s delta g / N + sqrt(1 - beta) t u mixes the guide with noise that the op draws in place
    (arXiv 2510.23926, section 3; contract, sections 1 and 4). Here w is latent / delta, s a random sign, u the
    noise and t the tensor's noise factor. Latents and gradients are only read.

    Args:
        plus, minus: outputs of the latents' shapes, one dtype: float32, bfloat16, float16, or int8 for codes.
            One of the two may be None. They must not share memory with each other or with an input.
        latents: weights before quantization: contiguous, one dtype (float32, bfloat16 or float16), one device.
        grads: straight-through gradients of the latents' shapes; float32, bfloat16 or float16.
        alphas: scales, float32, one tensor per latent: of one element, one per row, or one per group of a row.
        norm: guide norm N from :func:`guide_norm`: float32, 0-dim, on the device. If it is 0 or not finite, v
            is noise alone.
        grid: the values that a quantized weight may take, such as ``Grid.uniform(2)``.
        straight_through: the straight-through estimator. It fixes the distribution of the noise and eps.
        one_minus_beta: share of the noise, 1 - beta, in 0..1: a number, or a 0-dim float64 tensor. A compiled
            graph compiles again for each new number.
        seed: seed of the noise: an int in 0..2^64 - 1, or a 0-dim int64 tensor with those bits.
        step: number of the training step, 0..2^32 - 1: an int or a 0-dim int64 tensor.
        direction: number of the direction, 0..2^16 - 1.
        tensor_ids: one number per tensor that names its noise, below 2^32 - 1, no two alike. None: 0, 1, 2, ...
        layouts: for shards, one ``(offset, inner, stride)`` per tensor: local element j is element ``offset +
            (j // inner) * stride + j % inner`` of the parameter. None: the tensors are whole.
        epsilon_scale: factor on the eps that ``straight_through`` fixes, finite, >= 0.
        noise_factors: of each tensor, from :func:`noise_factors`: float32, (tensors,), on the device. None: 1.
        transform: the Hadamard transform of the quantizer, or None. Latents and gradients belong to the
            weight before the transform; the outputs and the noise belong to the transformed weight. Its
            blocks divide the last dimension, and no block has two alphas.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> w, alpha, grid = torch.tensor([0.2, -0.7]), torch.tensor([0.5]), fk.Grid.uniform(2)
        >>> g, plus, minus = torch.tensor([0.0, 1.0]), torch.empty(2), torch.empty(2)
        >>> how = {"grid": grid, "straight_through": fk.StraightThrough("identity"), "seed": 0}
        >>> norm = fk.functional.guide_norm(g, alpha, grid=grid)
        >>> fk.functional.perturb_quantize_(plus, minus, w, g, alpha, norm, one_minus_beta=0.0, **how)
        >>> sorted([plus.tolist(), minus.tolist()])  # which is which depends on the sign of the direction
        [[0.0, -1.0], [0.0, -0.5]]
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
