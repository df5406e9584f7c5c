"""Derivatives that a forward asks for in a probe, which runs without autograd."""

from __future__ import annotations

import re

import torch

#: In what PyTorch says of a derivative that is asked for without autograd.
WITHOUT_AUTOGRAD = re.compile(r"requires?[_ ]grad|require gradient")
DERIVATIVE = (
    "a probe runs without autograd, and its forward asked for a derivative: put `with torch.enable_grad():`"
    " around the part that differentiates; fogzo.step and fogzo.run with a closure do so by themselves"
)


def asks_for_autograd(error: BaseException | None) -> bool:
    """Return whether an error came of a derivative, where autograd is off."""
    without = isinstance(error, RuntimeError) and not torch.is_grad_enabled()
    return without and WITHOUT_AUTOGRAD.search(str(error)) is not None
