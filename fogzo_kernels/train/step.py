"""One step of the estimator: its passes, and all that lives from the first of them to the estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import estimate_gradient_, guide_norm, guide_sumsq, perturb_quantize_
from .reads import check_reads
from .replay import ReplayState, Snapshot, capturing
from .weights import Key, QuantizedWeight, set_alphas

#: Gradients, each with the version of its data.
Versions = list[tuple[Tensor, int]]


class Estimate(NamedTuple):
    """What a step's passes found."""

    loss: Tensor  # of the gradient pass, 0-dim float32
    losses_plus: Tensor  # float32, (n,)
    losses_minus: Tensor  # float32, (n,)
    norm: Tensor | None  # N, 0-dim float32; None where there were no probes


class Pass:
    """One forward of a step: the gradient pass (``sign`` 0), or a probe at +eps or -eps."""

    def __init__(self, step: Step, direction: int, sign: int) -> None:
        self.direction, self.sign = direction, sign
        self.loss: Tensor | None = None  # sum of the losses so far, 0-dim float32
        self.done = False
        self._step: Step | None = step  # None when the step has ended
        self._mode: Any = None

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's loss to the pass; in the gradient pass also back-propagate it.

        Give every pass the same losses in the same order, scaled alike (by 1/K for K
        micro-batches, or by a gradient scaler).
        """
        if self._mode is None or self._step is None:
            raise RuntimeError("probe.backward must be called inside `with probe:`")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss must be a tensor of one element, got {what}")
        if self.sign == 0:
            if self._step.watched:
                check_reads(loss, self._step.weights)
            loss.backward()
        value = loss.detach().reshape(())
        if self.loss is None:
            self.loss = self._step.slot(self).copy_(value)
        else:
            self.loss.add_(value)

    def __enter__(self) -> Pass:
        if self._step is None or self._step.active or self.done:
            raise RuntimeError("a pass must be entered once, in the order that probes() gives")
        self._step.enter(self)
        self._mode = torch.enable_grad() if self.sign == 0 else torch.no_grad()
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._step is not None
        self._mode.__exit__(kind, value, traceback)
        self._mode = None
        self._step.exit(self, failed=kind is not None)
        self.done = kind is None


class Step:
    """A step from its first pass to its end; whoever holds it drops it then, and it holds nothing itself.

    Args:
        weights: the quantized weights of the model.
        pairs: of probes; 0 for a plain straight-through step.
        noise: which noise and how much, as the ops take it: seed, step, one_minus_beta, epsilon_scale.
        counters: int64, (3,), on the weights' device; the estimate adds to them (contract section 5).
        replay: of the model.
        used: gradients that an earlier step has used up; emptied when the gradient pass begins.
        watched: whether to look for reads of the weights beside their modules.
        backend: of the ops.
        reduce: reduces the losses over devices, in place.
        over: called once with this step when it has ended, and with the gradients that it used, or with
            None if a pass failed.
    """

    def __init__(
        self, weights: list[QuantizedWeight], *, pairs: int, noise: dict[str, Any], counters: Tensor,
        replay: ReplayState, used: Versions, watched: bool, backend: str | None,
        reduce: Callable[[Tensor], None], over: Callable[[Step, Versions | None], None],
    ) -> None:  # fmt: skip
        signs = [(i, sign) for i in range(pairs) for sign in (1, -1)]
        self.passes = [Pass(self, 0, 0), *(Pass(self, i, sign) for i, sign in signs)]
        self.pairs = pairs
        self.watched = watched
        self.active = False  # whether a pass is entered
        self.groups: dict[Key, list[QuantizedWeight]] = {}  # the weights that take part
        self._losses = torch.empty(1 + 2 * pairs, device=counters.device)
        self._norm: Tensor | None = None
        self._guides: Versions = []  # the gradients, as the norm saw them
        self._before: Snapshot | None = None  # of the gradient pass
        self._after: Snapshot | None = None
        self.weights, self._noise, self._counters = weights, noise, counters
        self._replay, self._used, self._backend = replay, used, backend
        self._reduce, self._over = reduce, over

    @property
    def complete(self) -> bool:
        """Whether all passes were run."""
        return all(one.done for one in self.passes)

    def end(self, used: Versions | None = None) -> None:
        """The step is over. A pass that the caller still holds does not keep it."""
        if self.passes[0]._step is None:
            return
        for one in self.passes:
            one._step = None
        self._over(self, used)

    # ---- passes

    def slot(self, one: Pass) -> Tensor:
        """Where the pass puts its loss: losses of + and of - lie in a row, as the ops take them."""
        if one.sign == 0:
            return self._losses[0]
        return self._losses[1 + one.direction + (self.pairs if one.sign < 0 else 0)]

    def enter(self, one: Pass) -> None:
        torch.clear_autocast_cache()
        try:
            if one.sign == 0:
                self._check_fresh()
                self._before = self._replay.save()
                held = set_alphas(self.weights, self._backend)
                if held is not None:
                    self._counters[2] += held
                for w in self.weights:
                    # a graph's replay could not see that a weight was set in between
                    w.recall(kept=not capturing())
            else:
                assert self._before is not None
                self._write_probes(one)
                self._replay.load(self._before)
                for weights in self.groups.values():
                    for w in weights:
                        w.use(w.memory())
        except BaseException:
            for w in self.weights:
                w.release()
            if self._after is not None:
                self._replay.load(self._after)
            self.end()
            raise
        self.active = True

    def exit(self, one: Pass, failed: bool) -> None:
        self.active = False
        ok = False
        try:
            torch.clear_autocast_cache()
            for w in self.weights:
                w.release()
            self._restore(one, failed)
            ok = not failed
        finally:
            if not ok:
                self.end()

    def _restore(self, one: Pass, failed: bool) -> None:
        """Buffers and generators as after the gradient pass, or as before it if it is that which failed."""
        if one.sign:
            assert self._after is not None
            self._replay.load(self._after)
        elif failed:
            assert self._before is not None
            self._replay.load(self._before)
        elif self.pairs:
            assert self._before is not None
            self._after = self._replay.save()
            self._replay.compare(self._before, self._after)
            self._read_guide()

    def _check_fresh(self) -> None:
        used = {id(g): version for g, version in self._used}
        if any(used.get(id(g)) == version for g, version in versions(self.weights)):
            raise RuntimeError(
                "model.zero_grad() (or the optimizer's) must be called before the next step:"
                " .grad still holds the last estimate"
            )
        self._used.clear()

    @torch.no_grad()
    def _read_guide(self) -> None:
        """Group the weights that have a gradient, and take the norm over all of them."""
        for w in self.weights:
            grad = w.guide()
            if grad is None:  # took no part in the forward: no guide, no noise, no estimate
                continue
            self.groups.setdefault(w.key(grad, self._backend), []).append(w)
        if not self.groups:
            raise RuntimeError("the gradient pass must leave a gradient for a quantized weight")
        self._guides = versions(self.weights)
        if len(self.groups) == 1:
            ((key, weights),) = self.groups.items()
            self._norm = guide_norm(grads_of(weights), alphas_of(weights), grid=key.grid, backend=key.backend)
            return
        sums = [
            guide_sumsq(grads_of(weights), alphas_of(weights), grid=key.grid, backend=key.backend)
            for key, weights in self.groups.items()
        ]
        self._norm = torch.stack(sums).sum().sqrt().float()

    def _write_probes(self, one: Pass) -> None:
        assert self._norm is not None
        for key, weights in self.groups.items():
            out = [w.memory() for w in weights]
            perturb_quantize_(
                out if one.sign > 0 else None, None if one.sign > 0 else out,
                [w.latent for w in weights], grads_of(weights), alphas_of(weights), self._norm,
                direction=one.direction, **self.options(key, weights),
            )  # fmt: skip

    # ---- the estimate: collect, then replace_gradients or an optimizer's own update, then finish

    def collect(self) -> Estimate:
        """Losses and norm; with ``torch.distributed``, losses reduced over the group."""
        if any(one.loss is None for one in self.passes):
            raise RuntimeError("every pass must call probe.backward(loss)")
        if self._norm is not None and not same(self._guides, versions(self.weights)):
            raise RuntimeError(
                ".grad must not change between the passes and the estimate; to unscale or clip it, call"
                " estimate_() first"
            )
        self._reduce(self._losses)
        losses, n = self._losses, self.pairs
        return Estimate(losses[0], losses[1 : 1 + n], losses[1 + n :], self._norm)

    def options(self, key: Key, weights: list[QuantizedWeight]) -> dict[str, Any]:
        """What perturbation and estimate must agree on, as the ops take it."""
        return {
            "grid": key.grid,
            "straight_through": key.straight_through,
            "transform": key.transform,
            "backend": key.backend,
            "tensor_ids": [w.tensor_id for w in weights],
            **self._noise,
        }

    @contextmanager
    def counting(self, first: bool) -> Iterator[Tensor]:
        """Counters for one of a step's calls: losses and norm are the same for all of them."""
        counters = self._counters if first else torch.zeros_like(self._counters)
        yield counters
        if not first:
            self._counters[2] += counters[2]

    def replace_gradients(self, estimate: Estimate) -> None:
        """Replace the ``.grad`` of the weights that take part by the estimate; without probes it stays."""
        if estimate.norm is None:
            return
        for i, (key, weights) in enumerate(self.groups.items()):
            with self.counting(first=i == 0) as counters:
                estimate_gradient_(
                    grads_of(weights), estimate.losses_plus, estimate.losses_minus, alphas_of(weights),
                    estimate.norm, counters=counters, **self.options(key, weights),
                )  # fmt: skip
            for w, grad in zip(weights, grads_of(weights), strict=True):
                if w.still_row is not None:
                    grad[w.still_row] = 0

    def finish(self) -> None:
        """The step is done; the gradients that it used must not become part of the next guide."""
        self.end(versions(self.weights))


def alphas_of(weights: list[QuantizedWeight]) -> list[Tensor]:
    return [w.alpha for w in weights]


def grads_of(weights: list[QuantizedWeight]) -> list[Tensor]:
    """Rows of the gradients."""
    grads = [w.guide() for w in weights]
    if any(g is None for g in grads):
        raise RuntimeError(".grad must not be cleared between the passes of a step")
    return [g for g in grads if g is not None]


def versions(weights: list[QuantizedWeight]) -> Versions:
    grads = [w.parameter.grad for w in weights]
    return [(g, g._version) for g in grads if g is not None]


def same(one: Versions, other: Versions) -> bool:
    return len(one) == len(other) and all(g is h and v == w for (g, v), (h, w) in zip(one, other, strict=True))
