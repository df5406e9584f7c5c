"""measure_alphas_: alphas from data (docs/contract.md, section 4)."""

from __future__ import annotations

import torch

from ..spec.checks import check_number
from ..spec.grid import FLOATS
from ..spec.scale import STATISTICS
from . import checks
from .arguments import TensorOrList
from .listop import ListOp

#: Positive normal float32 numbers.
FLOAT32 = torch.finfo(torch.float32)


def measure_alphas_(
    alphas: TensorOrList,
    tensors: TensorOrList,
    *,
    statistic: str,
    factor: float = 1.0,
    add: float = 0.0,
    least: float = 0.0,
    backend: str | None = None,
) -> None:
    """Write alpha = max(factor * (statistic + add), least) of each tensor, row or group.

    The shape of an alpha says which elements share it: the whole tensor, a row, or a group of the last
    dimension. ``absmax`` is the largest abs(x) of these elements. ``absmean`` is the mean of abs(x), as BitNet
    b1.58 has it (arXiv 2402.17764, with ``least=1e-5``). ``rms`` is the root of the mean of x^2, as QuEST has
    it (arXiv 2502.05003, with ``add=1e-8``). The statistic of no elements is 0. A NaN among the elements makes
    alpha NaN, and else an infinity makes it infinite.

    ``absmax`` is exact. The other two agree between backends within a relative 1e-6. Every run gives the same
    bits, with any number of threads. The call does not wait for the device.

    Args:
        alphas: outputs, float32, contiguous, one tensor per entry of ``tensors``: of one element, one per row,
            or one per group of the last dimension.
        tensors: weights or activations: contiguous, one dtype (float32, bfloat16 or float16), one device.
        statistic: ``"absmax"``, ``"absmean"`` or ``"rms"``.
        factor: a normal float32 number > 0.
        add: a float32 number >= 0.
        least: a float32 number >= 0. A value > 0 keeps alpha > 0 where all elements are 0.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> x, alpha = torch.tensor([[1.0, -3.0], [0.5, 0.25]]), torch.empty(2, 1)
        >>> fk.functional.measure_alphas_(alpha, x, statistic="absmax")
        >>> alpha.flatten()
        tensor([3.0000, 0.5000])
    """
    checks.instance("statistic", statistic, str)
    check(statistic, factor, add, least)
    lists = {"alphas": alphas, "tensors": tensors}
    op(**lists, statistic=statistic, factor=factor, add=add, least=least, backend=backend)


def check(statistic: str, factor: float, add: float, least: float) -> None:
    if statistic not in STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}")
    least_normal = FLOAT32.smallest_normal
    for name, value, low in (("factor", factor, least_normal), ("add", add, 0.0), ("least", least, 0.0)):
        check_number(name, value)
        if not low <= value <= FLOAT32.max:
            raise ValueError(f"{name} must be in {low:g}..{FLOAT32.max:g}, got {value}")


op = ListOp(
    "measure_alphas_(Tensor(a!)[] alphas, Tensor[] tensors, str statistic, float factor, float add,"
    " float least, str? backend) -> ()",
    {"tensors": FLOATS},
    check,
)
