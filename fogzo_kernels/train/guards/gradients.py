"""Tracks where each ``.grad`` came from: a pass, an estimate, or an unrelated backward.

A hook on each weight sees who accumulates into its gradient; an estimate is known by its tensor. A tensor's
version would not do: clipping changes it too. The hook does not tell which weights take part in a step:
DistributedDataParallel writes the gradients of other processes without it.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from ...nn.view import local
from ..replay import capturing
from .lost import bits, keep_from_optimizers

BACKWARD_IN_A_PASS = (
    "backward must not be called inside a pass: return the loss from the closure, and the step calls backward;"
    " in a loop over probes() call probe.backward(loss)"
)
EDITED = (
    ".grad must not change between the passes and the estimate; to unscale or clip it, call estimate_() first"
)
ESTIMATED = ".grad still holds the last estimate; zero_grad in the closure comes too late"
ELSEWHERE = (
    ".grad of {} comes from a backward outside of the passes, and the estimate would replace it; add that loss"
    " to the loss of the closure"
)


class Source(Enum):
    """Where gradients come from that are accumulated now."""

    ELSEWHERE = auto()
    PASS = auto()  # an error: inside a pass only its own backward may accumulate
    BACKWARD = auto()  # the backward of the gradient pass


class Gradients:
    """Watches the gradients of parameters, whose hooks refer to it weakly."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._estimates: list[weakref.ref[Tensor] | None] = []  # what holds the last estimate, for each
        self._left_versions: list[int | None] = []  # of these tensors, when the estimate was made
        self._elsewhere: set[int] = set()  # a backward elsewhere has added to these since then
        self._read: list[Tensor] = []  # the gradients as a step read them, until it looks again
        self._versions: list[int] = []  # and theirs
        self._bits: Tensor | None = None  # and a sum over the bits of each
        self.edited: Tensor | None = None  # whether they were edited, 0-dim bool that only the device knows yet
        self._lost: Any = None  # keeps the gradients of a lost step from optimizers
        self._now = [Source.ELSEWHERE]  # what hooks look at, which are to cost a backward next to nothing
        this = weakref.ref(self)
        for i, p in enumerate(self.parameters):

            def hook(_: Tensor, i: int = i, now: list[Source] = self._now) -> None:
                if now[0] is not Source.BACKWARD and (watch := this()) is not None:
                    watch._accumulated(i)

            handle = p.register_post_accumulate_grad_hook(hook)
            weakref.finalize(self, handle.remove)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy watches the copies of the parameters, and knows nothing of their gradients."""
        return Gradients, (self.parameters,)

    @property
    def come_from(self) -> Source:
        """Where gradients come from that are accumulated now."""
        return self._now[0]

    @come_from.setter
    def come_from(self, source: Source) -> None:
        self._now[0] = source

    def _accumulated(self, i: int) -> None:
        """Note a gradient that does not come of the backward of the gradient pass."""
        if self.come_from is Source.PASS:
            raise RuntimeError(BACKWARD_IN_A_PASS)
        self._elsewhere.add(i)

    def left_estimates(self, versions: bool) -> None:
        """What the gradients hold now is the estimate of a step, or the gradient that it leaves as it is.

        ``versions``: whether :attr:`all_estimates` will be asked.
        """
        grads = [p.grad for p in self.parameters]
        self._estimates = [None if grad is None else weakref.ref(grad) for grad in grads]
        if versions:
            self._left_versions = [None if grad is None else local(grad)._version for grad in grads]
        self._elsewhere.clear()

    @property
    def all_estimates(self) -> bool:
        """Whether the gradients hold the last estimate, and nothing has written them since then."""
        grads = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        left = self._left_versions
        return bool(grads) and all(
            self.is_estimate(i) and local(grad)._version == left[i] for i, grad in grads.items()
        )

    def is_estimate(self, i: int) -> bool:
        """Whether the gradient of parameter ``i`` holds that and nothing else."""
        estimate = self._estimates[i] if self._estimates else None
        return estimate is not None and estimate() is self.parameters[i].grad and i not in self._elsewhere

    def check_estimates(self, parameters: Iterable[Tensor], names: Sequence[str]) -> None:
        """Raise if the gradient of one of these parameters is neither None, nor 0, nor its estimate."""
        own = set(map(id, parameters))
        for i, (p, name) in enumerate(zip(self.parameters, names, strict=True)):
            if p.grad is None or id(p) not in own or self.is_estimate(i):
                continue
            if bool(local(p.grad).any()):
                raise RuntimeError(
                    f"the gradient of {name} comes from a backward outside of the passes of fogzo, and step"
                    " would train plain straight-through: give step a closure, or run the passes by"
                    " fogzo.run(closure) or fogzo.probes()"
                )

    def check_fresh(self, names: Sequence[str]) -> None:
        """Raise unless the gradients are None or 0, with one wait for the device; a capture does not look."""
        if not capturing():
            grads = {i: local(p.grad) for i, p in enumerate(self.parameters) if p.grad is not None}
            if grads and not all_zero([*grads.values()]):
                i = next(i for i, grad in grads.items() if bool(grad.any()))
                what = ESTIMATED if self.is_estimate(i) else ELSEWHERE.format(names[i])
                raise RuntimeError(
                    f"model.zero_grad() (or the optimizer's) must be called before the next step: {what}"
                )
        self._estimates.clear()
        self._elsewhere.clear()
        self._read = []
        if self._lost is not None:
            self._lost.remove()
            self._lost = None

    # ---- between the passes and the estimate

    def lose(self, parameters: Iterable[Tensor]) -> None:
        """The step is lost: no optimizer is to take its gradients of these parameters, until the next step."""
        if self._lost is None:
            self._lost = keep_from_optimizers(parameters)
            if self._lost is not None:
                weakref.finalize(self, self._lost.remove)

    def note(self, rows: Sequence[Tensor] | None) -> None:
        """From here to :meth:`check_unedited` nobody is to change these gradients, or replace any.

        None allows edits in place: guided noise is in proportion to what they leave.
        """
        self._read = [p.grad for p in self.parameters if p.grad is not None]
        self._versions = [] if rows is None else versions(self._read)
        self._bits = bits(rows) if rows and not capturing() else None

    def check_unedited(self, rows: Sequence[Tensor] | None) -> None:
        """Raise if a gradient is another tensor, or has another version or other bits than it had.

        Bits on a GPU are compared there, for :attr:`edited`: to look would wait for the probes.
        """
        read, self._read = self._read, []
        now = [p.grad for p in self.parameters if p.grad is not None]
        same = len(now) == len(read) and all(map(operator.is_, now, read))
        if rows is not None:
            same = same and versions(now) == self._versions
        if same and rows is not None and self._bits is not None and not capturing():
            if seen_at_once(self._bits):
                same = torch.equal(self._bits, bits(rows))
            else:
                self.edited = (self._bits != bits(rows)).any()
        if not same:
            raise RuntimeError(EDITED)

    def raise_if_edited(self, edited: bool) -> None:
        """Raise if the device has told by now that somebody edited the gradients of the last step."""
        self.edited = None
        if edited:
            raise RuntimeError(f"{EDITED} (of the step before this one, which moved no weights)")


VERSION = operator.attrgetter("_version")


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """The versions of tensors, or of the parts that this process has."""
    return [*map(VERSION, tensors if {*map(type, tensors)} <= {Tensor} else map(local, tensors))]


def seen_at_once(tensor: Tensor) -> bool:
    """Whether to look at a tensor waits for nothing."""
    return tensor.device.type == "cpu"


@torch.no_grad()
def all_zero(tensors: list[Tensor]) -> bool:
    """Whether every element of tensors on one device is 0, in one wait for it."""
    # few launches give all first norms, and no small element underflows in these
    return not bool(torch.stack(torch._foreach_norm(tensors, 1)).any())


class Leftovers:
    """Gradients of tensors as the gradient pass left them, which no probe may change."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._left = [(p, p.grad, local(p.grad)._version) for p in tensors if p.grad is not None]

    def check(self, who: str) -> None:
        """Raise if gradients are gone or were written. ``who``: what ran since then."""
        if any(p.grad is not grad or local(grad)._version != version for p, grad, version in self._left):
            raise RuntimeError(
                f"zero_grad must be called before a step, not in the closure, which every pass runs: {who}"
                " cleared or changed the gradients that the gradient pass had left"
            )
