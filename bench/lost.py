"""A device that a kernel has taken from this process: after an illegal access every later call fails, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LOST = 3  # exit status of a program that ends for this, and that --resume can go on with


class DeviceLostError(Exception):
    """The device does not answer this process any more."""


def alive(device: torch.device) -> bool:
    """Whether it still does."""
    if device.type != "cuda":
        return True
    import torch  # which takes seconds, and only those that compute need it

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def told(error: BaseException) -> str:
    """The error's kind and first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
