"""estimate_gradient_: the FOGZO estimate G in place of the straight-through gradient (contract, 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..spec.grid import FLOATS, Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.noise import Layout
from ..spec.straight_through import StraightThrough
from . import arguments
from .arguments import TensorOrList
from .listop import NAMES, STATE, ListOp


def estimate_gradient_(
    grads: TensorOrList,
    losses_plus: Tensor | None,
    losses_minus: Tensor | None,
    alphas: TensorOrList,
    norm: Tensor,
    *,
    grid: Grid,
    straight_through: StraightThrough,
    one_minus_beta: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor = 0,
    tensor_ids: Sequence[int] | None = None,
    layouts: Sequence[Layout] | None = None,
    epsilon_scale: float = 1.0,
    noise_factors: Tensor | None = None,
    counters: Tensor | None = None,
    transform: Hadamard | None = None,
    backend: str | None = None,
) -> None:
    """Replace each straight-through gradient by the FOGZO estimate G, in place.

    With losses, G = (1/n) sum_i c_i v_i / delta and c_i = (L_i+ - L_i-) / (2 eps) (arXiv 2510.23926, section 3;
    contract, section 1). The op draws each v_i again, so pass the same noise arguments as to
    :func:`perturb_quantize_`; loss i belongs to direction i. Without losses it adds guided noise of direction
    0: G = (sqrt(beta) delta g + sqrt(1 - beta) N t u) / delta, where t is the tensor's noise factor.

    The gradients stay as they were if the norm, or the slope of every direction, is not finite.

    Args:
        grads: straight-through gradients, which receive G: contiguous, one dtype (float32, bfloat16 or
            float16), one device.
        losses_plus, losses_minus: losses of the probes at +eps and -eps: float32, shape (n,), on the device.
            None for both: guided noise, without probes.
        alphas: scales, float32, one per gradient: of one element, one per row, or one per group of a row.
        norm: guide norm N from :func:`guide_norm`: float32, 0-dim, on the device.
        grid: the values that a quantized weight may take, such as ``Grid.uniform(2)``.
        straight_through: the straight-through estimator. It fixes the distribution of the noise and eps.
        one_minus_beta: share of the noise, 1 - beta, in 0..1: a number, or a 0-dim float64 tensor. A compiled
            graph compiles again for each new number.
        seed: seed of the noise: an int in 0..2^64 - 1, or a 0-dim int64 tensor with those bits.
        step: number of the training step, 0..2^32 - 1: an int or a 0-dim int64 tensor.
        tensor_ids: one number per tensor that names its noise, below 2^32 - 1, no two alike. None: 0, 1, 2, ...
        layouts: for shards, one ``(offset, inner, stride)`` per tensor: local element j is element ``offset +
            (j // inner) * stride + j % inner`` of the parameter. None: the tensors are whole.
        epsilon_scale: factor on the eps that ``straight_through`` fixes, finite, >= 0.
        noise_factors: of each tensor, from :func:`noise_factors`: float32, (tensors,), on the device. None: 1.
        counters: int64, shape (3,), on the device. The op adds the number of directions whose slope c_i is not
            finite, of steps whose norm is not finite, and of alphas that are not finite or not > 0. A lost
            direction counts as a slope of 0. None: nothing is counted.
        transform: the Hadamard transform of the quantizer, or None. Gradients and estimates belong to the
            weight before the transform.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> g, alpha, grid = torch.tensor([3.0, -4.0]), torch.tensor([0.5]), fk.Grid.uniform(2)
        >>> how = {"grid": grid, "straight_through": fk.StraightThrough("identity")}
        >>> norm = fk.functional.guide_norm(g, alpha, grid=grid)
        >>> fk.functional.estimate_gradient_(g, None, None, alpha, norm, one_minus_beta=0.0, seed=0, **how)
        >>> g  # without noise the guide is the gradient
        tensor([ 3., -4.])
    """
    grads = arguments.tensors("grads", grads)
    noise = arguments.noisy(
        grads, norm, grid, straight_through, one_minus_beta, seed, step, tensor_ids, layouts, epsilon_scale,
        noise_factors,
    )  # fmt: skip
    lists = {"grads": grads, "counters": counters, "alphas": alphas}
    losses = arguments.losses(losses_plus, losses_minus, norm)
    op(**lists, **losses, **noise, backend=backend, block=block_of(transform))


op = ListOp(
    "estimate_gradient_(Tensor(a!)[] grads, Tensor(b!)[] counters, Tensor losses_plus, Tensor losses_minus,"
    f" Tensor[] alphas, {STATE}, {NAMES}, int r, str distribution, float epsilon,"
    " str? backend, int block=0, Tensor? noise_factors=None, bool guided=False) -> ()",
    {"grads": FLOATS},
)
