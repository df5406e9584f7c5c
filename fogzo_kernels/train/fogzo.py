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
from ..nn.view import reshard
from ..nn.weights import quantized_weights
from ..ops import checks
from ..spec.checks import hinted
from .attached import Attached
from .guards.closure import Closures
from .guards.fingerprints import changed, warn_of
from .guards.uncompiled import uncompiled
from .replay import ReplayState
from .run import COUNTERS, DeviceState, Run
from .settings import HINTS, Settings, final_one_minus_beta, loaded
from .step import Pass, Step


class Fogzo:
    """The estimator of a training run: guided noise, FOGZO or plain STE.

    A step runs the gradient pass, then for each direction one probe with the weights Q(w + eps v) and one with
    Q(w - eps v), and replaces the straight-through gradients of the quantized weights by the estimate. With
    ``directions=0`` it runs no probes and adds guided noise to the gradients. With ``kappa=0`` as well it is
    plain STE.

    Probes run without autograd, unless a closure differentiates, and see the same dropout masks. A step leaves
    latents, buffers and generators as a plain step would, also after an exception.

    Args:
        model: a module with trainable quantized weights, all on one device.
        total_steps: number of steps over which beta decays from 1.
        one_minus_beta: 1 - beta at the end, in 0..1, such as 1e-4. None: ``kappa`` decides.
        kappa: (1 - beta) d at the end for d quantized weights, which suits models of any size. None: 0.1,
            unless ``one_minus_beta`` is given.
        directions: n, pairs of probes per step. 0 is guided noise, 1 the paper's FOGZO.
        seed: seed of the noise, 0..2^64 - 1.
        epsilon_scale: factor on the eps that the straight-through estimator fixes, > 0.
        schedule: ``"linear"`` decay of beta, or ``"constant"`` for the final beta throughout. With
            ``one_minus_beta=1`` the latter is n-SPSA.
        start: fraction of training that runs plain STE first, in 0..1 (paper, section 4.3).
        every: make an estimate in every k-th step, and take plain STE in the others.
        noise_per: ``"model"`` for noise of one size in all weights, in units of delta, as in the paper;
            ``"tensor"`` for noise in proportion to each weight's gradient. None: the former with probes, the
            latter without.
        replay: stateful objects that every pass of a step must see alike, such as ``[rng]``. They have
            ``get_state`` and ``set_state``, ``getstate`` and ``setstate``, or ``state_dict`` and
            ``load_state_dict``, or are NumPy's generators. PyTorch's generators, buffers of the model and
            generators that are attributes of its modules need no mention.
        process_group: with ``torch.distributed``, the processes that train this model together. They must have
            the same settings, steps and weights; the first step and every hundredth checks that. None: that of
            a DistributedDataParallel model.
        loss_reduction: how processes combine losses, ``"mean"`` or ``"sum"``, as they do gradients. None: this
            process trains alone.
        capturable: keep step and 1 - beta on the device, so that each replay of a CUDA graph of a whole step
            draws its own noise. Run at least one step before the capture.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument is wrong, or the model's weights do not fit one step.

    Attributes:
        weights: the quantized weights of the model, each once.
        total_weights: d, the number of their elements.
        device: the device of the weights.
        found_inf: float32, 0-dim, on the device: 1 after a gradient pass whose step is lost, else 0. After
            ``optimizer.found_inf = fogzo.found_inf`` PyTorch's optimizers with ``fused=True`` skip such a step
            without a wait for the device, also in a CUDA graph.

    Example:
        >>> model, x = torch.nn.Linear(8, 4), torch.ones(2, 8)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> fogzo = fk.Fogzo(model, total_steps=100, directions=1)
        >>> loss = fogzo.backward(lambda: model(x).square().mean())
        >>> optimizer.step()
    """

    @hinted(**HINTS)
    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
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
        """Number of pairs of probes per step; 0 is guided noise."""
        return self._run.settings.directions

    @property
    def seed(self) -> int:
        """Seed of the noise, 0..2^64 - 1."""
        return self._run.settings.seed

    @property
    def epsilon_scale(self) -> float:
        """Factor on the eps that the straight-through estimator fixes."""
        return self._run.settings.epsilon_scale

    @property
    def steps(self) -> int:
        """Number of steps so far. If ``capturable``, this waits for the device."""
        state = self._run.device_state
        return self._run.steps if state is None else int(state.step)

    @property
    def one_minus_beta(self) -> float | None:
        """1 - beta of the next step; None if that step is plain STE."""
        return self._run.settings.one_minus_beta_at(self.steps)

    @property
    def pending(self) -> bool:
        """Whether all passes of a step were run and its estimate is still to be made."""
        return self.pending_step() is not None

    def diagnostics(self) -> dict[str, int]:
        """Return counts of ``lost_directions``, ``lost_steps`` and ``bad_alphas``; waits for the device.

        A step is lost if its loss, N or a gradient is not finite. A learned alpha out of range counts in each
        step.
        """
        return dict(zip(COUNTERS, self._run.counters.tolist(), strict=True))

    def stats(self) -> dict[str, float]:
        """Return what the last step measured, for a log; waits for the device.

        Warns once if the losses of the probes differ by little more than rounding.

        Returns:
            A dict with these numbers and the counts of :meth:`diagnostics`. ``loss`` is that of the gradient
            pass. ``difference`` is the mean of abs(L+ - L-), ``rounding`` the distance between float32 numbers
            at the loss. ``guide_norm`` is N. ``one_minus_beta`` is 1 - beta, and ``noise_to_guide`` the energy
            of the noise in v over that of the guide, (1 - beta) d / beta. ``cosine`` is that of the angle
            between estimate and guide in units of delta, for noise at its expectation; a step differs by about
            1 / sqrt(d). ``code_changes`` is the share of codes that differ between Q(w + eps v) and Q(w - eps
            v) of the first direction, counted in the first step with probes and in the first after each call.
            ``alphas_at_floor`` is the share of learned and measured alphas at their least value. Numbers that
            the step did not measure are NaN: before the first step, all but ``alphas_at_floor``; for plain STE,
            all but that and the loss; for guided noise, ``difference``, ``rounding`` and ``code_changes``;
            after :meth:`attach`, the loss.
        """
        counts, stats = self.diagnostics(), self._run.stats
        stats.warn_of_lost(counts["lost_steps"])
        return stats.read() | counts

    def state_dict(self) -> dict[str, Any]:
        """Return steps, counters and settings: all that a run needs beside model and optimizer."""
        return {"steps": self.steps, "counters": self._run.counters.clone(), **asdict(self._run.settings)}

    def load_state_dict(self, state: dict[str, Any], *, may_differ: Sequence[str] = ()) -> None:
        """Continue a run: the next step is the one that would have come next there.

        Args:
            state: a result of :meth:`state_dict` of an object with the same settings.
            may_differ: names of settings that may differ; this object keeps its own. ``["total_steps"]`` allows
                more steps, ``["one_minus_beta"]`` a ``kappa`` for another number of weights.

        Raises:
            ValueError: a setting differs, or a key or value is wrong. Nothing has changed then.
            RuntimeError: a pass is running.

        Example:
            >>> model = torch.nn.Linear(8, 4)
            >>> report = fk.quantize_model(model, fk.presets.lsq(2))
            >>> state = fk.Fogzo(model, total_steps=100).state_dict()
            >>> fk.Fogzo(model, total_steps=200).load_state_dict(state, may_differ=["total_steps"])
        """
        steps, counters = loaded(state, self._run.settings, self._run.counters, may_differ)
        self._run.forget("load_state_dict")
        self._run.restart(steps, counters)

    # ---- a step

    @uncompiled
    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run all passes of one batch and leave the estimates in ``.grad``. No parameter moves.

        Args:
            closure: a function that runs the model and returns the loss. It does not call ``backward``.

        Returns:
            The loss of the gradient pass, a 0-dim float32 tensor.

        Example:
            >>> model = torch.nn.Linear(8, 4)
            >>> report = fk.quantize_model(model, fk.presets.lsq(2))
            >>> fk.Fogzo(model, total_steps=100).backward(lambda: model(torch.ones(2, 8)).square().mean()).dtype
            torch.float32
        """
        self.run(closure)
        return self.estimate_()

    @uncompiled
    def run(self, closure: Callable[[], Tensor]) -> None:
        """Run all passes of one batch. Call :meth:`estimate_`, or the step of a fused optimizer, afterwards.

        Args:
            closure: a function that runs the model and returns the loss. It does not call ``backward``.

        Example:
            >>> model = torch.nn.Linear(8, 4)
            >>> report = fk.quantize_model(model, fk.presets.lsq(2))
            >>> optimizer = fk.AdamW(model.parameters(), fogzo=fk.Fogzo(model, total_steps=100))
            >>> optimizer.fogzo.run(lambda: model(torch.ones(2, 8)).square().mean())
            >>> loss = optimizer.step()
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
        """Run the passes of a step with eps = 0 and name everything that differs between them.

        Weights, gradients, buffers, generators and replayed objects are as before afterwards. Anything else
        that the closure changes, it has changed three times. The call does not find a change that shows neither
        in the loss nor in a variable of the closure.

        Args:
            closure: a function that runs the model and returns the loss, as for :meth:`backward`.

        Returns:
            One sentence for each thing that the passes do not see alike; an empty list if there is none.

        Raises:
            RuntimeError: a pass is running, or the model's weights have changed.

        Example:
            >>> model = torch.nn.Linear(8, 4)
            >>> report = fk.quantize_model(model, fk.presets.lsq(2))
            >>> fk.Fogzo(model, total_steps=100).check(lambda: model(torch.ones(2, 8)).square().mean())
            []
        """
        self._run.forget("check")
        self._run.look()
        return self._closures.check(closure, self)

    def probes(self) -> Iterator[Pass]:
        """Yield the passes of a step in order: the gradient pass, then + and - of each direction.

        Enter each :class:`Pass` with ``with`` and give its loss to ``probe.backward``. If you leave the loop
        early, or a pass raises, the step is over.

        Raises:
            RuntimeError: the passes of the step before were run, but no :meth:`estimate_`, no step of a fused
                optimizer and no :meth:`discard` followed.

        Example:
            >>> model, x = torch.nn.Linear(8, 4), torch.ones(2, 8)
            >>> report = fk.quantize_model(model, fk.presets.lsq(2))
            >>> fogzo = fk.Fogzo(model, total_steps=100, directions=1)
            >>> for probe in fogzo.probes():
            ...     with probe: probe.backward(model(x).square().mean())
            >>> loss = fogzo.estimate_()
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
        """Replace the ``.grad`` of the quantized weights by the estimate. Call it after all passes.

        A direction whose losses are not finite is left out; if all are, ``.grad`` keeps the straight-through
        gradient. If the loss or a gradient of the gradient pass is not finite, the step is lost: it runs no
        probes, and the next step is as if this batch had not been. ``.grad`` is then NaN, which gradient
        scalers look for, and the next step of any optimizer of PyTorch leaves parameters and state alone.
        :meth:`diagnostics` counts both cases.

        Returns:
            The loss of the gradient pass, a 0-dim float32 tensor.

        Raises:
            RuntimeError: not all passes of a step were run.
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

        Your loop stays as it is: ``loss.backward()``, then ``optimizer.step()``, with accumulation, clipping
        and gradient scalers. The noise is in proportion to the gradients that the step finds. One step of the
        optimizer is one step of this object. A step whose gradients are not finite is lost: it changes no
        parameter of the model.

        Args:
            optimizer: any optimizer of PyTorch that has all quantized weights. :class:`AdamW` and :class:`SGD`
                of this package add the noise in one pass with their update. In a wrapper of accelerate or
                Lightning, the optimizer inside gets the hook.

        Returns:
            An :class:`Attached`; its ``remove()`` ends this.

        Raises:
            ValueError: this object has ``directions > 0``, or the optimizer lacks a quantized weight.
            RuntimeError: this object is attached already.

        Example:
            >>> model = torch.nn.Linear(8, 4)
            >>> report = fk.quantize_model(model, fk.presets.lsq(2))
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> attached = fk.Fogzo(model, total_steps=100).attach(optimizer)
            >>> model(torch.ones(2, 8)).sum().backward()
            >>> optimizer.step()
        """
        return Attached(self, optimizer)

    @property
    def attached(self) -> bool:
        """Whether the steps of an optimizer add the noise, after :meth:`attach`."""
        return self._run.attached is not None

    def discard(self) -> None:
        """Drop a step whose passes were run. It gets no estimate, and ``.grad`` stays as it is.

        Raises:
            RuntimeError: a pass is running.
        """
        self._run.forget("discard")

    # ---- for optimizers that make the estimate in their own update

    def pending_step(self) -> Step | None:
        """Return the step whose passes were run and whose estimate is still to be made, or None.

        An optimizer that makes the estimate in its own update calls ``step.lose_if_not_finite`` with gradients
        that are not the model's, then ``step.collect()``, then unless ``step.lost`` an op of the fused tail for
        each of ``step.groups`` with ``step.options(group)`` and ``step.run.counting(first)``, and last
        ``step.end(estimated=True)``.
        """
        step: Step | None = self._run.step
        return step if step is not None and step.complete else None

    def check_estimates(self, parameters: Iterable[Tensor]) -> None:
        """Raise if ``.grad`` of a quantized weight among these is neither None, nor 0, nor its estimate.

        ``torch.distributed.checkpoint`` takes a step with gradients of 0 to make the state of an optimizer.

        Args:
            parameters: the parameters of an optimizer.

        Raises:
            RuntimeError: such a ``.grad`` comes from a backward outside the passes.

        Example:
            >>> model = torch.nn.Linear(8, 4)
            >>> report = fk.quantize_model(model, fk.presets.lsq(2))
            >>> fk.Fogzo(model, total_steps=100).check_estimates(model.parameters())  # no gradient yet
        """
        self._run.gradients.check_estimates(parameters, [w.name for w in self.weights])

    @uncompiled
    def _begin_step(self, caller: str) -> Step:
        self._run.forget(caller)
        facts = self._run.look()
        self._run.unmoved_alphas.begin(self._run.replay.model, facts.modules, self.weights)
        step = self._run.step = Step(self._run, facts)
        return step
