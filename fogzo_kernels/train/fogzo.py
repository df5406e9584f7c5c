"""Fogzo: replaces straight-through gradients by FOGZO's estimate, around any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends import select
from ..distributed.group import Peers
from ..nn.view import local, reshard
from ..nn.weights import check_unchanged, modules_of, quantized_weights
from ..ops import checks
from ..spec.checks import hinted
from .attached import Attached
from .guards.closure import Closures
from .guards.fingerprints import changed, warn_of
from .guards.uncompiled import uncompiled
from .replay import ReplayState
from .run import COUNTERS, DeviceState, Run
from .settings import Settings, final_one_minus_beta, loaded
from .step import Pass, Step


class Fogzo:
    """FOGZO around a model from :func:`quantize_model` (paper section 3; docs/contract.md).

    Each step runs the gradient pass, then, for each direction, a probe with weights
    Q(w + eps v) and one with Q(w - eps v), and replaces the straight-through gradients of the
    quantized weights by the estimate. With ``directions=0`` a step has no probes: guided noise joins the
    gradients, in proportion to their norm, and with ``kappa=0`` the step is plain straight-through.

    Probes run without autograd unless a closure differentiates, see the same dropout masks, and leave latents,
    buffers and generators as after a plain step; so does an exception.

    Args:
        model: a module with trainable quantized weights, all on one device.
        total_steps: steps over which beta decays from 1.
        one_minus_beta: 1 - beta at the end, in 0..1 (1e-4, say).
        kappa: the same as (1 - beta) * d for d quantized weights, for any model's size. 0.1 where neither of
            the two is given.
        directions: n, the pairs of probes per step; 1 is the paper's FOGZO. 0: guided noise, no probes.
        seed: of the noise, unsigned 64 bits.
        epsilon_scale: factor on the eps that the straight-through estimator fixes.
        schedule: ``"linear"``, or ``"constant"`` for 1 - beta at its final value throughout (with
            ``one_minus_beta=1`` that is n-SPSA).
        start: fraction of training that runs plain STE before FOGZO starts (paper section 4.3).
        every: FOGZO in every k-th step, plain STE between.
        noise_per: ``"model"`` for noise of one size in all weights, in units of delta (the paper), or
            ``"tensor"`` for noise in proportion to the gradient of each weight. By default the former with
            probes, the latter without.
        replay: what passes must see alike beside PyTorch's generators, the model's buffers and the generators
            that its modules have as attributes: objects with
            ``get_state`` and ``set_state``, ``getstate`` and ``setstate`` (``random``), or ``state_dict`` and
            ``load_state_dict``, and NumPy's generators.
        process_group: with ``torch.distributed``, the processes that train this model together; None takes that
            of a DistributedDataParallel model. All must have the same settings, steps and weights, which is
            checked in the first step and in every hundredth.
        loss_reduction: over them, ``"mean"`` or ``"sum"``, as of gradients; None if this process trains alone.
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

    @hinted(
        beta="the argument is one_minus_beta, 1 - beta at the end, or kappa",
        steps="the argument is total_steps",
        max_steps="the argument is total_steps",
        num_steps="the argument is total_steps",
        n="the argument is directions",
        num_directions="the argument is directions",
        eps="the argument is epsilon_scale, a factor on eps",
        epsilon="the argument is epsilon_scale, a factor on eps",
        lr="the optimizer has the learning rate",
    )
    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        one_minus_beta: float | None = None,
        kappa: float | None = None,
        directions: int = 0,
        seed: int = 0,
        epsilon_scale: float = 1.0,
        schedule: str = "linear",
        start: float = 0.0,
        every: int = 1,
        noise_per: str | None = None,
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
        beta = final_one_minus_beta(one_minus_beta, kappa, self.total_weights)
        if noise_per is None:
            noise_per = "model" if directions else "tensor"
        settings = Settings(
            total_steps, beta, directions, seed, epsilon_scale, schedule, start, every, noise_per
        )
        peers = Peers(model, self.weights, process_group, loss_reduction)
        state = DeviceState(self.device, settings) if capturable else None
        select(backend, self.device)  # an error here if it cannot run, not at the first step
        self.backend = backend
        self.found_inf = torch.zeros((), dtype=torch.float32, device=self.device)
        counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=self.device)
        self._run = Run(
            settings, backend, self.weights, ReplayState(model, replay), peers, state, counters, self.found_inf
        )
        self._closures = Closures(self._run)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in asdict(self._run.settings).items())
        on_device = self._run.device_state is not None
        taken = "steps counted on the device" if on_device else f"{self._run.steps} steps taken"
        return (
            f"Fogzo({settings}): {taken}, {len(self.weights)} quantized weights of"
            f" {self.total_weights} elements on {self.device}"
        )

    # ---- settings and state

    @property
    def directions(self) -> int:
        """Pairs of probes per step; 0: guided noise."""
        return self._run.settings.directions

    @property
    def seed(self) -> int:
        """Seed of the noise, unsigned 64 bits."""
        return self._run.settings.seed

    @property
    def epsilon_scale(self) -> float:
        """Factor on the eps that the straight-through estimator fixes."""
        return self._run.settings.epsilon_scale

    @property
    def steps(self) -> int:
        """Steps taken so far; if ``capturable`` this waits for the device."""
        state = self._run.device_state
        return self._run.steps if state is None else int(state.step)

    @property
    def one_minus_beta(self) -> float | None:
        """1 - beta of the coming step; None where that is plain STE."""
        return self._run.settings.one_minus_beta_at(self.steps)

    @property
    def pending(self) -> bool:
        """Whether all passes of a step were run, and its estimate is still to be made."""
        return self.pending_step() is not None

    def diagnostics(self) -> dict[str, int]:
        """Steps and directions lost to values that were not finite, and bad alphas; waits for the device.

        A step is lost whose loss, N or gradients are not finite. Learned alphas out of range count each step.
        """
        return dict(zip(COUNTERS, self._run.counters.tolist(), strict=True))

    def stats(self) -> dict[str, float]:
        """What the last step measured, for a log; waits for the device.

        Warns once where the losses of its probes differ by little more than rounding.

        Returns:
            ``loss``, of the gradient pass; ``difference``, the mean of abs(L+ - L-); ``rounding``, the distance
            between float32 numbers at the loss; ``guide_norm``, N; ``one_minus_beta``; ``noise_to_guide``, the
            energy of the noise in v over that of the guide, (1 - beta) d / beta; ``cosine``, of the angle
            between estimate and guide, in units of delta, with the noise at its expectation, which a step is
            within about 1 / sqrt(d) of; ``code_changes``, the share of codes that differ between Q(w + eps v)
            and Q(w - eps v) of the first direction, counted in the first step with probes and in the first
            after each call of this method; ``alphas_at_floor``, the share of learned and measured alphas at
            their least value; and the counts of :meth:`diagnostics`. NaN before the first step. A plain
            straight-through step measures its loss alone. Guided noise has no ``difference``, ``rounding`` and
            ``code_changes``, and after :meth:`attach` no ``loss``.
        """
        counts, stats = self.diagnostics(), self._run.stats
        stats.warn_of_lost(counts["lost_steps"])
        return stats.read() | counts

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, counters and settings; with model and optimizer, all that a run needs."""
        return {"steps": self.steps, "counters": self._run.counters.clone(), **asdict(self._run.settings)}

    def load_state_dict(self, state: dict[str, Any], *, may_differ: Sequence[str] = ()) -> None:
        """Continue a run: the next step is the one that would have come next there.

        Args:
            state: from :meth:`state_dict` of an object with the same settings.
            may_differ: names of settings in which that object may differ from this one, whose own values stand:
                ``["total_steps"]`` for more steps, ``["one_minus_beta"]`` where ``kappa`` is of other weights.
                Steps taken and counters come from the state.

        Raises:
            ValueError: a setting differs, or a key or value is wrong; nothing has changed then.
            RuntimeError: a pass of a step is running.
        """
        steps, counters = loaded(state, self._run.settings, self._run.counters, may_differ)
        self._forget("load_state_dict")
        self._run.restart(steps, counters)

    # ---- a step

    @uncompiled
    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run all passes of one batch and leave the estimates in ``.grad``; no parameter moves.

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
        """
        run, closures = self._run, self._closures
        compared = run.passes_compared or not run.settings.directions
        look = not compared and run.settings.one_minus_beta_at(run.steps) is not None
        before = closures.seen(closure, self) if look else {}
        for probe in self.probes():
            step: Step = run.step
            with probe:
                probe.backward(closures.loss(closure, step.snapshots[0]))
            if look and probe.sign == 0:
                names = changed(before, closures.seen(closure, self))
                warn_of(closures.names_that_matter(closure, names, step))

    @uncompiled
    def check(self, closure: Callable[[], Tensor]) -> list[str]:
        """Run the passes of a step with eps = 0, where all must give one loss, and name what differs.

        Weights, gradients, buffers, generators and what is replayed are as before then. What the closure
        changes elsewhere it has changed three times.

        Args:
            closure: as for :meth:`backward`.

        Returns:
            What the passes of a step do not see alike, a sentence each; empty if there is nothing. Not found
            are changes that neither the loss nor a variable of the closure shows.

        Raises:
            RuntimeError: a pass of a step is running, or the model's weights have changed.
        """
        self._forget("check")
        self._modules()
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
                "the last step had no estimate, and was plain straight-through: call fogzo.estimate_() before"
                " optimizer.step(), or pass fogzo= to fk.AdamW or fk.SGD; to drop a step, call discard()"
            )
        if self._run.attached is not None:
            raise RuntimeError(
                "passes must not run while Fogzo is attached to an optimizer, whose step would add noise again:"
                " call loss.backward() and optimizer.step(), or remove() on what attach returned"
            )
        step = self._begin_step("probes")
        try:
            for probe in step.passes:
                yield probe
                if not probe.done:
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
        step = self.pending_step()
        if step is None:
            raise RuntimeError("estimate_ must be called after every pass of probes() was run")
        estimate = step.collect()
        step.replace_gradients(estimate)
        step.end(estimated=True)
        return estimate.loss

    def attach(self, optimizer: torch.optim.Optimizer) -> Attached:
        """Let each step of an optimizer add guided noise to the gradients first, in a loop without passes.

        For ``directions=0``. The loop stays as it is: ``loss.backward()``, then ``optimizer.step()``, with
        accumulation, clipping and gradient scalers as ever; the noise is in proportion to the gradients as the
        step finds them. One step of the optimizer is one step of this object. A step whose gradients are not
        finite is lost: it changes no parameter of the model.

        Args:
            optimizer: any of PyTorch's, or :class:`fogzo_kernels.AdamW` or :class:`fogzo_kernels.SGD`, which
                add the noise in one pass with their update. It has all quantized weights. Of a wrapper
                (accelerate's, Lightning's) the optimizer inside gets the hook.

        Returns:
            An object whose ``remove()`` ends this.

        Raises:
            ValueError: this Fogzo has probes, or the optimizer lacks a quantized weight.
            RuntimeError: this Fogzo is attached already.

        Example:
            >>> import torch, fogzo_kernels as fk
            >>> model = torch.nn.Linear(8, 4)
            >>> report = fk.quantize_model(model, fk.presets.lsq(2))
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> attached = fk.Fogzo(model, total_steps=100, directions=0).attach(optimizer)
            >>> model(torch.ones(2, 8)).sum().backward()
            >>> optimizer.step()
        """
        return Attached(self, optimizer)

    @property
    def attached(self) -> bool:
        """Whether an optimizer's step adds the noise, after :meth:`attach`."""
        return self._run.attached is not None

    def discard(self) -> None:
        """Leave a step whose passes were run: it gets no estimate, and ``.grad`` stays as it is."""
        self._forget("discard")

    # ---- for optimizers that make the estimate in their own update

    def pending_step(self) -> Step | None:
        """Return the step whose passes were run and whose estimate is still to be made, or None.

        An optimizer that makes the estimate in its update, as :class:`fogzo_kernels.AdamW` does, calls in this
        order: ``step.lose_if_not_finite`` with gradients that are not the model's, ``step.collect()``, unless
        ``step.lost`` an op of the fused tail for each of ``step.groups`` with ``step.options(group)`` and
        ``step.run.counting(first)``, and ``step.end(estimated=True)``.
        """
        step: Step | None = self._run.step
        return step if step is not None and step.complete else None

    def check_estimates(self, parameters: Iterable[Tensor]) -> None:
        """Raise if ``.grad`` of a quantized weight among these is neither None, nor 0, nor its estimate.

        (torch.distributed.checkpoint makes the state of an optimizer by a step with gradients of 0.)
        """
        own = set(map(id, parameters))
        for i, w in enumerate(self.weights):
            grad = w.parameter.grad
            if grad is None or id(w.parameter) not in own or self._run.gradients.is_estimate(i):
                continue
            if bool(local(grad).any()):
                raise RuntimeError(
                    f"the gradient of {w.name} comes from a backward outside of the passes of fogzo, and step"
                    " would train plain straight-through: give step a closure, or run the passes by"
                    " fogzo.run(closure) or fogzo.probes()"
                )

    # ---- what a step needs of its estimator

    def _forget(self, caller: str) -> None:
        """Leave a step whose estimate was not made."""
        step: Step | None = self._run.step
        if step is not None:
            if step.active:
                raise RuntimeError(f"{caller}() must not be called inside a pass")
            step.end()

    def _modules(self) -> list[nn.Module]:
        """Walk the model once for all that asks for its modules, and raise if its weights have changed."""
        self._run.peers.between_passes()
        model = self._run.replay.model
        modules = modules_of(model)
        prepared = self._run.prepared
        prepared.facts = check_unchanged(model, modules, self.weights, prepared.facts)
        return modules

    @uncompiled
    def _begin_step(self, caller: str) -> Step:
        self._forget(caller)
        modules = self._modules()
        self._run.unmoved_alphas.begin(self._run.replay.model, modules, self.weights)
        step = self._run.step = Step(self._run, modules)
        return step
