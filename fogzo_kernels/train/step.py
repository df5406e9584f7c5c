"""One step of the estimator: its passes, and all that lives from the first of them to the estimate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..functional import estimate_gradient_, guide_norm, guide_sumsq, perturb_quantize_
from ..nn.sharded import local
from ..ops import arguments
from .gradients import Gradients, Source
from .losses import Estimate, PassLosses
from .outside import Prints, changed, global_generators
from .reads import check_reads
from .replay import ReplayState, Snapshot, capturing
from .sharding import Sharding
from .together import Together, set_alphas, together
from .weights import QuantizedWeight

NOT_REPLAYED = (
    "a pass of a step changes {}, and so every pass sees something else: the difference of two losses is then"
    " that of two batches, masks or counts. Give generators and objects with a state to"
    " Fogzo(..., replay=[...]), and move the rest out of the pass; fogzo.check(closure) looks closer"
)
T = TypeVar("T")
#: Gradients, each with the version of its data.
Versions = list[tuple[Tensor, int]]


def warn_of(names: list[str]) -> None:
    """Of what passes do not see alike, if there is any."""
    if names:
        warnings.warn(NOT_REPLAYED.format(" and ".join(names)), stacklevel=3)


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

    def __enter__(self) -> Pass:
        if self._step is None or self._step.active or self.done:
            raise RuntimeError("a pass must be entered once, in the order that probes() gives")
        self._step.enter(self)
        self._step.gradients.come_from = Source.PASS
        self._grad_mode = torch.is_grad_enabled()
        torch.set_grad_enabled(self.sign == 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._step is not None
        assert self._grad_mode is not None
        torch.set_grad_enabled(self._grad_mode)
        self._grad_mode = None
        self._step.gradients.come_from = Source.OUTSIDE
        self._step.exit(self, failed=kind is not None)
        self.done = kind is None


class Step:
    """A step from its first pass to its end; whoever holds it drops it then, and it holds nothing itself.

    Args:
        weights: the quantized weights of the model.
        modules: all of the model, as it is in this step.
        pairs: of probes, n; 0 for a plain straight-through step.
        forward: whether differences are forward ones: of probes, only those with + are run.
        share: of the micro-batches, those that probes run.
        both: whether the probes of a direction are written at once, the second one into memory that is taken
            for it: there is room, as activations are kept in the gradient pass alone.
        noise: which noise and how much, as the ops take it: seed, step, one_minus_beta, epsilon_scale.
        counters: int64, (3,), on the weights' device; the estimate adds to them (contract section 5).
        replay: of the model.
        gradients: of the weights, watched.
        watched: whether to look for reads of the weights beside their modules.
        compared: whether to look for what passes do not see alike.
        counted: whether to count the codes that differ between probes.
        backend: of the ops.
        sharding: of the model.
        reduce: reduces the losses over devices, in place.
        over: called once with this step when it has ended, and with whether its estimate was made.
    """

    def __init__(
        self, weights: list[QuantizedWeight], *, modules: Sequence[nn.Module], pairs: int,
        forward: bool, share: float, both: bool, noise: dict[str, Any], counters: Tensor, replay: ReplayState,
        gradients: Gradients, watched: bool, compared: bool, counted: bool,
        backend: str | None, sharding: Sharding, reduce: Callable[[Tensor], None],
        over: Callable[[Step, bool], None],
    ) -> None:  # fmt: skip
        signs = [(i, sign) for i in range(pairs) for sign in ((1,) if forward else (1, -1))]
        self.passes = [Pass(self, 0, 0), *(Pass(self, i, sign) for i, sign in signs)]
        self.pairs, self.forward, self.share, self.both = pairs, forward, share, both
        self._minus: list[tuple[QuantizedWeight, Tensor]] = []  # with ``both``, the rows of the next pass
        self.batches: int | None = None  # micro-batches of the gradient pass, once batches() was asked for
        self.shared = 0  # how many of them probes run, too
        self.watched, self.compared, self.counted = watched, compared, counted
        self.changes: Tensor | None = None  # the share of codes that differ, 0-dim, where it was counted
        self.active = False  # whether a pass is entered
        self.calls: list[Together] = []  # after the gradient pass, of the weights that take part
        self.losses = PassLosses(pairs, counters.device)
        self.found: Estimate | None = None  # once it was collected
        self._norm: Tensor | None = None
        self._guides: Versions = []  # the gradients, as the norm saw them
        self._shared_generators: Prints = {}  # as the gradient pass found them
        self._before: Snapshot | None = None  # of the gradient pass
        self._after: Snapshot | None = None
        self.weights, self.noise, self._counters = weights, noise, counters
        self._modules = modules
        self._noise = drawn(noise)
        self._replay, self.gradients, self._backend = replay, gradients, backend
        self._sharding, self._reduce, self._over = sharding, reduce, over

    @property
    def complete(self) -> bool:
        """Whether all passes were run."""
        return all(one.done for one in self.passes)

    def end(self, estimated: bool = False) -> None:
        """The step is over. A pass that the caller still holds does not keep it."""
        if self.passes[0]._step is None:
            return
        for one in self.passes:
            one._step = None
        self._over(self, estimated)

    # ---- passes

    def batches_of(self, one: Pass, count: int) -> int:
        """How many of a step's micro-batches a pass runs."""
        if one.sign == 0:
            if one.losses or not count:
                raise RuntimeError(f"probe.batches() must come first in a pass and have a batch, got {count}")
            self.batches, self.shared = count, math.ceil(self.share * count)
        elif count != self.batches:
            raise RuntimeError(
                f"micro_batches must be those of the gradient pass in every pass, got {count} of {self.batches}"
            )
        return self.shared if one.sign else count

    @torch.no_grad()
    def enter(self, one: Pass) -> None:
        torch.clear_autocast_cache()
        try:
            if one.sign == 0:
                self.gradients.check_fresh([w.name for w in self.weights])
                self._before = self._replay.save(self._modules)
                if self.compared:
                    self._shared_generators = global_generators(self._replay.others)
                held = set_alphas(self.weights, self._backend)
                if held is not None:
                    self._counters[2] += held
                self.calls = together(self.weights, self._backend)
                for call in self.calls:
                    call.quantize()
                    for w, rows in zip(call.weights, call.memory, strict=True):
                        w.use(rows, probe=False, deferred=w.unwatched)
            else:
                assert self._before is not None
                probes = self._write_probes(one)
                self._replay.load(self._before)
                for w, rows in probes:
                    w.use(rows, probe=True)
        except BaseException:
            for w in self.weights:
                w.release()
            self._sharding.between_passes()
            if self._after is not None:
                self._replay.load(self._after)
            self.end()
            raise
        self.active = True

    @torch.no_grad()
    def exit(self, one: Pass, failed: bool) -> None:
        self.active = False
        ok = False
        try:
            torch.clear_autocast_cache()
            for w in self.weights:
                w.release()
            self._sharding.between_passes(failed)
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
            return
        assert self._before is not None
        if failed:
            self._replay.load(self._before)
        elif self.pairs:
            if self.compared:
                warn_of(changed(self._shared_generators, global_generators(self._replay.others)))
            self._after = self._replay.save(self._modules)
            self._replay.compare(self._before, self._after)
        self.calls = [guided for call in self.calls for guided in call.guided()]
        received = self.gradients.received
        due = {w for i, w in enumerate(self.weights) if w.deferred and i in received}
        for call in self.calls:
            for is_due, alike in call.split(due.__contains__):
                if is_due:
                    alike.finish_gradients()
        self._sharding.reduce_inputs()
        if self.pairs and not failed:
            self._read_guide()

    def _read_guide(self) -> None:
        """The norm over all gradients."""
        if not self.calls:
            raise RuntimeError(
                "the gradient pass must leave a gradient for a quantized weight: is it the model of this Fogzo"
                " that the loss depends on?"
            )
        self._guides = versions(self.weights)
        alone = len(self.calls) == 1 and not self._sharding.groups
        norm = guide_norm if alone else guide_sumsq
        found = [norm(c.grads, c.alphas, grid=c.kind.grid, backend=c.backend) for c in self.calls]
        self._norm = found[0] if alone else self._sharding.summed(torch.stack(found).sum()).sqrt().float()

    def _write_probes(self, one: Pass) -> list[tuple[QuantizedWeight, Tensor]]:
        """The weights that take part, and the rows that they run this probe with.

        Codes and values are calls of their own.
        """
        assert self._norm is not None
        found, self._minus = self._minus, []
        if found:
            return found
        for call in self.calls:
            for codes, alike in call.split(lambda w: w.takes_codes):
                weights = alike.weights
                out = [w.code_memory() for w in weights] if codes else alike.memory
                other = [torch.empty_like(rows) for rows in out] if self.both else None
                perturb_quantize_(
                    out if one.sign > 0 else other, other if one.sign > 0 else out, alike.latents, alike.grads,
                    alike.alphas, self._norm, direction=one.direction, **self.options(alike),
                )  # fmt: skip
                found += zip(weights, out, strict=True)
                self._minus += zip(weights, other or (), strict=bool(other))
        return found

    # ---- the estimate: collect, then replace_gradients or an optimizer's own update, then finish

    def collect(self) -> Estimate:
        """Losses and norm; with ``torch.distributed``, losses reduced over the group."""
        try:
            self._check_complete()
        except RuntimeError:
            self.end()
            raise
        self._reduce(self.losses.all)
        factor = 1.0
        if self.batches is None:
            self.losses.base.copy_(self.losses.all[0])
        else:
            factor = self.batches / self.shared
        if self.compared and self.pairs and not capturing():
            self.losses.warn_of_scales()
        if self.counted and self._norm is not None and not capturing():
            self.changes = self._code_changes(self._norm)
        self.found = self.losses.collected(self.forward, factor, self._norm)
        return self.found

    @torch.no_grad()
    def _code_changes(self, norm: Tensor) -> Tensor:
        """The share of codes that differ between the first two probes, with memory for one weight's."""
        differ, total = torch.zeros((), dtype=torch.int64, device=norm.device), 0
        for call in self.calls:
            for i in range(len(call.weights)):
                one = call.part([i])
                plus, minus = (torch.empty_like(one.grads[0], dtype=torch.int8) for _ in "+-")
                perturb_quantize_(
                    plus, minus, one.latents, one.grads, one.alphas, norm, direction=0, **self.options(one)
                )
                differ += (plus != minus).sum()
                total += plus.numel()
        return differ.float() / total  # an int by an int would have the default dtype

    def _check_complete(self) -> None:
        given = [one.losses for one in self.passes]
        if not all(given):
            raise RuntimeError("every pass must call probe.backward(loss)")
        first, wanted = (given[0], given[0]) if self.batches is None else (self.batches, self.shared)
        odd = [n for n in given[1:] if n != wanted]
        if odd or given[0] != first:
            raise RuntimeError(
                f"every pass must give a loss for each of its micro-batches, got {given[0]} in the gradient"
                f" pass and {odd[0] if odd else wanted} in a probe"
            )
        if self._norm is not None and not same(self._guides, versions(self.weights)):
            raise RuntimeError(
                ".grad must not change between the passes and the estimate; to unscale or clip it, call"
                " estimate_() first"
            )

    def options(self, call: Together) -> dict[str, Any]:
        """What perturbation and estimate must agree on, as the ops take it."""
        return {
            "grid": call.kind.grid,
            "straight_through": call.kind.straight_through,
            "transform": call.kind.transform,
            "backend": call.backend,
            "tensor_ids": call.tensor_ids,
            "layouts": call.layouts,
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
        for i, call in enumerate(self.calls):
            with self.counting(first=i == 0) as counters:
                estimate_gradient_(
                    call.grads, estimate.losses_plus, estimate.losses_minus, call.alphas, estimate.norm,
                    counters=counters, **self.options(call),
                )  # fmt: skip
            for w, grad in zip(call.weights, call.grads, strict=True):
                if w.still_row is not None:
                    grad[w.still_row] = 0

    def finish(self) -> None:
        """The step is done."""
        self.end(estimated=True)


def drawn(noise: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the noise as the tensors that ops take them by, made once a step, not for each call."""
    as_tensor = {"seed": arguments.seed, "step": arguments.step, "one_minus_beta": arguments.one_minus_beta}
    return {n: as_tensor[n](x) if n in as_tensor and x is not None else x for n, x in noise.items()}


def versions(weights: list[QuantizedWeight]) -> Versions:
    grads = [w.parameter.grad for w in weights]
    return [(g, local(g)._version) for g in grads if g is not None]


def same(one: Versions, other: Versions) -> bool:
    return len(one) == len(other) and all(g is h and v == w for (g, v), (h, w) in zip(one, other, strict=True))
