"""What a closure may do: differentiate, which probes then have autograd for; and what it may not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...nn.view import WeightView
from ..calls import hold_quantized, set_alphas
from ..passes import asks_for_autograd
from ..replay import ReplayState, Snapshot
from ..sharding import Sharding
from ..step import Step
from .closure import ATTRIBUTE, BUFFERS, Prints, changed, global_generators, seen_by

ALIKE = 1e-5  # of a loss: more than the order of additions makes of it, less than another batch or mask


class Closures:
    """Runs the closures of an estimator's steps, in their passes and beside them.

    Args:
        weights: the quantized weights of the model.
        replay, sharding: of the model.
        backend: of the ops.
    """

    def __init__(
        self, weights: list[WeightView], replay: ReplayState, sharding: Sharding, backend: str | None
    ) -> None:
        self._weights, self._replay, self._sharding, self._backend = weights, replay, sharding, backend
        parallel = [m for m in replay.model.modules() if isinstance(m, DistributedDataParallel)]
        self._parallel = parallel[0] if parallel else None
        self._differentiates = False  # whether one did

    def loss(self, closure: Callable[[], Tensor], start: Snapshot | None) -> Tensor:
        """Runs the closure and returns its loss, with autograd where a first run without it fails.

        Args:
            start: what passes begin with, for that second run.
        """
        if torch.is_grad_enabled():
            return closure()
        if not self._differentiates:
            try:
                return closure()
            except RuntimeError as error:
                if start is None or not asks_for_autograd(error):
                    raise
            self._replay.load(start)
        # no gradient is exchanged, as nobody goes back from this loss
        alone: AbstractContextManager[None] = self._parallel.no_sync() if self._parallel else nullcontext()
        with torch.enable_grad(), alone:
            found = closure().detach()
        self._differentiates = True
        return found

    def losses(
        self, closure: Callable[[], Tensor], start: Snapshot, with_autograd: Sequence[bool]
    ) -> Iterator[float]:
        """Yields a loss for each run of the closure with Q(theta). Each run begins with ``start``.

        The caller restores generators and buffers afterwards.
        """
        try:
            for autograd in with_autograd:
                self._replay.load(start)
                self._sharding.between_passes()
                hold_quantized(self._weights, self._backend)
                torch.clear_autocast_cache()
                with torch.set_grad_enabled(autograd):
                    loss = float(self.loss(closure, start).detach())
                yield loss
        finally:
            for w in self._weights:
                w.release()
            self._sharding.between_passes()

    def differ(self, closure: Callable[[], Tensor], start: Snapshot, end: Snapshot) -> bool:
        """Whether two more runs with the same weights fail, or give different losses.

        Args:
            start, end: of the gradient pass.
        """
        try:
            one, other = self.losses(closure, start, (False, False))
        except Exception:  # an iterator that has come to its end, say; a probe will say so
            return True
        finally:
            self._replay.load(end)
        return not (math.isclose(one, other, rel_tol=ALIKE) or (math.isnan(one) and math.isnan(other)))

    # ---- what passes do not see alike

    def seen(self, closure: Callable[[], Tensor], fogzo: object) -> Prints:
        """What the closure's variables are worth."""
        return seen_by(closure, [fogzo, self._replay.model, *self._replay.others], self._replay.model)

    def unlike(
        self, closure: Callable[[], Tensor], names: list[str], step: Step, agree: Callable[[Tensor], None]
    ) -> list[str]:
        """Returns the names on which the loss may depend, of names that the gradient pass changed.

        The loss does not depend on a sum of losses for a log, say. All processes of a group call this.
        """
        found = torch.tensor(bool(names), dtype=torch.int32, device=self._weights[0].parameter.device)
        agree(found)
        start, end = step.snapshots
        if not found or step.lost or start is None or end is None:
            return []
        matters = self.differ(closure, start, end)
        step.check_left("a second run of the closure")
        return [name for name in names if matters or name.startswith(BUFFERS)]

    def check(self, closure: Callable[[], Tensor], fogzo: object) -> list[str]:
        """What three runs with the same weights do not see alike, a sentence each."""

        def seen() -> Prints:
            return global_generators(self._replay.others) | self.seen(closure, fogzo)

        losses, found = [], list[str]()
        start = self._replay.save()
        try:
            set_alphas(self._weights, self._backend)
            before: Prints = {}
            for loss in self.losses(closure, start, (True, False, False)):
                losses.append(loss)
                now = seen()
                found = changed(before, now)  # after the last run: the first may make what others find
                before = now
        finally:
            self._replay.load(start)
        alike = losses[0] == losses[1] == losses[2]
        said = [f"{name} is changed by a pass" for name in found if not (alike and name.startswith(ATTRIBUTE))]
        if not alike:
            said.append(f"three passes with the same weights gave the losses {', '.join(map(str, losses))}")
        return said
