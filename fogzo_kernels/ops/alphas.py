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
    """Write alpha = max(factor * (statistic + add), least) for each cell of a list of tensors.

    A cell is what shares an alpha: the whole tensor, a row, or a group of the last dimension, as the alpha's
    shape says. Of its elements x, ``absmax`` is the largest abs(x), ``absmean`` the mean of abs(x) (BitNet
    b1.58, arXiv 2402.17764, with ``least=1e-5``), ``rms`` the root of the mean of x^2 (QuEST, arXiv 2502.05003,
    with ``add=1e-8``). One element that is NaN makes the alpha NaN, else one that is infinite makes it
    infinite. The statistic of a cell without elements is 0. Absmax is exact and the same on every backend, the
    others are within 1e-6, relative; all have the same bits in every run, for any number of threads.
    Nothing waits for a device.

    Args:
        alphas: float32, contiguous, one for each of ``tensors``, whatever they hold: one element, one per row,
            or one per group of the last dimension.
        tensors: weights or activations: contiguous, of one dtype (float32, bfloat16 or float16) and device.
        statistic: ``absmax``, ``absmean`` or ``rms``.
        factor: a normal float32 number > 0.
        add, least: float32 numbers >= 0.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend is unavailable on the device.
    """
    checks.instance("statistic", statistic, str)
    check(statistic, factor, add, least)
    lists = {"alphas": alphas, "tensors": tensors}
    op(**lists, statistic=statistic, factor=factor, add=add, least=least, backend=backend)


def check(statistic: str, factor: float, add: float, least: float) -> None:
    if statistic not in STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}")
    for name, value, low in (
        ("factor", factor, FLOAT32.smallest_normal),
        ("add", add, 0.0),
        ("least", least, 0.0),
    ):
        check_number(name, value)
        if not low <= value <= FLOAT32.max:
            raise ValueError(f"{name} must be in {low:g}..{FLOAT32.max:g}, got {value}")


op = ListOp(
    "measure_alphas_(Tensor(a!)[] alphas, Tensor[] tensors, str statistic, float factor, float add,"
    " float least, str? backend) -> ()",
    {"tensors": FLOATS},
    check,
)
