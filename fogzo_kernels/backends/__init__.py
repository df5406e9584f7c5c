"""Finds and selects backends; no arithmetic.

A backend is an object, usually a module, with the functions of :class:`Backend`. The backends of this package
are modules here. Other packages give theirs by entry points of the group ``fogzo_kernels.backends``, which this
module loads when a caller asks for them (CONTRIBUTING.md, "Add a backend").
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Protocol

import torch
from torch import Tensor

from ..spec.call import Draw, Losses, Measure, Mix, Update
from ..spec.grid import Grid
from ..spec.straight_through import StraightThrough

#: In the order of preference; backends of other packages come before ``reference``. ``cpu`` comes before
#: ``triton`` so that Triton's interpreter, which also runs on the CPU, is used only by its name.
OWN = ("cpu", "triton", "cuda", "reference")
OF_GPUS = ("triton", "cuda")
GROUP = "fogzo_kernels.backends"
VARIABLE = "FOGZO_BACKEND"

Tensors = Sequence[Tensor]


class Backend(Protocol):
    """The functions of a backend, which docs/contract.md defines. Arguments arrive checked.

    Lists, which may be ``Held`` (held.py), hold one tensor for each latent, contiguous, of one dtype and
    device. An empty ``plus`` or ``minus`` is not written. ``root`` asks for the norm, float32, instead of the
    sum of squares, ``per_tensor``, which excludes ``root``, for a sum for each tensor. ``block`` is the block
    of the quantizer's transform, or 0. A tensor of ``out`` may be the input at the same place in the Hadamard
    transform. In the fused tail ``alphas``, the draw's tensor ids and layouts, the factors, and a
    non-empty ``quantized`` belong to the first latents.

    A backend may have a class ``ModuleWeight``, as cpu.py has: modules that run alone call it in each forward.
    """

    def unavailable(self, device: torch.device) -> str | None: ...

    def noise(self, numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor: ...

    def guide_sumsq(self, grads: Tensors, alphas: Tensors, r: int, root: bool, per_tensor: bool) -> Tensor: ...

    def perturb_quantize_(
        self,
        plus: Tensors,
        minus: Tensors,
        latents: Tensors,
        grads: Tensors,
        alphas: Tensors,
        draw: Draw,
        mix: Mix,
        direction: int,
        grid: Grid,
        block: int,
    ) -> None: ...

    def estimate_gradient_(
        self, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses, r: int, block: int
    ) -> None: ...

    def estimate_update_(
        self,
        latents: Tensors,
        quantized: Tensors,
        grads: Tensors,
        alphas: Tensors,
        draw: Draw,
        mix: Mix,
        losses: Losses,
        grid: Grid,
        update: Update,
        block: int,
    ) -> None: ...

    def quantize_(self, out: Tensors, latents: Tensors, alphas: Tensors, grid: Grid, block: int) -> None: ...

    def straight_through_backward_(
        self,
        out: Tensors,
        grads: Tensors,
        latents: Tensors,
        alphas: Tensors,
        grid: Grid,
        straight_through: StraightThrough,
        block: int,
    ) -> None: ...

    def measure_alphas_(self, alphas: Tensors, tensors: Tensors, measure: Measure) -> None: ...

    def learned_backward_(
        self,
        out: Tensors,
        alpha_grads: Tensors,
        grads: Tensors,
        latents: Tensors,
        alphas: Tensors,
        grid: Grid,
        straight_through: StraightThrough,
        factors: Sequence[float],
        block: int,
    ) -> None: ...

    def hadamard_(self, out: Tensors, tensors: Tensors, block: int) -> None: ...


#: The functions that a backend must have.
FUNCTIONS = tuple(name for name in vars(Backend) if not name.startswith("_"))


@functools.cache
def entry_points() -> tuple[dict[str, metadata.EntryPoint], list[str]]:
    """Backends of other packages by name, and for each refused entry point the reason."""
    taken: dict[str, metadata.EntryPoint] = {}
    refused = []
    for point in metadata.entry_points(group=GROUP):
        if point.name in OWN or point.name in taken:
            owner = "this package" if point.name in OWN else taken[point.name].value
            refused.append(f"{point.name} of {point.value} is not taken: the name belongs to {owner}")
        else:
            taken[point.name] = point
    return taken, refused


def names() -> tuple[str, ...]:
    """Every backend's name, in the order of preference."""
    return (*OWN[:-1], *entry_points()[0], OWN[-1])


@functools.cache
def load(name: str) -> Backend | str:
    """The backend, or the reason why it cannot be loaded."""
    if name in OWN:
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ImportError as error:
            return f"cannot be imported: {error}"
    point = entry_points()[0][name]
    try:
        backend: Backend = point.load()
    except Exception as error:  # another package's error is the reason, and no failure of this one
        return f"cannot be loaded from {point.value}: {type(error).__name__}: {error}"
    missing = [function for function in FUNCTIONS if not callable(getattr(backend, function, None))]
    return f"{point.value} has no {', '.join(missing)}" if missing else backend


def reason_unavailable(name: str, device: torch.device) -> str | None:
    """None, or why the backend cannot run on ``device``."""
    backend = load(name)
    return backend if isinstance(backend, str) else backend.unavailable(device)


def available_backends(device: str | torch.device | None = None) -> dict[str, str | None]:
    """Return each backend's name with None, or with the reason why it cannot run.

    Backends of other packages, which entry points of the group ``fogzo_kernels.backends`` name, are among them.

    Args:
        device: the device to run on. None: the GPU if there is one, else the CPU.

    Returns:
        A dict in the order of preference.

    Example:
        >>> fk.available_backends("cpu")["reference"] is None
        True
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: reason_unavailable(name, torch.device(device)) for name in names()}


def check_name(name: str | None) -> None:
    """Raise unless ``name`` is a string or None."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend must be a string or None, got {type(name).__name__}")


def check_known(name: str | None, source: str = "backend") -> None:
    """Raise unless ``name`` is the name of a backend, or None."""
    check_name(name)
    if name is not None and name not in names():
        raise ValueError(f"{source} must be one of {', '.join(names())}, got {name!r}")


def select(name: str | None, device: torch.device) -> Backend:
    """The backend ``name``, or else ``FOGZO_BACKEND``, or else the first one that runs on ``device``.

    Raises:
        TypeError: the name is no string.
        ValueError: the name is unknown.
        RuntimeError: the named backend is unavailable on the device; the message says why.
    """
    source = "backend"
    if name is None and (asked := os.environ.get(VARIABLE)):
        name, source = asked, VARIABLE
    for known in names() if name is None else ():
        backend = load(known)
        if not isinstance(backend, str) and backend.unavailable(device) is None:
            return backend
    check_known(name, source)
    assert name is not None  # the reference serves any device
    if (reason := reason_unavailable(name, device)) is not None:
        where = "cpu (tensors are on the CPU)" if device.type == "cpu" and name in OF_GPUS else device
        raise RuntimeError(f"{source} {name!r} is unavailable on {where}: {reason}")
    backend = load(name)
    assert not isinstance(backend, str)
    return backend
