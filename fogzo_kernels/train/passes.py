"""Pass: one forward of a step, and what a loop gives it."""

from __future__ import annotations

import re
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .guards.gradients import Source
from .guards.graph_reads import check_reads, leaves_of
from .guards.uncompiled import uncompiled

if TYPE_CHECKING:
    from .step import Step

#: In what PyTorch says of a derivative that is asked for without autograd.
WITHOUT_AUTOGRAD = re.compile(r"requires?[_ ]grad|require gradient")
DERIVATIVE = (
    "a probe runs without autograd, and its forward asked for a derivative: put `with torch.enable_grad():`"
    " around the part that differentiates; fogzo.step and fogzo.run with a closure do so by themselves"
)


def asks_for_autograd(error: BaseException | None) -> bool:
    """Whether an error came of a derivative, where autograd is off."""
    return (
        isinstance(error, RuntimeError)
        and not torch.is_grad_enabled()
        and WITHOUT_AUTOGRAD.search(str(error)) is not None
    )


class Pass:
    """One forward of a step: the gradient pass (``sign`` 0), or a probe at +eps or -eps."""

    def __init__(self, step: Step, direction: int, sign: int) -> None:
        self.direction, self.sign = direction, sign
        self.loss: Tensor | None = None  # sum of the losses so far, 0-dim float32
        self.losses = 0  # how many
        self.done = False
        self._step: Step | None = step  # None when the step has ended
        self._grad_mode: bool | None = None  # before it was entered; None outside of it

    @uncompiled
    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's loss to the pass; in the gradient pass also back-propagate it.

        Give every pass the same losses in the same order, scaled alike (by 1/K for K
        micro-batches, or by a gradient scaler).
        """
        step = self._running("backward")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss must be a tensor of one element, got {what}")
        if self.sign == 0:
            if not loss.requires_grad:
                raise RuntimeError(
                    "loss must depend on the model's weights by autograd in the gradient pass, got one that is"
                    " detached, or was made under no_grad"
                )
            if step.watched:
                check_reads(loss, step.weights)
            if step.compared:
                step.leaves |= leaves_of(loss)
            step.gradients.come_from = Source.BACKWARD
            try:
                loss.backward()
            finally:
                step.gradients.come_from = Source.PASS
        value = loss.detach().reshape(())
        if self.loss is None:
            self.loss = step.losses.slot(self.direction, self.sign).copy_(value)
        else:
            self.loss.add_(value)
        self.losses += 1

    def _running(self, caller: str) -> Step:
        if self._grad_mode is None or self._step is None:
            raise RuntimeError(f"probe.{caller} must be called inside `with probe:`")
        return self._step

    @uncompiled
    def __enter__(self) -> Pass:
        if self._step is None or self._step.active or self.done:
            raise RuntimeError("a pass must be entered once, in the order that probes() gives")
        self._step.enter(self)
        self._step.gradients.come_from = Source.PASS
        self._grad_mode = torch.is_grad_enabled()
        torch.set_grad_enabled(self.sign == 0)
        return self

    @uncompiled
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._step is not None
        assert self._grad_mode is not None
        asked = asks_for_autograd(value)
        torch.set_grad_enabled(self._grad_mode)
        self._grad_mode = None
        self._step.gradients.come_from = Source.OUTSIDE
        self._step.exit(self, failed=kind is not None)
        self.done = kind is None
        if asked:
            raise RuntimeError(DERIVATIVE) from value
