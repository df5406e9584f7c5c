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
    """Replace each straight-through gradient by the FOGZO estimate G, in one pass, in place.

    G = (1/n) sum_i c_i v_i / delta with c_i = (L_i+ - L_i-) / (2 eps) (paper section 3; contract
    section 1); v_i is drawn again from its names, so all of them must be those of
    :func:`perturb_quantize_`, with direction i for loss i. Without losses, guided noise:
    G = (sqrt(beta) delta g + sqrt(1 - beta) N t u) / delta, by the noise of direction 0.

    Args:
        grads: straight-through gradients: contiguous, of one dtype (float32, bfloat16 or float16) and device;
            they receive G, rounded once to their dtype.
        losses_plus, losses_minus: float32, shape (n,), on the device; None for both: guided noise, no probes.
        alphas: float32, one for each gradient: one element, one per row, or one per group of a row.
        norm: guide norm N, 0-dim float32 on the device.
        grid, straight_through: the quantizer; ``straight_through`` fixes the noise's distribution and eps.
        one_minus_beta: 1 - beta, in 0..1, a number or a 0-dim float64 tensor.
        seed: unsigned 64 bits, or a 0-dim int64 tensor with those bits.
        step: of training, below 2^32; a number or a 0-dim int64 tensor.
        tensor_ids: by default 0, 1, 2, ...
        layouts: where each tensor lies in its parameter, ``(offset, inner, stride)``: local element j is
            element ``offset + (j // inner) * stride + j % inner``; by default whole.
        epsilon_scale: factor on the eps that ``straight_through`` fixes.
        noise_factors: a factor of the noise of each tensor, from :func:`noise_factors`: float32, shape
            (tensors,), finite and >= 0, on the device; by default 1 for each (contract section 1).
        counters: int64, shape (3,), on the device; counts directions whose c_i was not finite (they
            count as 0), steps whose norm was not finite, and alphas that were not finite or not
            > 0. If every direction or the norm is lost, the gradients stay as they were.
        transform: of the quantizer, as for :func:`perturb_quantize_`; the gradients are those of the weight as
            it is, and receive its G.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend is unavailable on the device.
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
