"""Step: what happens from the first pass of a step to its estimate, in the order of reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import estimate_gradient_
from ..nn.view import WeightView
from ..nn.weights import Facts
from . import calls
from .calls import AlphaGradients, WeightGroup
from .guards.fingerprints import Prints, changed, global_generators, warn_of
from .guards.gradients import Leftovers, Source
from .guards.graph_reads import check_reads, leaves_of
from .guards.lost import look
from .passes import Pass
from .probes import Probes
from .replay import Snapshot, capturing
from .run import Run
from .stats import Estimate, warn_of_scales


class Step:
    """A step from its first pass to its end, when its run drops it. ``facts``: of the model now."""

    def __init__(self, run: Run, facts: Facts) -> None:
        self.run, self.facts = run, facts
        self.noise = run.next_noise()
        self.estimates = self.noise["one_minus_beta"] is not None  # else it is plain straight-through
        self.pairs = n = run.settings.directions if self.estimates else 0  # of probes
        # of the gradient pass, of + and of - probes: one tensor, which devices reduce in one call
        self._losses = losses = torch.zeros(1 + 2 * n, dtype=torch.float32, device=run.counters.device)
        probes = [(i, sign, losses[1 + i + n * (sign < 0)]) for i in range(n) for sign in (1, -1)]
        self.passes = [Pass(self, 0, 0, losses[0]), *(Pass(self, *probe) for probe in probes)]
        self.active = False  # whether a pass is entered
        self.lost = False  # whether the loss or a gradient is not finite, so that nothing is to change
        self.unknown: Tensor | None = None  # the same as 0-dim bool, where only the device knows
        self.groups: list[WeightGroup] = []  # after the gradient pass: the weights that take part, by calls
        self.wholes: list[WeightGroup] = []  # their parameters: one for all experts of a stack
        self.takes_part = False  # whether a weight of any process takes part
        self._part: list[int] = []  # for each place of a weight, whether it does; empty where nobody looked
        self.estimate: Estimate | None = None
        self._norm: Tensor | None = None
        self._probes: Probes | None = None  # of the direction
        self.taken_over = False  # whether a loop made the gradients, and no pass ran
        self.snapshots: list[Snapshot] = []  # before the gradient pass, and after it if probes follow
        self._compared = n > 0 and not run.passes_compared  # whether to look for what passes do not see alike
        self._generators: Prints = {}  # if so, others' generators as the gradient pass began
        self._leaves: dict[int, Tensor] = {}  # if so, whatever gets a gradient in the gradient pass
        self.leftovers = Leftovers(())  # these gradients as it left them

    @property
    def complete(self) -> bool:
        """Whether all passes were run."""
        return all(p.done for p in self.passes)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of the model, each once."""
        return self.facts.parameters

    def _snapshot(self) -> Snapshot:
        """Return the state of buffers and generators."""
        return self.run.replay.save(self.facts.buffers, self.facts.gpus)

    # ---- a pass

    @torch.no_grad()
    def enter(self, probe: Pass) -> None:
        """Let modules run with Q(w), or with a probe."""
        torch.clear_autocast_cache()
        run = self.run
        try:
            if probe.sign == 0:
                run.gradients.check_fresh([w.name for w in run.weights])
                self.snapshots.append(self._snapshot())
                if self._compared:
                    self._generators = global_generators(run.replay.others)
                prepared = run.prepared
                prepared.update()
                clamped = prepared.set_alphas()
                if clamped is not None:
                    run.counters[2] += clamped
                self.groups, self.wholes = prepared.groups, prepared.wholes
                for group in self.wholes:
                    group.quantize()
                prepared.use_quantized()
            else:
                if probe.sign > 0:
                    self._probes = self._written(probe.direction)
                assert self._probes is not None
                run.replay.load(self.snapshots[0])
                self._probes.use(probe.sign)
        except BaseException:
            self._release()
            if probe.sign:
                run.replay.load(self.snapshots[1])
            self.end()
            raise
        self.active = True

    def _release(self, failed: bool = False) -> None:
        self.run.prepared.modules.release()
        self.run.peers.between_passes(failed)

    @torch.no_grad()
    def exit(self, probe: Pass, failed: bool) -> None:
        """Let modules quantize for themselves. Buffers and generators become as the gradient pass left them, or
        as they were before it if it failed.
        """
        self.active = False
        over = True
        try:
            torch.clear_autocast_cache()
            self._release(failed)
            if probe.sign < 0:
                self._free()
            if probe.sign:
                self.run.replay.load(self.snapshots[1])
                if not failed:
                    self.leftovers.check("a probe")
            elif failed:
                self.run.replay.load(self.snapshots[0])
                self._finish_gradients(failed=True)
            else:
                if self.pairs:
                    self._save_for_probes()
                self._take_gradients()
                if self._compared:
                    self.leftovers = Leftovers((self._leaves | {id(p): p for p in self.parameters}).values())
            over = failed
        finally:
            if over:
                self.end()

    def back_propagate(self, loss: Tensor) -> None:
        """Run the backward of a loss of the gradient pass."""
        if not loss.requires_grad:
            raise RuntimeError(
                "loss must depend on the model's weights by autograd in the gradient pass, got one that is"
                " detached, or was made under no_grad"
            )
        run = self.run
        if not run.reads_checked:
            check_reads(loss, run.weights)
        if self._compared:
            self._leaves |= leaves_of(loss)
        run.gradients.come_from = Source.BACKWARD
        try:
            loss.backward()
        finally:
            run.gradients.come_from = Source.PASS

    def _free(self) -> None:
        """Free the memory of the second probe."""
        if self._probes is not None:
            self._probes.free()
            self._probes = None

    # ---- after the gradient pass

    @torch.no_grad()
    def take_over(self) -> None:
        """Go on with the gradients that a training loop has left, instead of a gradient pass."""
        self.taken_over = self.passes[0].done = True
        self.passes[0].losses = 1
        try:
            self.run.prepared.update()
            self.groups, self.wholes = self.run.prepared.groups, self.run.prepared.wholes
            self._take_gradients()
            self._losses.fill_(math.nan)  # a loop keeps its losses to itself
        except BaseException:
            self.end()
            raise

    def _save_for_probes(self) -> None:
        replay = self.run.replay
        if self._compared:
            warn_of(changed(self._generators, global_generators(replay.others)))
        self.snapshots.append(self._snapshot())
        replay.compare(*self.snapshots)

    def _finish_gradients(self, failed: bool = False) -> tuple[Tensor, Tensor, list[AlphaGradients]]:
        """Make g of dL/dQ, keep the weights that have it, and add the gradients of alphas if the pass failed.

        Returns, on the device: for each weight of the groups whether its gradient is not all 0; whether all
        elements are finite. And the gradients of learned alphas.
        """
        alike = self.groups is self.wholes
        self.wholes = [part for group in self.wholes for part in group.with_gradients()]
        self.groups = self.wholes
        if not alike:
            self.groups = [part for group in self.run.prepared.groups for part in group.with_gradients()]
        nonzero, finite = look(self._guides, self._losses.device)
        alphas = calls.finish_gradients(self.wholes, in_pass=not self.taken_over)
        if failed:
            members = [w for group in self.groups for w in group.weights]
            used = {w.whole for w, flag in zip(members, nonzero.tolist(), strict=True) if flag}
            calls.add_to_gradients(alphas, used)
        self.run.peers.reduce_inputs()
        return nonzero, finite, alphas

    def _flags(self, nonzero: Tensor) -> Tensor:
        """Return a flag for each weight of all processes; it is not set where a gradient is absent."""
        places, count = self.run.places, self.run.count
        weights = [w for group in self.groups for w in group.weights]
        if weights == self.run.pieces and len(weights) == count:
            return nonzero
        slots = [places[w] for w in weights]
        if slots == list(range(count)):
            return nonzero
        flags = nonzero.new_zeros(count)
        flags[torch.tensor(slots, dtype=torch.int64).to(flags.device, non_blocking=True)] = nonzero
        return flags

    def _take_gradients(self) -> None:
        """Find which weights take part, N, and whether the step is lost, on all processes of a group alike.

        A weight takes part if its gradient is there and not all 0, whoever wrote it: autograd, or
        DistributedDataParallel where another process used it. In a CUDA graph's capture all that are there do,
        as nobody can look. Else this looks once, which waits for a GPU.
        """
        run, loss = self.run, self._losses[0]
        nonzero, finite, alphas = self._finish_gradients()
        if self.estimates and not self.groups and not self.taken_over:
            raise RuntimeError(
                "no quantized weight got a gradient in the gradient pass: the loss must depend on the model"
                " that this Fogzo was made with"
            )
        if self.pairs:
            self._norm = run.guide.norm(self.groups, loss.device)
            finite &= self._norm.isfinite()
        others = [grad for p in run.others(self.facts) if (grad := p.grad) is not None]
        finite &= loss.isfinite()
        for grads in filter(None, (others, *[part.grads for part in alphas])):
            finite &= look(grads, loss.device, zeros=False)[1]
        if capturing():
            flag = (~finite).int()
            run.peers.agree(flag)
            calls.add_to_gradients(alphas)
            self.takes_part = bool(self.groups)
            run.gradients.edited = None
            self._lose_on_device(flag.bool())
        else:
            edited = run.gradients.edited
            unedited = torch.zeros_like(finite)
            rest = torch.stack([~finite, unedited if edited is None else edited])
            flags = torch.cat([self._flags(nonzero), rest]).int()
            run.peers.agree(flags)
            *part, lost, was_edited = flags.tolist()
            self.takes_part, self._part = any(part), part
            taking = None if all(part) else {w for w, span in run.spans.items() if any(part[span])}
            calls.add_to_gradients(alphas, () if lost else taking)
            run.gradients.raise_if_edited(bool(was_edited))
            if not all(part):
                pieces = {w for w, place in run.places.items() if part[place]}
                places = [[i for i, w in enumerate(group.weights) if w in pieces] for group in self.groups]
                self.groups = [g.part(kept) for g, kept in zip(self.groups, places, strict=True) if kept]
            run.found_inf.fill_(0)
            if lost:
                self.lose()
                return
        if self.estimates:
            run.gradients.note(self._guides if self.pairs else None)

    @property
    def _guides(self) -> Sequence[Tensor]:
        groups = self.groups
        return groups[0].grads if len(groups) == 1 else [grad for group in groups for grad in group.grads]

    def idle(self, stack: WeightView) -> list[bool]:
        """Return for each expert of a stack whether it takes no part, on all processes alike."""
        return [not part for part in self._part[self.run.spans[stack]]]

    def lose(self) -> None:
        """Nothing is to change: buffers are as before, gradients are left out, and no probe follows.

        Generators stay as they are: a closure that draws its batch would draw the same one for ever.
        """
        self.lost = True
        self.run.found_inf.fill_(1)
        for p in self.passes[1:]:
            if not p.done:
                p._step = None
                self.passes.remove(p)
        if self.taken_over:  # the optimizer's step has begun, and the loop has no buffers to go back to
            for parameter in self.parameters:
                parameter.grad = None
            return
        self.run.replay.load_buffers(self.snapshots[0])
        self.run.gradients.lose(self.parameters)

    def _lose_on_device(self, lost: Tensor) -> None:
        """In a capture, whose replays find out whether the step is lost."""
        self.unknown = lost if self.unknown is None else self.unknown | lost
        self.run.found_inf.copy_(self.unknown)
        if not self.taken_over:
            self.run.replay.load_buffers(self.snapshots[0], where=self.unknown)
        if self.pairs:
            self.snapshots[1:] = [self._snapshot()]

    def lose_if_not_finite(self, grads: Sequence[Tensor], found_inf: Tensor | None) -> None:
        """Lose the step on all processes if gradients beside the model are not finite."""
        if self.lost or (not grads and found_inf is None):
            return
        lost = ~look(grads, self._losses.device, zeros=False)[1]
        if found_inf is not None:
            lost |= found_inf.to(lost.device, non_blocking=True).reshape(()) != 0
        flag = lost.int()
        self.run.peers.agree(flag)
        if capturing():
            self._lose_on_device(flag.bool())
        elif flag.item():
            self.lose()

    # ---- probes

    def options(self, group: WeightGroup) -> dict[str, Any]:
        """Return what perturbation and estimate must agree on, as the ops take it."""
        return {**group.how, **group.names, **self.noise, "noise_factors": group.noise_factors}

    def _written(self, direction: int) -> Probes:
        """Write both probes of a direction. Weights that take no part run with Q(w)."""
        probes, run = Probes(), self.run
        if sum([len(group.weights) for group in self.groups]) < len(run.pieces):
            taking = {w.whole for group in self.groups for w in group.weights}
            probes.leave([w for w in run.weights if w not in taking and w.placement.is_whole])
        for group in self.groups:
            for codes, part in group.split(group.codes):
                assert self._norm is not None
                probes.write(part, codes, self._norm, direction, self.options(part))
        return probes

    # ---- the estimate: collect, then replace_gradients or an optimizer's own update, then end

    def collect(self, scale: Tensor | None = None) -> Estimate:
        """Return losses of the group and norm, over ``scale``; the caller divides gradients by it."""
        run, losses = self.run, self._losses
        if scale is not None:
            scale = scale.to(losses.device, non_blocking=True)
        if self.lost:
            loss = losses[0] if scale is None else losses[0] / scale
            self.estimate = Estimate(loss, losses[:0], losses[:0], None)
            return self.estimate
        try:
            self._check_losses()
        except RuntimeError:
            self.end()
            raise
        if run.gradients.edited is not None:
            self.unknown = run.gradients.edited
        norm = self._norm
        if self.estimates and self.takes_part and not self.pairs:
            # guided noise is in proportion to the gradients as they are now
            norm = run.guide.norm(self.groups, losses.device)
        if norm is not None and self.unknown is not None:
            norm = norm.masked_fill(self.unknown, math.nan)
        if scale is not None:
            losses.div_(scale)
            norm = None if norm is None else norm / scale
        if not capturing():
            run.peers.check(run.settings.seed, run.settings, run.steps, run.weights)
        if not self.taken_over:
            run.peers.reduce(losses)
        if self._norm is not None and not capturing():
            if self._compared:
                warn_of_scales(losses[: 1 + self.pairs])
            if run.stats.counts_codes:
                # the guides are scaled as this norm is
                changes = calls.code_changes(self.groups, self._norm, self.options)
                run.stats.note_code_changes(changes)
        plus, minus = losses[1:].view(2, self.pairs) if self.pairs else (None, None)
        self.estimate = Estimate(losses[0], plus, minus, norm)
        return self.estimate

    def _check_losses(self) -> None:
        first, *others = (p.losses for p in self.passes)
        if not (first and all(others)):
            raise RuntimeError("every pass must call probe.backward(loss)")
        odd = [count for count in others if count != first]
        if odd:
            raise RuntimeError(
                f"every pass must give a loss for each of its micro-batches, got {first} in the gradient"
                f" pass and {odd[0]} in a probe"
            )
        if self.estimates:
            self.run.gradients.check_unedited(self._guides if self.pairs else None)

    def replace_gradients(self, estimate: Estimate) -> None:
        """Replace the ``.grad`` of the weights that take part by the estimate; it stays without probes."""
        if estimate.norm is None:
            return
        for i, group in enumerate(self.groups):
            self.estimate_into(group, group.grads, estimate, first=i == 0)

    def estimate_into(
        self, group: WeightGroup, grads: Sequence[Tensor], estimate: Estimate, first: bool
    ) -> None:
        """Replace gradients of a group's weights by the estimate. Rows that have none keep none, if by rows.

        ``first``: whether the call counts what the calls of a step have in common.
        """
        assert estimate.norm is not None
        sides, reached = (estimate.losses_plus, estimate.losses_minus), group.reached if group.by_rows else ()
        with self.run.counting(first) as counters:
            how = self.options(group)
            estimate_gradient_(grads, *sides, group.alphas, estimate.norm, counters=counters, **how)
        for rows, grad in zip(reached, grads, strict=False):
            grad.masked_fill_(~rows, 0)

    def end(self, estimated: bool = False) -> None:
        """End the step. The next step has the next number if the estimate was made, unless it is lost."""
        if self.passes[0]._step is None:
            return
        for p in self.passes:
            p._step = None
        self._free()
        run = self.run
        if run.step is self:
            run.step = None
        if not estimated:
            return
        run.stats.note(self.estimate, self.noise)
        if self.lost:
            run.counters[1] += 1
            run.stats.warn_of_lost(1)
        else:
            run.advance(self.pairs > 0, self.unknown)
