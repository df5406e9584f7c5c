"""Checks that do not depend on the backend: each names the argument, what was expected and what came.

They look at shapes, dtypes, devices and lengths, so they also run while a graph is traced. What needs data or
addresses stands in :mod:`.memory`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..spec.call import Draw, Losses, Mix, Update
from ..spec.dtypes import FLOATS
from ..spec.hadamard import check_block
from ..spec.noise import MAX_DIRECTION, Layout, check_number

Tensors = Sequence[Tensor]
DTYPE, DEVICE, IS_CPU, SHAPE = map(operator.attrgetter, ("dtype", "device", "is_cpu", "shape"))


def shape(t: Tensor) -> tuple[int, ...]:
    """A shape as messages print it."""
    return tuple(t.shape)


def instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def named(dtypes: Sequence[torch.dtype]) -> str:
    """Dtypes as messages name them."""
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor_list(
    name: str, tensors: Tensors, dtypes: Sequence[torch.dtype], like: Tensors | None = None
) -> None:
    """A list of contiguous tensors of one dtype and device, of the shapes of ``like``."""
    if like is not None and len(tensors) != len(like):
        raise ValueError(f"{name} must have {len(like)} tensors, got {len(tensors)}")
    first = like[0] if like else tensors[0] if tensors else None
    if first is not None and uniform(tensors, dtypes, first.device, like):
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
        if like is not None and t.shape != like[i].shape:
            raise ValueError(f"{what} must have shape {shape(like[i])}, got {shape(t)}")
        if t.layout != torch.strided or not t.is_contiguous():
            raise ValueError(f"{what} must be contiguous, got strides {t.stride()}")


def uniform(
    tensors: Tensors, dtypes: Sequence[torch.dtype], device: torch.device, like: Tensors | None
) -> bool:
    """Whether :func:`tensor_list` has nothing to say; cheap, for lists of thousands."""
    if torch.compiler.is_dynamo_compiling():  # it does not follow what makes this cheap
        return False
    on_cpu = device.type == "cpu"
    try:
        contiguous = all(map(Tensor.is_contiguous, tensors))
    except RuntimeError:  # what is not strided has no such thing
        return False
    return (
        contiguous
        and set(map(DTYPE, tensors)) <= {d for d in dtypes if not tensors or d == tensors[0].dtype}
        and (all(map(IS_CPU, tensors)) if on_cpu else set(map(DEVICE, tensors)) <= {device})
        and (like is None or all(map(Tensor.is_same_size, tensors, like)))
    )


def alpha_list(alphas: Tensors, like: Tensors) -> None:
    """One float32 scale per tensor, row (any leading dims) or group of the last dimension."""
    if len(alphas) != len(like):
        raise ValueError(f"alphas must have {len(like)} tensors, got {len(alphas)}")
    alike = like and uniform(alphas, (torch.float32,), like[0].device, None)
    if alike and (all(n == 1 for n in map(Tensor.numel, alphas)) or all_fit(alphas, like)):
        return
    for i, (alpha, t) in enumerate(zip(alphas, like, strict=True)):
        if alpha.dtype != torch.float32:
            raise TypeError(f"alphas[{i}] must be float32, got {named([alpha.dtype])}")
        if alpha.device != t.device:
            raise ValueError(f"alphas[{i}] must be on {t.device}, got {alpha.device}")
        if not alpha.is_contiguous():
            raise ValueError(f"alphas[{i}] must be contiguous, got strides {alpha.stride()}")
        if not fits(alpha.shape, t.shape):
            raise ValueError(
                f"alphas[{i}] must have {fitting(t.shape)} a tensor of shape {shape(t)},"
                f" got shape {shape(alpha)}"
            )


def all_fit(alphas: Tensors, like: Tensors) -> bool:
    """Whether each alpha fits its tensor; cheap, for lists of thousands, which have few shapes."""
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]]
    pairs = list(zip(map(SHAPE, alphas), map(SHAPE, like), strict=True))
    with suppress(TypeError):  # symbolic sizes have no hash
        pairs = set(pairs)
    return all(fits(*pair) for pair in pairs)


def fits(alpha: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether an alpha of that shape has one element, one per row or one per group of a tensor of ``sizes``.

    Its number of elements does not tell: (1, 1024), meant for the columns of (32, 1024), has as many as 32
    groups in each row.
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
    return f"one element{row}{group} for"


def whole_blocks(name: str, tensors: Tensors, block: int) -> None:
    """Blocks of the Hadamard transform divide the last dimension of each tensor."""
    check_block(block)
    for i, t in enumerate(tensors):
        if t.ndim == 0 or t.shape[-1] % block:
            raise ValueError(
                f"{name}[{i}] must have a last dimension that block {block} divides, got shape {shape(t)}"
            )


def transformed(
    name: str, tensors: Tensors, alphas: Tensors, block: int, layouts: Sequence[Layout] = ()
) -> None:
    """Where there is a transform: whole blocks, each with one alpha; of a shard, those of the parameter."""
    if not block:
        return
    whole_blocks(name, tensors, block)
    for i, (alpha, t) in enumerate(zip(alphas, tensors, strict=True)):
        length = t.numel() // max(alpha.numel(), 1)
        if length % block:
            raise ValueError(
                f"alphas[{i}] must be one for whole blocks of {block}, the transform's, got one for each"
                f" {length} elements"
            )
    for i, (layout, t) in enumerate(zip(layouts, tensors, strict=False)):
        if t.numel() and any(x % block for x in layout):
            raise ValueError(
                f"layouts[{i}] must be multiples of block {block}, the transform's, got {tuple(layout)}"
            )


def scalar_tensor(name: str, t: Tensor, dtype: torch.dtype, device: torch.device | None) -> None:
    """A 0-dim tensor; ``device`` None allows the CPU as well as any device."""
    instance(name, t, Tensor)
    if t.dtype != dtype or t.ndim != 0:
        raise TypeError(f"{name} must be a 0-dim {named([dtype])} tensor, got {named([t.dtype])} {shape(t)}")
    if device is not None and t.device != device:
        raise ValueError(f"{name} must be on {device}, got {t.device}")


def unit_interval(name: str, value: float) -> None:
    """A number in 0..1."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in 0..1, got {value}")


def finite(name: str, value: float) -> None:
    """A finite number that is not negative."""
    check_number(name, value)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def real(name: str, value: float) -> None:
    """A finite number."""
    check_number(name, value)
    if not abs(value) < math.inf:  # as isfinite, of what torch.compile makes a symbol, too
        raise ValueError(f"{name} must be finite, got {value}")


# ---- what travels together


def seed_and_step(draw: Draw, device: torch.device | None) -> None:
    """0-dim int64 tensors, on the CPU or on the device."""
    for name, t in (("seed", draw.seed), ("step", draw.step)):
        scalar_tensor(name, t, torch.int64, None if t.is_cpu else device)


def draw(draw: Draw, like: Tensors) -> None:
    """Seed and step, and one tensor id and layout for each tensor of ``like``."""
    seed_and_step(draw, like[0].device if like else None)
    if len(draw.tensor_ids) != len(like):
        raise ValueError(f"tensor_ids must have {len(like)} entries, got {len(draw.tensor_ids)}")
    if len(draw.layouts) != len(like):
        raise ValueError(f"layouts must have {len(like)} entries, got {len(draw.layouts)}")


def mix(mix: Mix, like: Tensors) -> None:
    """The norm on the tensors' device; one_minus_beta there or on the CPU."""
    scalar_tensor("norm", mix.norm, torch.float32, like[0].device if like else None)
    on_host = mix.one_minus_beta.is_cpu
    scalar_tensor("one_minus_beta", mix.one_minus_beta, torch.float64, None if on_host else mix.norm.device)


def losses(losses: Losses, device: torch.device, least: int) -> None:
    """losses_plus and losses_minus of one length, ``least`` or more; counters of the contract's shape."""
    for name, t in (("losses_plus", losses.plus), ("losses_minus", losses.minus)):
        instance(name, t, Tensor)
        if t.dtype != torch.float32 or t.ndim != 1 or not t.is_contiguous():
            raise TypeError(
                f"{name} must be a contiguous float32 tensor of shape (n,), got {named([t.dtype])} {shape(t)}"
            )
        if t.device != device:
            raise ValueError(f"{name} must be on {device}, got {t.device}")
    n = losses.plus.shape[0]
    if not least <= n <= MAX_DIRECTION:
        raise ValueError(f"losses_plus must have {least}..{MAX_DIRECTION} entries, got {n}")
    if losses.minus.shape != losses.plus.shape:
        raise ValueError(f"losses_minus must have shape {shape(losses.plus)}, got {shape(losses.minus)}")
    if losses.counters is not None:
        counters(losses.counters, device)


def counters(t: Tensor, device: torch.device) -> None:
    """int64, of the contract's shape."""
    if t.dtype != torch.int64 or shape(t) != (3,) or not t.is_contiguous():
        raise TypeError(f"counters must be an int64 tensor of shape (3,), got {named([t.dtype])} {shape(t)}")
    if t.device != device:
        raise ValueError(f"counters must be on {device}, got {t.device}")


def update(update: Update, device: torch.device) -> None:
    """lr and optimizer_step, 0-dim, on the CPU or on the device."""
    for name, t, dtype in (
        ("lr", update.lr, torch.float64),
        ("optimizer_step", update.optimizer_step, torch.int64),
    ):
        scalar_tensor(name, t, dtype, None if t.is_cpu else device)


def latents_and_alphas(latents: Tensors, alphas: Tensors, block: int) -> None:
    """What every op on weights takes; block: of the transform, or 0."""
    tensor_list("latents", latents, FLOATS)
    alpha_list(alphas, latents)
    transformed("latents", latents, alphas, block)
