"""perturb_quantize_: the probes' weights, Q(w + eps v) and Q(w - eps v) (docs/contract.md, 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backends import select
from ..spec.call import Draw, Mix
from ..spec.dtypes import FLOATS, OUTPUTS
from ..spec.grid import Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.noise import MAX_DIRECTION, Layout, check_range
from ..spec.straight_through import StraightThrough
from . import arguments, checks, memory
from .arguments import TensorOrList
from .listop import GRID, NAMES, STATE, grid_of, list_op, run_checked, triples


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
        transform: of the quantizer: latents and grads are those of the weight as it is, and the outputs are of
            the rotated one, in that basis, which is where the noise goes. Its blocks divide the last
            dimension, and each has one alpha.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range; nothing is
            written.
        RuntimeError: the backend is unavailable on the device.
    """
    arguments.quantizer(grid, straight_through)
    direction = check_range("direction", direction, MAX_DIRECTION)
    latents = arguments.tensors("latents", latents)
    ids, where = arguments.names(tensor_ids, layouts, latents)
    op(
        arguments.optional("plus", plus), arguments.optional("minus", minus), latents,
        arguments.tensors("grads", grads), arguments.tensors("alphas", alphas),
        arguments.tensor("norm", norm), arguments.seed(seed), arguments.step(step),
        arguments.one_minus_beta(one_minus_beta), direction, ids, where, grid.qmin,
        grid.qmax, grid.offset, grid.r, straight_through.distribution,
        arguments.epsilon(straight_through, grid, epsilon_scale), backend, block_of(transform),
    )  # fmt: skip


def check_lists(
    plus: Sequence[Tensor], minus: Sequence[Tensor], latents: Sequence[Tensor], grads: Sequence[Tensor],
    alphas: Sequence[Tensor], block: int, layouts: Sequence[Layout],
) -> None:  # fmt: skip
    checks.tensor_list("latents", latents, FLOATS)
    checks.tensor_list("grads", grads, FLOATS, latents)
    if latents and not plus and not minus:
        raise ValueError("plus and minus must not both be None")
    for name, out in (("plus", plus), ("minus", minus)):
        if out:
            checks.tensor_list(name, out, OUTPUTS, latents)
    if plus and minus and plus[0].dtype != minus[0].dtype:
        raise TypeError(
            f"minus must have the dtype of plus, {checks.named([plus[0].dtype])},"
            f" got {checks.named([minus[0].dtype])}"
        )
    checks.alpha_list(alphas, latents)
    checks.transformed("latents", latents, alphas, block, layouts)


@list_op(
    "fogzo::perturb_quantize_",
    mutates_args=("plus", "minus"),
    schema="(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor[] latents, Tensor[] grads,"
    f" Tensor[] alphas, {STATE}, SymInt direction, {NAMES}, {GRID}, str distribution,"
    " float epsilon, str? backend, int block=0) -> ()",
)
def op(
    plus: Sequence[Tensor], minus: Sequence[Tensor], latents: Sequence[Tensor], grads: Sequence[Tensor],
    alphas: Sequence[Tensor], norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor, direction: int,
    tensor_ids: Sequence[int], layouts: Sequence[int], qmin: int, qmax: int, offset: float, r: int,
    distribution: str, epsilon: float, backend: str | None, block: int = 0,
) -> None:  # fmt: skip
    draw = Draw(distribution, seed, step, tensor_ids, triples(layouts))
    mix = Mix(norm, one_minus_beta, epsilon)

    def check() -> None:
        check_lists(plus, minus, latents, grads, alphas, block, draw.layouts)
        memory.alphas(alphas, r)
        numels = memory.numels_of(latents)
        memory.shards(draw, numels)
        memory.overlaps(
            {"plus": plus, "minus": minus},
            {"latents": latents, "grads": grads, "alphas": alphas, "norm": [norm]},
            numels,
        )

    checks.mix(mix, latents)
    checks.draw(draw, latents)
    check_range("direction", direction, MAX_DIRECTION)
    memory.numbers(draw, mix)
    run_checked(
        select(backend, norm.device), check, "perturb_quantize_", plus, minus, latents, grads, alphas, draw,
        mix, direction, grid_of(qmin, qmax, offset, r), block,
    )  # fmt: skip


@op.register_fake
def _(plus: Sequence[Tensor], minus: Sequence[Tensor], latents: Sequence[Tensor], grads: Sequence[Tensor],
      alphas: Sequence[Tensor], norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor,
      direction: int, tensor_ids: Sequence[int], layouts: Sequence[int], qmin: int, qmax: int, offset: float,
      r: int, distribution: str, epsilon: float, backend: str | None, block: int = 0) -> None:  # fmt: skip
    checks.mix(Mix(norm, one_minus_beta, 0.0), latents)
    draw = Draw(distribution, seed, step, tensor_ids, triples(layouts))
    checks.draw(draw, latents)
    check_lists(plus, minus, latents, grads, alphas, block, draw.layouts)
