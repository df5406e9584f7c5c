"""Closures: runs the closure of a step in its passes, and again to tell whether its changes matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..calls import run_quantized
from ..replay import Snapshot
from ..run import Run
from ..step import Step
from .fingerprints import ATTRIBUTE, BUFFERS, Prints, changed, global_generators, seen_by
from .graph_reads import asks_for_autograd

Closure = Callable[[], Tensor]
ALIKE = 1e-5  # of a loss: more than the order of additions makes of it, less than another batch or mask


class Closures:
    """Runs the closures of an estimator's steps."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._differentiates = False  # whether a closure did

    def loss(self, closure: Closure, start: Snapshot) -> Tensor:
        """Return the closure's loss; where it fails without autograd, that of a run with it from ``start``."""
        if torch.is_grad_enabled():
            return closure()
        if not self._differentiates:
            try:
                return closure()
            except RuntimeError as error:
                if not asks_for_autograd(error):
                    raise
            self._run.replay.load(start)
        with torch.enable_grad(), self._run.peers.no_sync():  # as nobody goes back from this loss
            loss = closure().detach()
        self._differentiates = True
        return loss

    def seen(self, closure: Closure, fogzo: object) -> Prints:
        """Return what the closure's variables are worth. The closure may change its estimator."""
        replay = self._run.replay
        return seen_by(closure, [fogzo, replay.model, *replay.others], replay.model)

    def names_that_matter(self, closure: Closure, names: list[str], step: Step) -> list[str]:
        """Return which names that the gradient pass changed matter to the loss. All processes call this."""
        flag = torch.tensor(bool(names), dtype=torch.int32, device=step.run.counters.device)
        self._run.peers.agree(flag)
        if not flag or step.lost:
            return []
        matters = self._losses_differ(closure, *step.snapshots)
        step.leftovers.check("a second run of the closure")
        return [name for name in names if matters or name.startswith(BUFFERS)]

    def check(self, closure: Closure, fogzo: object) -> list[str]:
        """Return what three runs with the same weights do not see alike, a sentence each."""
        replay, losses, names = self._run.replay, list[float](), list[str]()
        start = replay.save()
        try:
            self._run.prepared.update()
            self._run.prepared.set_alphas()
            before: Prints = {}
            for loss in self._losses(closure, start, (True, False, False)):
                losses.append(loss)
                now = global_generators(replay.others) | self.seen(closure, fogzo)
                names = changed(before, now)  # after the last run: the first may make what others find
                before = now
        finally:
            replay.load(start)
        alike = losses[0] == losses[1] == losses[2]
        said = [f"{name} is changed by a pass" for name in names if not (alike and name.startswith(ATTRIBUTE))]
        if not alike:
            said.append(f"three passes with the same weights gave the losses {', '.join(map(str, losses))}")
        return said

    def _losses_differ(self, closure: Closure, start: Snapshot, end: Snapshot) -> bool:
        """Return whether two more runs from ``start`` fail, or give different losses."""
        try:
            a, b = self._losses(closure, start, (False, False))
        except Exception:  # an iterator that has come to its end, say; a probe will say so
            return True
        finally:
            self._run.replay.load(end)
        return not (math.isclose(a, b, rel_tol=ALIKE) or (math.isnan(a) and math.isnan(b)))

    def _losses(self, closure: Closure, start: Snapshot, with_autograd: Sequence[bool]) -> Iterator[float]:
        """Yield a loss for each run with Q(theta) from ``start``. The caller restores the state."""
        run = self._run
        try:
            for autograd in with_autograd:
                run.replay.load(start)
                run.peers.between_passes()
                run_quantized(run.prepared)
                torch.clear_autocast_cache()
                with torch.set_grad_enabled(autograd):
                    loss = float(self.loss(closure, start).detach())
                yield loss
        finally:
            run.prepared.modules.release()
            run.peers.between_passes()
