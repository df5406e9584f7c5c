"""Fogzo: replaces straight-through gradients by FOGZO's estimate, around any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import estimate_gradient_, guide_norm, guide_sumsq, perturb_quantize_
from ..ops import checks as validation
from ..spec.noise import MAX_DIRECTION, MAX_SEED, check_number, check_range, signed64
from ..spec.schedule import SCHEDULES, one_minus_beta_at
from .replay import ReplayState, Snapshot, capturing
from .weights import Key, QuantizedWeight, quantized_weights

COUNTERS = ("lost_directions", "lost_norms", "bad_alphas")


class Estimate(NamedTuple):
    """What a step's passes found; no norm where there were no probes."""

    loss: Tensor
    losses_plus: Tensor
    losses_minus: Tensor
    norm: Tensor | None


class _DeviceState:
    """Seed, step and 1 - beta in device memory: a captured graph reads and advances them."""

    def __init__(self, device: torch.device, settings: dict[str, Any]) -> None:
        if settings["start"]:
            raise ValueError(
                f"start must be 0 if capturable, got {settings['start']}: a graph has its probes or not"
            )
        self.seed = torch.tensor(signed64(settings["seed"]), device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.final, self.total_steps = settings["one_minus_beta"], settings["total_steps"]
        self.one_minus_beta = torch.full((), self.final, dtype=torch.float64, device=device)
        self.linear = settings["schedule"] == "linear"
        self.set_step(0)

    def set_step(self, step: int) -> None:
        self.step.fill_(step)
        self._schedule()

    def advance(self) -> None:
        self.step.add_(1)
        self._schedule()

    def _schedule(self) -> None:  # schedule.py's formula, without reading the step on the host
        if self.linear:
            part = self.step.double().div_(self.total_steps).clamp_(max=1.0)
            self.one_minus_beta.copy_(part.mul_(self.final))


class Pass:
    """One forward of a step: the gradient pass (``sign`` 0), or a probe at +eps or -eps."""

    def __init__(self, owner: Fogzo, direction: int, sign: int) -> None:
        self.direction, self.sign = direction, sign
        self.loss: Tensor | None = None  # sum of the losses so far, 0-dim float32
        self.done = False
        self._owner = owner
        self._mode: Any = None

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's loss to the pass; in the gradient pass also back-propagate it.

        Give every pass the same losses in the same order, scaled alike (by 1/K for K
        micro-batches, or by a gradient scaler).
        """
        if self._mode is None:
            raise RuntimeError("probe.backward must be called inside `with probe:`")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss must be a tensor of one element, got {what}")
        if self.sign == 0:
            loss.backward()
        value = loss.detach().reshape(())
        if self.loss is None:
            self.loss = self._owner._slot(self).copy_(value)
        else:
            self.loss.add_(value)

    def __enter__(self) -> Pass:
        self._owner._enter(self)
        self._mode = torch.enable_grad() if self.sign == 0 else torch.no_grad()
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._mode.__exit__(kind, value, traceback)
        self._mode = None
        self._owner._exit(self, failed=kind is not None)
        self.done = kind is None


class Fogzo:
    """FOGZO around a model from :func:`quantize_model` (paper section 3; docs/contract.md).

    Each step runs the gradient pass, then, for each direction, a probe with weights
    Q(w + eps v) and one with Q(w - eps v), and replaces the straight-through gradients of the
    quantized weights by the estimate. Probes run without autograd, see the same dropout masks,
    and leave latents, buffers and generators as after a plain step; so does an exception.

    Args:
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
        process_group, loss_reduction: with ``torch.distributed``, losses are reduced over the group
            by ``"mean"`` or ``"sum"``, as the gradients are.
        capturable: keep step and 1 - beta on the device, so that a whole step can be captured in a
            CUDA graph and each replay draws its own noise. Run a step or more before the capture.
        backend: of the ops; None takes the best available.
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
        process_group: dist.ProcessGroup | None = None,
        loss_reduction: str = "mean",
        capturable: bool = False,
        backend: str | None = None,
    ) -> None:
        self.weights = quantized_weights(model)
        self.device = self.weights[0].parameter.device
        self.total_weights = sum(w.parameter.numel() for w in self.weights)
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an int >= 1, got {total_steps}")
        check_range("seed", seed, MAX_SEED)
        check_range("directions", directions, MAX_DIRECTION + 1)
        if directions < 1:
            raise ValueError(f"directions must be >= 1, got {directions}")
        validation.unit_interval("start", start)
        validation.finite("epsilon_scale", epsilon_scale)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        self._settings: dict[str, Any] = {
            "total_steps": total_steps,
            "one_minus_beta": _final_one_minus_beta(one_minus_beta, kappa, self.total_weights),
            "directions": directions,
            "seed": seed,
            "epsilon_scale": float(epsilon_scale),
            "schedule": schedule,
            "start": float(start),
        }
        self.directions, self.seed, self.epsilon_scale = directions, seed, epsilon_scale
        self.process_group, self.loss_reduction = process_group, loss_reduction
        self.backend = backend
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=self.device)
        self._steps = 0  # taken so far; the step number of the noise
        self._device_state = _DeviceState(self.device, self._settings) if capturable else None
        self._replay = ReplayState(model, skip=("alpha",))
        self._passes: list[Pass] = []
        self._active: Pass | None = None
        self._before: Snapshot | None = None  # S0: before the gradient pass
        self._after: Snapshot | None = None  # S1: after it
        self._losses = torch.empty(0)
        self._norm: Tensor | None = None
        self._groups: dict[Key, list[QuantizedWeight]] = {}
        self._guides: list[tuple[Tensor, int]] = []  # the gradients of this step, as the norm saw them
        self._used: list[tuple[Tensor, int]] = []  # gradients that a step has used up

    @property
    def steps(self) -> int:
        """Steps taken so far; if ``capturable`` this waits for the device."""
        return self._steps if self._device_state is None else int(self._device_state.step)

    @property
    def one_minus_beta(self) -> float | None:
        """1 - beta of the coming step; None while training is plain STE."""
        return self._one_minus_beta(self.steps)

    def _one_minus_beta(self, step: int) -> float | None:
        s = self._settings
        return one_minus_beta_at(step, s["total_steps"], s["one_minus_beta"], s["start"], s["schedule"])

    # ---- a step

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run all passes of one batch and leave the estimates in ``.grad``.

        Args:
            closure: runs the model and returns the loss; it does not call ``backward``.

        Returns:
            The loss of the gradient pass, 0-dim float32.
        """
        self.run(closure)
        return self.estimate_()

    def run(self, closure: Callable[[], Tensor]) -> None:
        """Run all passes of one batch; an estimate, or a fused optimizer's step, is to follow."""
        for probe in self.probes():
            with probe:
                probe.backward(closure())

    def probes(self) -> Iterator[Pass]:
        """The passes of a step, to be run in order: the gradient pass, then + and - per direction."""
        if self._active is not None:
            raise RuntimeError("probes() must not be called inside a pass")
        plain = self._device_state is None and self._one_minus_beta(self._steps) is None
        pairs = 0 if plain else self.directions
        self._passes = [Pass(self, 0, 0)]
        self._passes += [Pass(self, i, sign) for i in range(pairs) for sign in (1, -1)]
        self._losses = torch.empty(1 + 2 * pairs, device=self.device)
        self._norm = None
        for one in self._passes:
            yield one
            if not one.done:
                raise RuntimeError("every pass of probes() must be run inside `with probe:`")

    @property
    def pending(self) -> bool:
        """Whether all passes of a step were run, and its estimate is still to be made."""
        return bool(self._passes) and all(one.done for one in self._passes)

    @torch.no_grad()
    def estimate_(self) -> Tensor:
        """Replace the ``.grad`` of the quantized weights by the estimate; call after all passes.

        A direction whose losses are not finite is left out; if all are, or the guide norm is not
        finite, ``.grad`` keeps the straight-through gradient. :meth:`diagnostics` counts both.

        Returns:
            The loss of the gradient pass, 0-dim float32.
        """
        estimate = self.collect()
        if estimate.norm is not None:
            for i, (key, weights) in enumerate(self._groups.items()):
                with self.counting(first=i == 0) as counters:
                    estimate_gradient_(
                        _grads(weights), estimate.losses_plus, estimate.losses_minus,
                        [w.alpha for w in weights], estimate.norm, **self.noise_options(key, weights),
                        counters=counters,
                    )  # fmt: skip
        self.finish()
        return estimate.loss

    # ---- for fused optimizers (optim.py): collect, their step with noise_options, then finish

    def collect(self) -> Estimate:
        """Losses and norm of the step whose passes were run."""
        if not self.pending:
            raise RuntimeError("estimate_ must be called after every pass of probes() was run")
        if any(one.loss is None for one in self._passes):
            raise RuntimeError("every pass must call probe.backward(loss)")
        if self._norm is not None and not _same(self._guides, _versions(self.weights)):
            raise RuntimeError(
                ".grad must not change between the passes and the estimate; to unscale or clip it, call"
                " estimate_() first"
            )
        values = self._losses
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values, group=self.process_group)
            if self.loss_reduction == "mean":
                values /= dist.get_world_size(self.process_group)
        pairs = len(values) // 2
        return Estimate(values[0], values[1 : 1 + pairs], values[1 + pairs :], self._norm)

    @contextmanager
    def counting(self, first: bool) -> Iterator[Tensor]:
        """Counters for one of a step's calls: losses and norm are the same for all of them."""
        counters = self.counters if first else torch.zeros_like(self.counters)
        yield counters
        if not first:
            self.counters[2] += counters[2]

    def noise_options(self, key: Key, weights: list[QuantizedWeight]) -> dict[str, Any]:
        """What perturbation and estimate must agree on."""
        d = self._device_state
        return {
            "grid": key.grid, "straight_through": key.straight_through, "backend": key.backend,
            "one_minus_beta": d.one_minus_beta if d else self._one_minus_beta(self._steps),
            "seed": d.seed if d else self.seed, "step": d.step if d else self._steps,
            "tensor_ids": [w.tensor_id for w in weights], "epsilon_scale": self.epsilon_scale,
        }  # fmt: skip

    def finish(self) -> None:
        """The step is done; the gradients that it used must not become part of the next guide."""
        self._used = _versions(self.weights)
        self._passes, self._groups, self._norm, self._guides = [], {}, None, []
        self._before = self._after = None
        if self._device_state is not None:
            self._device_state.advance()
        self._steps += 1

    # ---- passes

    def _slot(self, one: Pass) -> Tensor:
        """Where the pass puts its loss: losses of + and of - lie in a row, as the ops take them."""
        pairs = len(self._losses) // 2
        return self._losses[0 if one.sign == 0 else 1 + one.direction + (pairs if one.sign < 0 else 0)]

    def _enter(self, one: Pass) -> None:
        if self._active is not None or one.done or one not in self._passes:
            raise RuntimeError("a pass must be entered once, in the order that probes() gives")
        torch.clear_autocast_cache()
        if one.sign == 0:
            self._check_fresh()
            self._before = self._replay.save()
            for w in self.weights:  # a graph's replay could not see that a weight was set in between
                quantized = None if capturing() else w.quantized()
                for module in w.modules:
                    module.quantized = quantized
        else:
            assert self._before is not None
            self._write_probes(one)
            self._replay.load(self._before)
            for weights in self._groups.values():
                for w in weights:
                    for module in w.modules:
                        module.probe = w.buffer
        self._active = one

    def _exit(self, one: Pass, failed: bool) -> None:
        self._active = None
        torch.clear_autocast_cache()
        for w in self.weights:
            for module in w.modules:
                module.probe = module.quantized = None
        if one.sign:
            assert self._after is not None
            self._replay.load(self._after)
        elif failed:
            assert self._before is not None
            self._replay.load(self._before)
        elif len(self._passes) > 1:
            assert self._before is not None
            self._after = self._replay.save()
            self._replay.compare(self._before, self._after)
            self._read_guide()
        if failed:
            self._passes = []

    def _check_fresh(self) -> None:
        used = {id(g): version for g, version in self._used}
        if any(used.get(id(g)) == version for g, version in _versions(self.weights)):
            raise RuntimeError(
                "model.zero_grad() (or the optimizer's) must be called before the next step:"
                " .grad still holds the last estimate"
            )
        self._used = []

    @torch.no_grad()
    def _read_guide(self) -> None:
        """Group the weights that have a gradient, and take the norm over all of them."""
        self._groups = {}
        for w in self.weights:
            grad = w.parameter.grad
            if grad is None:  # took no part in the forward: no guide, no noise, no estimate
                continue
            if not grad.is_contiguous():
                w.parameter.grad = grad = grad.contiguous()
            self._groups.setdefault(w.key(grad, self.backend), []).append(w)
        if not self._groups:
            raise RuntimeError("the gradient pass must leave a gradient for a quantized weight")
        self._guides = _versions(self.weights)
        if len(self._groups) == 1:
            ((key, weights),) = self._groups.items()
            self._norm = guide_norm(
                _grads(weights), [w.alpha for w in weights], grid=key.grid, backend=key.backend
            )
            return
        sums = [
            guide_sumsq(_grads(weights), [w.alpha for w in weights], grid=key.grid, backend=key.backend)
            for key, weights in self._groups.items()
        ]
        self._norm = torch.stack(sums).sum().sqrt().float()

    def _write_probes(self, one: Pass) -> None:
        assert self._norm is not None
        for key, weights in self._groups.items():
            out = [w.memory() for w in weights]
            perturb_quantize_(
                out if one.sign > 0 else None, None if one.sign > 0 else out,
                [w.parameter for w in weights], _grads(weights), [w.alpha for w in weights], self._norm,
                direction=one.direction, **self.noise_options(key, weights),
            )  # fmt: skip

    # ---- state

    def diagnostics(self) -> dict[str, int]:
        """Directions and norms lost to values that were not finite, and bad alphas; waits for the device."""
        return dict(zip(COUNTERS, self.counters.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, counters and settings; with model and optimizer, all that a run needs."""
        return {"steps": self.steps, "counters": self.counters.clone(), **self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run. Its settings must be those of this object."""
        expected = {"steps", "counters", *self._settings}
        if set(state) != expected:
            raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(state)}")
        for name, value in self._settings.items():
            if state[name] != value:
                raise ValueError(f"state[{name!r}] must be {value}, got {state[name]}")
        self._steps = int(state["steps"])
        if self._device_state is not None:
            self._device_state.set_step(self._steps)
        self.counters.copy_(state["counters"])


def _final_one_minus_beta(value: float | None, kappa: float | None, weights: int) -> float:
    if (value is None) == (kappa is None):
        raise ValueError(f"one of one_minus_beta and kappa must be given, got {value} and {kappa}")
    if value is not None:
        validation.unit_interval("one_minus_beta", value)
        return float(value)
    assert kappa is not None
    check_number("kappa", kappa)
    if not 0 <= kappa <= weights:
        raise ValueError(f"kappa must be in 0..{weights}, the number of weights, got {kappa}")
    return kappa / weights


def _grads(weights: list[QuantizedWeight]) -> list[Tensor]:
    grads = [w.parameter.grad for w in weights]
    if any(g is None for g in grads):
        raise RuntimeError(".grad must not be cleared between the passes of a step")
    return [g for g in grads if g is not None]


def _versions(weights: list[QuantizedWeight]) -> list[tuple[Tensor, int]]:
    grads = [w.parameter.grad for w in weights]
    return [(g, g._version) for g in grads if g is not None]


def _same(one: list[tuple[Tensor, int]], other: list[tuple[Tensor, int]]) -> bool:
    return len(one) == len(other) and all(g is h and v == w for (g, v), (h, w) in zip(one, other, strict=True))
