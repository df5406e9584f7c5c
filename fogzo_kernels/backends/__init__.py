"""Finds and selects backends; no arithmetic.

A backend is a module of this package with ``unavailable(device)``, which returns None or the
reason why it cannot run there, and the functions of :class:`Backend`. Adding a file and its name
below adds a backend.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..spec.call import Draw, Losses, Mix, Update
from ..spec.grid import Grid
from ..spec.straight_through import StraightThrough

#: Without a name, the first that runs on the tensors' device is taken. ``cpu`` stands before ``triton``
#: so that Triton's interpreter, which also runs on the CPU, is used only where it is named; on a GPU Triton
#: comes first, and ``cuda`` where Triton is missing.
NAMES = ("cpu", "triton", "cuda", "reference")
VARIABLE = "FOGZO_BACKEND"

Tensors = Sequence[Tensor]


class Backend(Protocol):
    """What a backend computes: docs/contract.md. Arguments arrive checked.

    Lists hold one tensor for each latent, contiguous, of one dtype and device. An empty ``plus`` or ``minus``
    is not written. ``root`` asks for the norm, float32, instead of the sum of squares. In the fused tail
    ``alphas``, the draw's tensor ids and layouts, and a non-empty ``quantized`` belong to the first latents.
    """

    def unavailable(self, device: torch.device) -> str | None: ...

    def noise(self, numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor: ...

    def guide_sumsq(self, grads: Tensors, alphas: Tensors, r: int, root: bool) -> Tensor: ...

    def perturb_quantize_(
        self, plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors, draw: Draw,
        mix: Mix, direction: int, grid: Grid,
    ) -> None: ...  # fmt: skip

    def estimate_gradient_(
        self, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses, r: int
    ) -> None: ...

    def estimate_update_(
        self, latents: Tensors, quantized: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
        losses: Losses, grid: Grid, update: Update,
    ) -> None: ...  # fmt: skip

    def quantize_(self, out: Tensors, latents: Tensors, alphas: Tensors, grid: Grid) -> None: ...

    def straight_through_backward_(
        self, out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
        straight_through: StraightThrough,
    ) -> None: ...  # fmt: skip


@functools.cache
def load(name: str) -> Backend | str:
    """The backend, or the reason why it cannot be loaded."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        return f"cannot be imported: {error}"


def reason_unavailable(name: str, device: torch.device) -> str | None:
    """None, or why the backend cannot run on ``device``."""
    backend = load(name)
    return backend if isinstance(backend, str) else backend.unavailable(device)


def available_backends(device: str | torch.device | None = None) -> dict[str, str | None]:
    """Each backend's name -> None, or the reason why it is unavailable.

    Args:
        device: where it should run; by default the GPU where there is one, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: reason_unavailable(name, torch.device(device)) for name in NAMES}


def select(name: str | None, device: torch.device) -> Backend:
    """The backend ``name``, or else ``FOGZO_BACKEND``, or else the best one for ``device``.

    Raises:
        TypeError: the name is no string.
        ValueError: the name is unknown.
        RuntimeError: the named backend is unavailable there; the message says why.
    """
    source = "backend"
    if not isinstance(name, str | None):
        raise TypeError(f"backend must be a string or None, got {type(name).__name__}")
    if name is None and os.environ.get(VARIABLE):
        name, source = os.environ[VARIABLE], VARIABLE
    if name is None:
        name = next(n for n in NAMES if reason_unavailable(n, device) is None)
    elif name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    reason = reason_unavailable(name, device)
    if reason is not None:
        raise RuntimeError(f"{source} {name!r} is unavailable on {device}: {reason}")
    backend = load(name)
    assert not isinstance(backend, str)
    return backend
