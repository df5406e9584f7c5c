"""Pass: one forward of a step, and what a loop gives it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from .guards.gradients import Source
from .guards.graph_reads import check_reads, leaves_of
from .guards.uncompiled import uncompiled

if TYPE_CHECKING:
    from .step import Step

T = TypeVar("T")
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

    def batches(self, micro_batches: Sequence[T]) -> Iterator[T]:
        """The micro-batches that the pass runs: all in the gradient pass, and in probes the first ones.

        Of K these are ``probe_share * K``, rounded up. Give the loss of each to :meth:`backward`, scaled as
        ever (by 1/K for the mean): the factor of the share is put right by the step.

        Args:
            micro_batches: those of the step, the same in every pass.

        Raises:
            RuntimeError: outside ``with probe:``, for another number of them than in the gradient pass, or
                where one of them gave no loss, or several.
        """
        step = self._running("batches")
        if not isinstance(micro_batches, Sequence):
            raise TypeError(
                f"micro_batches must be a sequence, got {type(micro_batches).__name__}: every pass runs them"
            )
        for one in islice(micro_batches, step.batches_of(self, len(micro_batches))):
            before = self.losses
            yield one
            if self.losses != before + 1:
                raise RuntimeError(
                    f"each of probe.batches() must give one loss to probe.backward, got {self.losses - before}"
                )

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
        if step.share < 1 and step.batches is None:
            raise RuntimeError(
                f"probe_share={step.share} must be used with the micro-batches of a step:"
                " `for batch in probe.batches(micro_batches)` in each pass of probes()"
            )
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
        if self.sign == 0 and self.losses == step.shared:
            step.losses.base.copy_(self.loss)

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
