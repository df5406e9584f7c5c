"""Pass: one forward of a step, or several of micro-batches, with the weights that the step gives it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .guards.gradients import Source
from .guards.graph_reads import DERIVATIVE, asks_for_autograd
from .guards.uncompiled import uncompiled

if TYPE_CHECKING:
    from .step import Step


class Pass:
    """One forward of a step: the gradient pass, or a probe with the weights Q(w + eps v) or Q(w - eps v).

    :meth:`Fogzo.probes` yields it. Enter it with ``with``, run the model, and give the loss to
    :meth:`backward`.

    Attributes:
        sign: 0 for the gradient pass, +1 or -1 for a probe.
        direction: number of the probe's direction; 0 for the gradient pass.
        loss: sum of the losses so far, 0-dim float32; None before the first.
        losses: number of losses so far.
        done: whether the pass was left without an exception.

    Example:
        >>> model, x = torch.nn.Linear(8, 4), torch.ones(2, 8)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2))
        >>> for probe in fk.Fogzo(model, total_steps=100, directions=1).probes():
        ...     with probe: probe.backward(model(x).square().mean())
        ...     print(probe.direction, probe.sign)
        0 0
        0 1
        0 -1
    """

    def __init__(self, step: Step, direction: int, sign: int, slot: Tensor) -> None:
        self.direction, self.sign, self._slot = direction, sign, slot  # the sum of the losses lies there
        self.loss: Tensor | None = None  # the sum of the losses so far, 0-dim float32
        self.losses = 0  # their number
        self.done = False
        self._step: Step | None = step  # None when the step has ended
        self._grad_mode: bool | None = None  # before the pass was entered; None outside of it

    @uncompiled
    def __enter__(self) -> Pass:
        if self._step is None or self._step.active or self.done:
            raise RuntimeError("a pass must be entered once, in the order that probes() gives")
        self._step.enter(self)
        self._step.run.gradients.come_from = Source.PASS
        self._grad_mode = torch.is_grad_enabled()
        torch.set_grad_enabled(self.sign == 0)
        return self

    @uncompiled
    def backward(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch to the pass; in the gradient pass also back-propagate it.

        Give every pass the same losses in the same order and on the same scale: divided by K for K
        micro-batches, or multiplied by a gradient scaler.

        Args:
            loss: a tensor of one element. In the gradient pass it has a graph.

        Raises:
            RuntimeError: the pass is not entered.
            ValueError: ``loss`` is not a tensor of one element.

        Example:
            >>> model, batches = torch.nn.Linear(8, 4), torch.ones(3, 2, 8)
            >>> report = fk.quantize_model(model, fk.presets.lsq(2))
            >>> for probe in fk.Fogzo(model, total_steps=100).probes():
            ...     with probe:
            ...         for x in batches: probe.backward(model(x).square().mean() / 3)
        """
        if self._grad_mode is None or self._step is None:
            raise RuntimeError("probe.backward must be called inside `with probe:`")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss must be a tensor of one element, got {what}")
        if self.sign == 0:
            self._step.back_propagate(loss)
        value = loss.detach().reshape(())
        if self.loss is None:
            self.loss = self._slot.copy_(value)
        else:
            self.loss.add_(value)
        self.losses += 1

    @uncompiled
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._step is not None
        assert self._grad_mode is not None
        asked = asks_for_autograd(value)
        torch.set_grad_enabled(self._grad_mode)
        self._grad_mode = None
        self._step.run.gradients.come_from = Source.ELSEWHERE
        self._step.exit(self, failed=kind is not None)
        self.done = kind is None
        if asked:
            raise RuntimeError(DERIVATIVE) from value
