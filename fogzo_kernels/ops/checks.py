"""Checks that do not depend on the backend: each names the argument, what was expected and what came.

They look at shapes, dtypes, devices and lengths, so they also run while a graph is traced. What needs data or
addresses stands in :mod:`.memory`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..spec.call import Draw, Losses, Mix
from ..spec.checks import finite as finite
from ..spec.checks import real as real
from ..spec.checks import unit_interval as unit_interval
from ..spec.hadamard import check_block
from ..spec.noise import MAX_DIRECTION, Layout

Tensors = Sequence[Tensor]
Fit = Callable[[Sequence[int], Sequence[int]], bool]  # whether a shape suits another
KEPT = 64  # calls of an op whose checks are remembered: a training loop repeats a few
#: Scalars that the host or the device may hold.
SCALARS = {
    "seed": torch.int64,
    "step": torch.int64,
    "one_minus_beta": torch.float64,
    "lr": torch.float64,
    "optimizer_step": torch.int64,
}


def shape(t: Tensor) -> tuple[int, ...]:
    """A shape as messages print it."""
    return tuple(t.shape)


def instance(name: str, value: object, kind: type) -> None:
    """Raise unless ``value`` is of a kind; a type may say in ``MISTAKEN`` why it is often given instead."""
    if not isinstance(value, kind):
        why = getattr(type(value), "MISTAKEN", "")
        got = f"{type(value).__name__}{why and ': '}{why}"
        raise TypeError(f"{name} must be {article(kind.__name__)}, got {got}")


def article(noun: str) -> str:
    """A noun with its article."""
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"


def named(dtypes: Sequence[torch.dtype]) -> str:
    """Dtypes as messages name them."""
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor_list(
    name: str,
    tensors: Tensors,
    dtypes: Sequence[torch.dtype],
    like: Tensors | None = None,
    fit: Fit = operator.eq,
) -> None:
    """A list of contiguous tensors of one dtype and device, whose shapes suit ``like``."""
    if like is not None and len(tensors) != len(like):
        raise ValueError(f"{name} must have {len(like)} tensors, got {len(tensors)}")
    first = like[0] if like else tensors[0] if tensors else None
    if first is not None and uniform(tensors, dtypes, first, like, fit):
        return
    for i, t in enumerate(tensors):
        what = f"{name}[{i}]"
        if t.dtype not in dtypes:
            raise TypeError(f"{what} must be {named(dtypes)}, got {named([t.dtype])}")
        if t.dtype != tensors[0].dtype:
            raise TypeError(
                f"{what} must have the dtype of {name}[0], {named([tensors[0].dtype])}, got {named([t.dtype])}"
            )
        if first is not None and t.device != first.device:
            raise ValueError(f"{what} must be on {first.device}, got {t.device}")
        if like is not None and not fit(t.shape, like[i].shape):
            expected = fitting(like[i].shape) if fit is fits else f"shape {shape(like[i])}, got"
            raise ValueError(f"{what} must have {expected} {shape(t)}")
        if t.layout != torch.strided or not t.is_contiguous():
            raise ValueError(f"{what} must be contiguous, got strides {t.stride()}")


DTYPE, DEVICE, IS_CPU, SHAPE = map(operator.attrgetter, ("dtype", "device", "is_cpu", "shape"))


def uniform(
    tensors: Tensors, dtypes: Sequence[torch.dtype], first: Tensor, like: Tensors | None, fit: Fit
) -> bool:
    """Whether :func:`tensor_list` has nothing to say; cheap, for lists of thousands."""
    if torch.compiler.is_dynamo_compiling():  # it does not follow what makes this cheap
        return False
    dtype = tensors[0].dtype
    try:
        contiguous = all(map(Tensor.is_contiguous, tensors))
    except RuntimeError:  # a sparse tensor
        return False
    return (
        contiguous
        and dtype in dtypes
        and set(map(DTYPE, tensors)) == {dtype}
        and (all(map(IS_CPU, tensors)) if first.is_cpu else set(map(DEVICE, tensors)) == {first.device})
        and (like is None or all_fit(tensors, like, fit))
    )


def all_fit(tensors: Tensors, like: Tensors, fit: Fit) -> bool:
    if fit is operator.eq:
        return all(map(Tensor.is_same_size, tensors, like))
    if all(n == 1 for n in map(Tensor.numel, tensors)):  # any tensor has room for one alpha
        return True
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]]
    pairs = list(zip(map(SHAPE, tensors), map(SHAPE, like), strict=True))
    with suppress(TypeError):  # symbolic sizes have no hash
        pairs = set(pairs)  # a long list has few shapes
    return all(fit(*pair) for pair in pairs)


def alphas(alphas: Tensors, name: str, like: Tensors, block: int, layouts: Sequence[Layout] = ()) -> None:
    """One float32 scale per tensor, row or group; where there is a transform, for whole blocks of it."""
    tensor_list("alphas", alphas, (torch.float32,), like, fits)
    if not block:
        return
    whole_blocks(name, like, block)
    for i, (alpha, t) in enumerate(zip(alphas, like, strict=True)):
        length = t.numel() // max(alpha.numel(), 1)
        if length % block:
            raise ValueError(
                f"alphas[{i}] must be one for whole blocks of {block}, the transform's, got one for each"
                f" {length} elements"
            )
    for i, (layout, t) in enumerate(zip(layouts, like, strict=False)):
        if t.numel() and any(x % block for x in layout):
            raise ValueError(
                f"layouts[{i}] must be multiples of block {block}, the transform's, got {tuple(layout)}"
            )


def whole_blocks(name: str, tensors: Tensors, block: int) -> None:
    """Blocks of the Hadamard transform divide the last dimension of each tensor."""
    check_block(block)
    for i, t in enumerate(tensors):
        if t.ndim == 0 or t.shape[-1] % block:
            raise ValueError(
                f"{name}[{i}] must have a last dimension that block {block} divides, got shape {shape(t)}"
            )


def fits(alpha: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether an alpha of that shape has one element, one per row or one per group of a tensor of ``sizes``.

    Its number of elements does not tell: (1, 1024), for the columns of (32, 1024), has that of 32 groups a row.
    """
    scales, sizes = tuple(alpha), tuple(sizes)
    if scales and len(scales) == len(sizes) and scales[:-1] == sizes[:-1]:
        groups = scales[-1]
        if groups > 0 and sizes[-1] % groups == 0:
            return True
    while scales[-1:] == (1,):
        scales = scales[:-1]
    return scales == sizes[: len(scales)] or 0 in sizes  # of one element, none is left


def fitting(sizes: Sequence[int]) -> str:
    """What :func:`fits` takes for a tensor of ``sizes``, as messages name it."""

    def ending(last: object) -> str:
        return f"({', '.join(map(str, (*sizes[:-1], last)))}{',' if len(sizes) == 1 else ''})"

    row = f", one per row, shape {ending(1)}," if len(sizes) > 1 else ""
    group = f" or one per group of the last dimension, shape {ending('groups')}," if len(sizes) else ""
    return f"one element{row}{group} for a tensor of shape {tuple(sizes)}, got shape"


def scalar_tensor(name: str, t: Tensor, dtype: torch.dtype, device: torch.device | None) -> None:
    """A 0-dim tensor; ``device`` None allows the CPU as well as any device."""
    instance(name, t, Tensor)
    if t.dtype != dtype or t.ndim != 0:
        raise TypeError(f"{name} must be a 0-dim {named([dtype])} tensor, got {named([t.dtype])} {shape(t)}")
    if device is not None and t.device != device:
        raise ValueError(f"{name} must be on {device}, got {t.device}")


# ---- groups of arguments


def host_or(device: torch.device | None, **scalars: Tensor) -> None:
    """0-dim tensors of their dtypes, each on the CPU or on the device."""
    for name, t in scalars.items():
        scalar_tensor(name, t, SCALARS[name], None if t.is_cpu else device)


def draw(draw: Draw, like: Tensors) -> None:
    """Seed and step, and one tensor id and layout for each tensor of ``like``."""
    host_or(like[0].device if like else None, seed=draw.seed, step=draw.step)
    for name in ("tensor_ids", "layouts"):
        if len(getattr(draw, name)) != len(like):
            raise ValueError(f"{name} must have {len(like)} entries, got {len(getattr(draw, name))}")


def mix(mix: Mix, like: Tensors, count: int) -> None:
    """The norm, and a factor for each of the ``count`` with noise, on the tensors' device.

    one_minus_beta is there or on the CPU.
    """
    scalar_tensor("norm", mix.norm, torch.float32, like[0].device if like else None)
    host_or(mix.norm.device, one_minus_beta=mix.one_minus_beta)
    if mix.factors is not None:
        vector("noise_factors", mix.factors, torch.float32, count, mix.norm.device)


def losses(losses: Losses, device: torch.device, least: int) -> None:
    """losses_plus and losses_minus of one length, ``least`` or more, 0 for guided noise; counters' shape."""
    for name, t in (("losses_plus", losses.plus), ("losses_minus", losses.minus)):
        vector(name, t, torch.float32, None, device)
    n, most = losses.plus.shape[0], 0 if losses.guided else MAX_DIRECTION
    if not least <= n <= most:
        raise ValueError(f"losses_plus must have {least}..{most} entries, got {n}")
    if losses.minus.shape != losses.plus.shape:
        raise ValueError(f"losses_minus must have shape {shape(losses.plus)}, got {shape(losses.minus)}")
    if losses.counters is not None:
        vector("counters", losses.counters, torch.int64, 3, device)


def vector(name: str, t: Tensor, dtype: torch.dtype, length: int | None, device: torch.device) -> None:
    """A contiguous tensor of one dimension."""
    if t.dtype != dtype or t.ndim != 1 or length not in (None, t.shape[0]) or not t.is_contiguous():
        kind = f"a contiguous {named([dtype])}" if length is None or dtype.is_floating_point else "an int64"
        raise TypeError(
            f"{name} must be {kind} tensor of shape ({length or 'n'},), got {named([t.dtype])} {shape(t)}"
        )
    if t.device != device:
        raise ValueError(f"{name} must be on {device}, got {t.device}")
