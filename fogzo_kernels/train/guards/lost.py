"""What a look at gradients finds: whether they are 0, whether they are finite, whether they were edited.

And gradients of a step that is lost, which no optimizer of PyTorch is to take.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ...functional import TensorList
from ...nn.view import local
from ...ops.listop import PLAIN
from ...ops.native import inspected

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
HALVES = (torch.bfloat16, torch.float16)  # whose first norms need another dtype
DTYPE, IS_CPU, IS_SPARSE = map(operator.attrgetter, ("dtype", "is_cpu", "is_sparse"))


@torch.no_grad()
def look(tensors: Sequence[Tensor], device: torch.device, zeros: bool = True) -> tuple[Tensor, Tensor]:
    """Which tensors have an element that is not 0, and whether every element of all of them is finite.

    Args:
        tensors: gradients of any dtype, on any devices.
        device: of the two results: bool, (len(tensors),) and 0-dim. A GPU is not waited for.
        zeros: whether the first result is asked for; else it says nothing.
    """
    plain: Sequence[Tensor] = tensors
    if isinstance(tensors, TensorList) and tensors.plain:  # gradients in one call of an op are alike
        if device.type == "cpu" and tensors[0].is_cpu:
            return _look_on_cpu(tensors, zeros)
        kinds = {(t.device, t.dtype): [0] for t in tensors[:1]}
    else:
        if not {*map(type, tensors)} <= PLAIN or any(map(IS_SPARSE, tensors)):
            plain = [*map(_numbers, map(local, tensors))]
        elif any(dtype.is_complex for dtype in {*map(DTYPE, tensors)}):
            plain = [*map(_numbers, tensors)]
        kinds = {}
        alike = len({*map(DTYPE, plain)}) == 1 and all(map(IS_CPU, plain))
        for i, t in enumerate(plain[:1] if alike else plain):
            kinds.setdefault((t.device, t.dtype), []).append(i)
    nonzero = torch.ones(len(plain), dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for (where, dtype), places in kinds.items():
        alone = len(kinds) == 1
        own = plain if alone else [plain[i] for i in places]
        if where.type == "cpu":
            some, all_finite = _look_on_cpu(own, zeros)
        else:
            norms = torch.stack(
                torch._foreach_norm(list(own), 1, dtype=torch.float32 if dtype in HALVES else None)
            )
            some, all_finite = norms != 0, norms.isfinite().all()
        finite &= all_finite.to(device, non_blocking=True)
        some = some.to(device, non_blocking=True)
        if alone:
            nonzero = some
        elif zeros:
            nonzero[torch.tensor(places).to(device, non_blocking=True)] = some
    return nonzero, finite


def _look_on_cpu(tensors: Sequence[Tensor], zeros: bool) -> tuple[Tensor, Tensor]:
    seen = inspected(tensors)
    if seen is not None:
        return seen[1] != 0, (seen[2] != 0).all()
    # the second norm is the fast one, and may overflow or underflow
    norms = torch.stack(torch._foreach_norm(list(tensors), 2)).tolist()
    finite = all(map(math.isfinite, norms)) or all(bool(t.isfinite().all()) for t in tensors)
    some = [norm != 0 or bool(t.any()) for norm, t in zip(norms, tensors, strict=True)] if zeros else norms
    return torch.tensor(some, dtype=torch.bool), torch.tensor(finite)


def _numbers(grad: Tensor) -> Tensor:
    grad = grad._values() if grad.is_sparse else grad
    return torch.view_as_real(grad) if grad.is_complex() else grad


@torch.no_grad()
def bits(tensors: Sequence[Tensor]) -> Tensor:
    """What an edit of a contiguous tensor of these changes, a column for each.

    On the CPU, a sum over the bits: an edit of any one element changes it. On a GPU, the first norm and the
    greatest element, which take few launches for all tensors.
    """
    if tensors[0].device.type != "cpu":
        some = [t for t in tensors if t.numel()]
        norms = torch._foreach_norm(some, 1, dtype=torch.float32)
        return torch.stack([*norms, *(x.float() for x in torch._foreach_max(some))])
    seen = inspected(tensors)
    return torch.stack([_sum_of_bits(t) for t in tensors]) if seen is None else seen[0]


def _sum_of_bits(t: Tensor) -> Tensor:
    return t.view(-1).view(BITS[t.itemsize]).sum(dtype=torch.int64)


@torch.no_grad()
def keep_from_optimizers(parameters: Iterable[Tensor]) -> RemovableHandle | None:
    """Fill gradients with NaN, and let every step of an optimizer leave them out until the handle is removed.

    NaN is what gradient scalers look for. An optimizer of PyTorch passes over a parameter whose ``.grad`` is
    None, its state and counts included; it is set to None when such an optimizer steps, as a scaler looks
    before that. A gradient that was cleared or computed anew since then is left alone.

    Returns:
        None if there are no gradients.
    """
    lost = {}
    for p in parameters:
        if p.grad is not None:
            _numbers(local(p.grad)).mul_(math.nan)
            lost[id(p)] = weakref.ref(p.grad)
    if not lost:
        return None

    def clear(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        own = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        own = [p for p in own if id(p) in lost and lost[id(p)]() is p.grad]
        if own and not bool(look([p.grad for p in own], torch.device("cpu"), zeros=False)[1]):
            for p in own:
                p.grad = None

    return register_optimizer_step_pre_hook(clear)
