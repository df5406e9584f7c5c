"""Fogzo: replaces straight-through gradients by FOGZO's estimate, around any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends import select
from ..distributed.group import Peers
from ..nn.view import reshard
from ..nn.weights import check_unchanged, modules_of, quantized_weights
from ..ops import checks
from ..spec.noise import MAX_STEP, check_range
from .device import DeviceState
from .guards.closure import changed
from .guards.closures import Closures
from .guards.gradients import Gradients
from .guards.uncompiled import uncompiled
from .guards.unmoved_alphas import UnmovedAlphas
from .replay import ReplayState
from .settings import Settings, final_one_minus_beta
from .sharding import Sharding
from .stats import Stats
from .step import Pass, Step, warn_of

COUNTERS = ("lost_directions", "lost_steps", "bad_alphas")


class Fogzo:
    """FOGZO around a model from :func:`quantize_model` (paper section 3; docs/contract.md).

    Each step runs the gradient pass, then, for each direction, a probe with weights
    Q(w + eps v) and one with Q(w - eps v), and replaces the straight-through gradients of the
    quantized weights by the estimate. Probes run without autograd unless a closure differentiates, see the
    same dropout masks, and leave latents, buffers and generators as after a plain step; so does an exception.

    Args:
        model: a module with trainable quantized weights, all on one device.
        total_steps: steps over which beta decays from 1.
        one_minus_beta: 1 - beta at the end, in 0..1 (1e-4, say).
        kappa: the same as (1 - beta) * d for d quantized weights; independent of the model's size.
            Give one of the two.
        directions: n, the pairs of probes per step; 1 in practice.
        seed: of the noise, unsigned 64 bits.
        epsilon_scale: factor on the eps that the straight-through estimator fixes.
        schedule: ``"linear"``, or ``"constant"`` for 1 - beta at its final value throughout (with
            ``one_minus_beta=1`` that is n-SPSA).
        start: fraction of training that runs plain STE before FOGZO starts (paper section 4.3).
        difference: ``"central"``, the paper's, or ``"forward"``: (L+ - L_0) / eps with L_0 the loss of the
            gradient pass. That takes n probes instead of 2 n; the estimate's mean is the same, its variance
            larger.
        every: FOGZO in every k-th step, plain STE between.
        probe_share: share of a step's micro-batches that probes run, for less work and more variance; the
            gradient pass runs all. Use :meth:`probes` and :meth:`Pass.batches` with it.
        both_probes: write Q(w + eps v) and Q(w - eps v) in one pass over memory, the second one into a copy of
            the quantized weights that is there for the probes alone; False writes one after the other into the
            same memory. The bits are the same. A forward difference has no second one.
        replay: what passes must see alike beside PyTorch's generators, the model's buffers and the generators
            that its modules have as attributes: objects with
            ``get_state`` and ``set_state``, ``getstate`` and ``setstate`` (``random``), or ``state_dict`` and
            ``load_state_dict``, and NumPy's generators.
        process_group: with ``torch.distributed``, the processes that train this model together; None takes that
            of a DistributedDataParallel model. All must have the same settings, steps and weights, which is
            checked in the first step and in every hundredth.
        loss_reduction: over them, ``"mean"`` or ``"sum"``, as gradients are reduced; None if this process
            trains its model alone.
        capturable: keep step and 1 - beta on the device, so that a whole step can be captured in a
            CUDA graph and each replay draws its own noise. Run a step or more before the capture.
        backend: of the ops; None takes the best available.

    Raises:
        TypeError, ValueError: an argument is wrong, or the model's weights do not fit one step.

    Attributes:
        weights: the quantized weights of the model, each once.
        total_weights: d, the number of their elements.
        device: where they lie.
        found_inf: float32, 0-dim, on that device: 1 after a gradient pass whose step is lost, else 0. PyTorch's
            optimizers with ``fused=True`` skip such a step without a wait for the device, also in a CUDA graph,
            after ``optimizer.found_inf = fogzo.found_inf``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        one_minus_beta: float | None = None,
        kappa: float | None = None,
        directions: int = 1,
        seed: int = 0,
        epsilon_scale: float = 1.0,
        schedule: str = "linear",
        start: float = 0.0,
        difference: str = "central",
        every: int = 1,
        probe_share: float = 1.0,
        both_probes: bool = True,
        replay: Sequence[object] = (),
        process_group: dist.ProcessGroup | None = None,
        loss_reduction: str | None = "mean",
        capturable: bool = False,
        backend: str | None = None,
    ) -> None:
        checks.instance("model", model, nn.Module)
        reshard(model)
        self.weights = quantized_weights(model)
        self.device = self.weights[0].parameter.device
        self.total_weights = sum(w.parameter.numel() for w in self.weights)
        self._settings = Settings(
            total_steps=total_steps,
            one_minus_beta=final_one_minus_beta(one_minus_beta, kappa, self.total_weights),
            directions=directions,
            seed=seed,
            epsilon_scale=epsilon_scale,
            schedule=schedule,
            start=start,
            difference=difference,
            every=every,
            probe_share=probe_share,
        )
        checks.instance("both_probes", both_probes, bool)
        self._both_probes = both_probes and difference == "central"
        self._sharding = Sharding(model, self.weights, loss_reduction)
        self._peers = Peers(
            model, process_group, loss_reduction, self._sharding.groups, self._sharding.parallel
        )
        select(backend, self.device)  # named here if it cannot run, not at the first step
        self.backend = backend
        self._counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=self.device)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=self.device)
        self._steps = 0  # taken so far; the step number of the noise
        self._device_state = DeviceState(self.device, self._settings) if capturable else None
        self._replay = ReplayState(model, replay)
        self._step: Step | None = None  # from its first pass to its end
        self._closures = Closures(self.weights, self._replay, self._sharding, backend)
        self._gradients = Gradients([w.parameter for w in self.weights])
        self._stats = Stats(seed, difference == "forward", self.total_weights)
        self._unmoved = UnmovedAlphas()
        self._compared = False  # whether one with probes has looked for what passes do not see alike
        self._watched = False  # whether a step has looked for reads of the weights beside their modules

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in asdict(self._settings).items())
        taken = f"{self._steps} steps taken" if self._device_state is None else "steps counted on the device"
        return (
            f"Fogzo({settings}): {taken}, {len(self.weights)} quantized weights of"
            f" {self.total_weights} elements on {self.device}"
        )

    # ---- settings and state

    @property
    def directions(self) -> int:
        """Pairs of probes per step."""
        return self._settings.directions

    @property
    def seed(self) -> int:
        """Seed of the noise, unsigned 64 bits."""
        return self._settings.seed

    @property
    def epsilon_scale(self) -> float:
        """Factor on the eps that the straight-through estimator fixes."""
        return self._settings.epsilon_scale

    @property
    def steps(self) -> int:
        """Steps taken so far; if ``capturable`` this waits for the device."""
        return self._steps if self._device_state is None else int(self._device_state.step)

    @property
    def one_minus_beta(self) -> float | None:
        """1 - beta of the coming step; None where that is plain STE."""
        return self._settings.one_minus_beta_at(self.steps)

    @property
    def pending(self) -> bool:
        """Whether all passes of a step were run, and its estimate is still to be made."""
        return self._completed() is not None

    def diagnostics(self) -> dict[str, int]:
        """Steps and directions lost to values that were not finite, and bad alphas; waits for the device.

        A step is lost whose loss, N or gradients are not finite. Learned alphas that were held in range count
        as bad, once for each step.
        """
        return dict(zip(COUNTERS, self._counters.tolist(), strict=True))

    def stats(self) -> dict[str, float]:
        """What the last step measured, for a log; waits for the device.

        Warns once where the losses of its probes differ by little more than rounding.

        Returns:
            ``loss``, of the gradient pass; ``difference``, the mean of abs(L+ - L-), or of abs(L+ - L_0) of a
            forward difference; ``rounding``, the distance between float32 numbers at the loss; ``guide_norm``,
            N; ``one_minus_beta``; ``noise_to_guide``, the energy of the noise in v over that of the guide,
            (1 - beta) d / beta; ``cosine``, of the angle between estimate and guide, in units of delta, with
            the noise at its expectation, which a step is within about 1 / sqrt(d) of; ``code_changes``, the
            share of codes that differ between Q(w + eps v) and Q(w - eps v) of the first direction, counted in
            the first step with probes and in the first after each call of this method; ``alphas_at_floor``,
            the share of learned and measured alphas at their least value; and the counts of
            :meth:`diagnostics`. NaN where the step had no probes, or where none was taken.
        """
        counts = self.diagnostics()
        self._stats.warn_of_lost(counts["lost_steps"])
        return self._stats.read(self.weights) | counts

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, counters and settings; with model and optimizer, all that a run needs."""
        return {"steps": self.steps, "counters": self._counters.clone(), **asdict(self._settings)}

    def load_state_dict(self, state: dict[str, Any], *, may_differ: Sequence[str] = ()) -> None:
        """Continue a run: the next step is the one that would have come next there.

        Args:
            state: from :meth:`state_dict` of an object with the same settings.
            may_differ: names of settings in which that object may differ from this one, whose own values stand:
                ``["total_steps"]`` for more steps, ``["one_minus_beta"]`` where ``kappa`` is of other weights.
                Steps taken and counters are those of the state.

        Raises:
            ValueError: a setting differs, or a key or value is wrong; nothing has changed then.
            RuntimeError: a pass of a step is running.
        """
        expected = {"steps", "counters", *asdict(self._settings)}
        if set(state) != expected:
            raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(state)}")
        self._settings.check_state(state, may_differ)
        steps, counters = int(state["steps"]), torch.as_tensor(state["counters"])
        check_range("state['steps']", steps, MAX_STEP)
        if counters.shape != self._counters.shape:
            raise ValueError(
                f"state['counters'] must have shape {tuple(self._counters.shape)}, got {tuple(counters.shape)}"
            )
        self._forget("load_state_dict")
        self._steps = steps
        if self._device_state is not None:
            self._device_state.set_step(self._steps)
        self._counters.copy_(counters)
        self._peers.due = True
        self._stats.restart(int(counters[1]))

    # ---- a step

    @uncompiled
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run all passes of one batch and leave the estimates in ``.grad``.

        Args:
            closure: runs the model and returns the loss; it does not call ``backward``.

        Returns:
            The loss of the gradient pass, 0-dim float32.
        """
        self.run(closure)
        return self.estimate_()

    @uncompiled
    def run(self, closure: Callable[[], Tensor]) -> None:
        """Run all passes of one batch; :meth:`estimate_`, or a fused optimizer's step, is to follow.

        Args:
            closure: runs the model and returns the loss; it does not call ``backward``.

        Raises:
            RuntimeError: ``probe_share`` is not 1: a closure has no micro-batches.
        """
        if self._settings.probe_share < 1:
            raise RuntimeError(
                f"probe_share must be 1 where a closure runs the passes, got {self._settings.probe_share}: run"
                " them yourself, `for batch in probe.batches(micro_batches)` in each pass of probes()"
            )
        look = not self._compared and self._settings.one_minus_beta_at(self._steps) is not None
        before = self._closures.seen(closure, self) if look else {}
        for probe in self.probes():
            step = self._step
            assert step is not None
            with probe:
                probe.backward(self._closures.loss(closure, step.snapshots[0]))
            if look and probe.sign == 0:
                names = changed(before, self._closures.seen(closure, self))
                warn_of(self._closures.unlike(closure, names, step, self._peers.agree))

    @uncompiled
    def check(self, closure: Callable[[], Tensor]) -> list[str]:
        """Run the passes of a step with eps = 0, where all must give one loss, and name what differs.

        Weights, gradients, buffers, generators and what is replayed are as before then. What the closure
        changes elsewhere it has changed three times.

        Args:
            closure: as for :meth:`step`.

        Returns:
            What the passes of a step do not see alike, a sentence each; empty if there is nothing. Not found
            are changes that neither the loss nor a variable of the closure shows.

        Raises:
            RuntimeError: a pass of a step is running, or the model's weights have changed.
        """
        self._forget("check")
        model = self._replay.model
        self._sharding.between_passes()
        check_unchanged(model, list(model.modules()), self.weights)
        return self._closures.check(closure, self)

    def probes(self) -> Iterator[Pass]:
        """The passes of a step, to be run in order: the gradient pass, then + and - per direction.

        Enter each (``with probe:``) and give its loss to ``probe.backward``. A step whose loop is left
        early, or in which a pass raises, is over.

        Raises:
            RuntimeError: the passes of the step before were run, but nothing followed: no :meth:`estimate_`,
                no step of a fused optimizer, no :meth:`discard`.
        """
        if self.pending:
            raise RuntimeError(
                "estimate_() must follow the passes of a step, or the step of a fused optimizer that has this"
                " Fogzo: without it the last step was plain straight-through. To leave a step, call discard()"
            )
        self._forget("probes")
        step = self._step = self._new_step()
        try:
            for one in step.passes:
                yield one
                if not one.done:
                    raise RuntimeError("every pass of probes() must be run inside `with probe:`")
        finally:
            if not (step.complete or step.active):
                step.end()

    @uncompiled
    @torch.no_grad()
    def estimate_(self) -> Tensor:
        """Replace the ``.grad`` of the quantized weights by the estimate; call after all passes.

        A direction whose losses are not finite is left out; if all are, ``.grad`` keeps the straight-through
        gradient. A step whose gradient pass left a loss or a gradient that is not finite is lost: it has no
        probes, and the next step is as if this batch had not been. Then ``.grad`` is NaN, as gradient scalers
        look for, and the next step of any optimizer of PyTorch leaves the model's parameters and their state
        alone. :meth:`diagnostics` counts both.

        Returns:
            The loss of the gradient pass, 0-dim float32.
        """
        step = self._completed()
        if step is None:
            raise RuntimeError("estimate_ must be called after every pass of probes() was run")
        estimate = step.collect()
        step.replace_gradients(estimate)
        step.finish()
        return estimate.loss

    def discard(self) -> None:
        """Leave a step whose passes were run: it gets no estimate, and ``.grad`` stays as it is."""
        self._forget("discard")

    def _completed(self) -> Step | None:
        """The step whose passes were run and whose estimate is still to be made."""
        return self._step if self._step is not None and self._step.complete else None

    # ---- what a step needs of its estimator

    def _forget(self, caller: str) -> None:
        """Leave a step whose estimate was not made."""
        if self._step is not None:
            if self._step.active:
                raise RuntimeError(f"{caller}() must not be called inside a pass")
            self._step.end()

    @uncompiled
    def _new_step(self) -> Step:
        model = self._replay.model
        self._sharding.between_passes()
        modules = modules_of(model)  # one walk for all that asks
        check_unchanged(model, modules, self.weights)
        self._unmoved.begin(model, modules, self.weights)
        noise = self._noise()
        return Step(
            self.weights, modules=modules, noise=noise,
            pairs=0 if noise["one_minus_beta"] is None else self.directions,
            forward=self._settings.difference == "forward", share=self._settings.probe_share,
            both=self._both_probes,
            counters=self._counters, found_inf=self.found_inf, replay=self._replay, gradients=self._gradients,
            watched=not self._watched,
            compared=not self._compared, counted=self._stats.wanted,
            backend=self.backend, sharding=self._sharding, reduce=self._reduce, agree=self._peers.agree,
            over=self._over,
        )  # fmt: skip

    def _noise(self) -> dict[str, Any]:
        """Which noise the coming step draws, and how much of it, as the ops take it."""
        d = self._device_state
        return {
            "one_minus_beta": d.one_minus_beta if d else self._settings.one_minus_beta_at(self._steps),
            "seed": d.seed if d else self.seed,
            "step": d.step if d else self._steps,
            "epsilon_scale": self.epsilon_scale,
        }

    def _reduce(self, losses: Tensor) -> None:
        self._peers.check(self._settings, self._steps, self.weights)
        self._peers.reduce(losses)

    def _over(self, step: Step, estimated: bool) -> None:
        if self._step is step:
            self._step = None
        if estimated:
            self._stats.note(step)
            if step.lost:  # the next step has the number of this one
                self._counters[1] += 1
                self._stats.warn_of_lost(1)
                return
            self._gradients.left_estimates()
            self._unmoved.end()
            self._watched = True
            self._compared |= step.pairs > 0
            if self._device_state is not None:
                self._device_state.advance(1 if step.unknown is None else (~step.unknown).long())
            self._steps += 1
