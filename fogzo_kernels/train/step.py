"""One step of the estimator: its passes, and all that lives from the first of them to the estimate."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import estimate_gradient_, perturb_quantize_
from ..nn.sharded import local
from ..ops import arguments
from .gradients import Gradients
from .losses import Estimate, PassLosses
from .lost import look
from .outside import Prints, changed, global_generators
from .passes import Pass as Pass
from .received import finish_what_is_there, received
from .replay import ReplayState, Snapshot, capturing
from .sharding import Sharding
from .together import Together, set_alphas, together
from .weights import QuantizedWeight

NOT_REPLAYED = (
    "a pass of a step changes {}, and so every pass sees something else: the difference of two losses is then"
    " that of two batches, masks or counts. Give generators and objects with a state to"
    " Fogzo(..., replay=[...]), and move the rest out of the pass; fogzo.check(closure) looks closer"
)


def warn_of(names: list[str]) -> None:
    """Of what passes do not see alike, if there is any."""
    if names:
        warnings.warn(NOT_REPLAYED.format(" and ".join(names)), stacklevel=3)


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
        found_inf: float32, 0-dim, beside them: becomes 1 where the step is lost, else 0.
        replay: of the model.
        gradients: of the weights, watched.
        watched: whether to look for reads of the weights beside their modules.
        compared: whether to look for what passes do not see alike.
        counted: whether to count the codes that differ between probes.
        backend: of the ops.
        sharding: of the model.
        reduce: reduces the losses over devices, in place.
        agree: reduces int32 flags to the greatest of the group, in place.
        over: called once with this step when it has ended, and with whether its estimate was made.
    """

    def __init__(
        self, weights: list[QuantizedWeight], *, modules: Sequence[nn.Module], pairs: int,
        forward: bool, share: float, both: bool, noise: dict[str, Any], counters: Tensor, found_inf: Tensor,
        replay: ReplayState, gradients: Gradients, watched: bool, compared: bool, counted: bool,
        backend: str | None, sharding: Sharding, reduce: Callable[[Tensor], None],
        agree: Callable[[Tensor], None], over: Callable[[Step, bool], None],
    ) -> None:  # fmt: skip
        signs = [(i, sign) for i in range(pairs) for sign in ((1,) if forward else (1, -1))]
        self.passes = [Pass(self, 0, 0), *(Pass(self, i, sign) for i, sign in signs)]
        self.pairs, self.forward, self.share, self.both = pairs, forward, share, both
        self._minus: list[tuple[QuantizedWeight, Tensor]] = []  # with ``both``, the rows of the next pass
        self.batches: int | None = None  # micro-batches of the gradient pass, once batches() was asked for
        self.shared = 0  # how many of them probes run, too
        self.watched, self.compared, self.counted = watched, compared, counted
        self.changes: Tensor | None = None  # the share of codes that differ, 0-dim, where it was counted
        self.leaves: dict[int, Tensor] = {}  # with ``compared``, whose gradient the gradient pass makes
        self._left: list[tuple[Tensor, Tensor, int]] = []  # those gradients, and their versions
        self.active = False  # whether a pass is entered
        self.calls: list[Together] = []  # after the gradient pass, of the weights that take part
        self.losses = PassLosses(pairs, counters.device)
        self.found: Estimate | None = None  # once it was collected
        self.lost = False  # whether the loss or a gradient is not finite, and so nothing is to change
        self.unknown: Tensor | None = None  # the same, 0-dim bool, where only the device knows
        self._norm: Tensor | None = None
        self._shared_generators: Prints = {}  # as the gradient pass found them
        self._before: Snapshot | None = None  # of the gradient pass
        self._after: Snapshot | None = None
        self.weights, self.noise, self._counters, self._found_inf = weights, noise, counters, found_inf
        self._modules = modules
        self._noise = drawn(noise)
        self._replay, self.gradients, self._backend = replay, gradients, backend
        self._sharding, self._reduce, self._agree, self._over = sharding, reduce, agree, over

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
            if not failed:
                self.check_left("a probe")
            return
        assert self._before is not None
        if failed:
            self._replay.load(self._before)
        elif self.pairs:
            if self.compared:
                warn_of(changed(self._shared_generators, global_generators(self._replay.others)))
            self._after = self._replay.save(self._modules)
            self._replay.compare(self._before, self._after)
        if failed:
            finish_what_is_there(self.calls, self.losses.all.device)
            self._sharding.reduce_inputs()
        else:
            self._go_on()
            leaves = self.leaves | {id(p): p for p in self.parameters} if self.compared else {}
            self._left = [(p, p.grad, local(p.grad)._version) for p in leaves.values() if p.grad is not None]

    def check_left(self, who: str) -> None:
        """Raise if the gradients that the gradient pass left are not there any more, or were written."""
        if any(p.grad is not grad or local(grad)._version != version for p, grad, version in self._left):
            self.end()
            raise RuntimeError(
                f"zero_grad must be called before a step, not in the closure, which every pass runs: {who}"
                " cleared or changed the gradients that the gradient pass had left"
            )

    @property
    def snapshots(self) -> tuple[Snapshot | None, Snapshot | None]:
        """What the gradient pass began with, and what it left."""
        return self._before, self._after

    # ---- after the gradient pass

    @functools.cached_property
    def parameters(self) -> list[Tensor]:
        """All of the model, each once."""
        return list(dict.fromkeys(p for m in self._modules for p in m._parameters.values() if p is not None))

    def _go_on(self) -> None:
        """With the weights that take part, or not at all: the step is lost."""
        own = {w.parameter for w in self.weights}
        found = received(
            self.calls, self.weights, [p for p in self.parameters if p not in own], self.losses.all[0],
            pairs=self.pairs, sharding=self._sharding, agree=self._agree, edited=self.gradients.edited,
        )  # fmt: skip
        self.gradients.raise_if_edited(found.edited)
        self.calls, self._norm, self.unknown = found.calls, found.norm, found.unknown
        self._found_inf.fill_(float(found.lost))
        if found.lost:
            self.lose()
        if self.unknown is not None:
            self._lose_on_device(self.unknown)
        if self.pairs and not found.lost:
            self.gradients.note(self._guides)

    @property
    def _guides(self) -> list[Tensor]:
        return [grad for call in self.calls for grad in call.grads]

    def lose(self) -> None:
        """Nothing is to change: buffers are as before, gradients are left out, and no probe follows.

        Generators stay as they are: a closure that draws its batch would draw the same one for ever.
        """
        assert self._before is not None
        self.lost = True
        self._found_inf.fill_(1)
        for one in self.passes[1:]:
            if not one.done:
                one._step = None
                self.passes.remove(one)
        self._replay.load_buffers(self._before)
        self.gradients.lose(self.parameters)

    def _lose_on_device(self, lost: Tensor) -> None:
        """In a capture: where a replay finds a step that is lost."""
        assert self._before is not None
        self._found_inf.copy_(lost)
        self._replay.load_buffers(self._before, where=lost)
        if self.pairs:
            self._after = self._replay.save(self._modules)

    def look_at(self, grads: Sequence[Tensor], found_inf: Tensor | None) -> None:
        """Lose the step if gradients of parameters beside the model are not finite, or a scaler says so.

        A wait for the device, on which all processes of a group must agree, only if there is something to ask.
        """
        if self.lost or (not grads and found_inf is None):
            return
        device = self._counters.device
        lost = ~look(grads, device, zeros=False)[1]
        if found_inf is not None:
            lost |= found_inf.to(device, non_blocking=True).reshape(()) != 0
        flag = lost.int()
        self._agree(flag)
        if capturing():
            self.unknown = flag.bool() if self.unknown is None else self.unknown | flag.bool()
            self._lose_on_device(self.unknown)
        elif flag.item():
            self.lose()

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

    def collect(self, scale: Tensor | None = None) -> Estimate:
        """Losses and norm; with ``torch.distributed``, losses reduced over the group.

        Args:
            scale: of the losses that passes were given; who owns the gradients divides them by it.
        """
        if scale is not None:
            scale = scale.to(self._counters.device, non_blocking=True)
        if self.lost:
            none = self.losses.all[:0]
            loss = self.losses.all[0] if scale is None else self.losses.all[0] / scale
            self.found = Estimate(loss, none, none, None)
            return self.found
        try:
            self._check_complete()
        except RuntimeError:
            self.end()
            raise
        norm = self._norm
        if self.gradients.edited is not None:
            self.unknown = self.gradients.edited
        if norm is not None and self.unknown is not None:
            norm = norm.masked_fill(self.unknown, math.nan)
        if scale is not None:
            self.losses.all.div_(scale)
            norm = None if norm is None else norm / scale
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
        self.found = self.losses.collected(self.forward, factor, norm)
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
        if self.pairs:
            self.gradients.check_unedited(self._guides)

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
        """Replace the ``.grad`` of the weights that take part by the estimate; it stays without probes."""
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
    scalars = ("seed", "step", "one_minus_beta")
    return {n: arguments.scalar(n, x) if n in scalars and x is not None else x for n, x in noise.items()}
