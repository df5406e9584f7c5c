"""Fogzo: replaces straight-through gradients by FOGZO's estimate, around any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import validation
from .functional import estimate_gradient_, guide_sumsq, perturb_quantize_
from .grid import Grid
from .nn import QuantLinear
from .noise import MAX_DIRECTION, MAX_SEED, check_number, check_range
from .replay import ReplayState, Snapshot
from .schedule import SCHEDULES, one_minus_beta_at
from .straight_through import StraightThrough

COUNTERS = ("lost_directions", "lost_norms", "bad_alphas")


class _Weight:
    """A quantized parameter, the modules that share it, and its probe's memory."""

    def __init__(self, module: QuantLinear) -> None:
        self.parameter, self.tensor_id = module.weight, module.tensor_id
        self.modules = [module]
        self.buffer: Tensor | None = None

    def probe(self) -> Tensor:
        p = self.parameter
        b = self.buffer
        if b is None or (b.shape, b.dtype, b.device) != (p.shape, p.dtype, p.device):
            self.buffer = b = torch.empty_like(p, requires_grad=False)
        return b


class _Key(NamedTuple):
    grid: Grid
    straight_through: StraightThrough
    backend: str | None
    latent: torch.dtype
    grad: torch.dtype


class Pass:
    """One forward of a step: the gradient pass (``sign`` 0), or a probe at +eps or -eps."""

    def __init__(self, owner: Fogzo, direction: int, sign: int) -> None:
        self.direction, self.sign = direction, sign
        self.loss: Tensor | None = None
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
        value = loss.detach().float().reshape(())
        self.loss = value.clone() if self.loss is None else self.loss + value

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
        backend: str | None = None,
    ) -> None:
        self._weights = _quantized_weights(model)
        self.device = self._weights[0].parameter.device
        self.total_weights = sum(w.parameter.numel() for w in self._weights)
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an int >= 1, got {total_steps}")
        check_range("seed", seed, MAX_SEED)
        check_range("directions", directions, MAX_DIRECTION + 1)
        if directions < 1:
            raise ValueError(f"directions must be >= 1, got {directions}")
        validation.unit_interval("start", start)
        validation.epsilon_scale(epsilon_scale)
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
        self.steps = 0  # taken so far; the step number of the noise
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=self.device)
        self._replay = ReplayState(model, skip=("alpha",))
        self._passes: list[Pass] = []
        self._active: Pass | None = None
        self._before: Snapshot | None = None  # S0: before the gradient pass
        self._after: Snapshot | None = None  # S1: after it
        self._norm: Tensor | None = None
        self._groups: dict[_Key, list[_Weight]] = {}
        self._estimates: list[tuple[Tensor, int]] = []  # what estimate_ left in .grad

    @property
    def one_minus_beta(self) -> float | None:
        """1 - beta of the coming step; None while training is plain STE."""
        s = self._settings
        return one_minus_beta_at(self.steps, s["total_steps"], s["one_minus_beta"], s["start"], s["schedule"])

    # ---- a step

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run all passes of one batch and leave the estimates in ``.grad``.

        Args:
            closure: runs the model and returns the loss; it does not call ``backward``.

        Returns:
            The loss of the gradient pass, 0-dim float32.
        """
        for probe in self.probes():
            with probe:
                probe.backward(closure())
        return self.estimate_()

    def probes(self) -> Iterator[Pass]:
        """The passes of a step, to be run in order: the gradient pass, then + and - per direction."""
        if self._active is not None:
            raise RuntimeError("probes() must not be called inside a pass")
        pairs = 0 if self.one_minus_beta is None else self.directions
        self._passes = [Pass(self, 0, 0)]
        self._passes += [Pass(self, i, sign) for i in range(pairs) for sign in (1, -1)]
        self._norm = None
        for one in self._passes:
            yield one
            if not one.done:
                raise RuntimeError("every pass of probes() must be run inside `with probe:`")

    @torch.no_grad()
    def estimate_(self) -> Tensor:
        """Replace the ``.grad`` of the quantized weights by the estimate; call after all passes.

        A direction whose losses are not finite is left out; if all are, or the guide norm is not
        finite, ``.grad`` keeps the straight-through gradient. :meth:`diagnostics` counts both.

        Returns:
            The loss of the gradient pass, 0-dim float32.
        """
        if not self._passes or not all(one.done for one in self._passes):
            raise RuntimeError("estimate_ must be called after every pass of probes() was run")
        losses = [one.loss for one in self._passes]
        if any(loss is None for loss in losses):
            raise RuntimeError("every pass must call probe.backward(loss)")
        values = torch.stack([loss.to(self.device) for loss in losses if loss is not None])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values, group=self.process_group)
            if self.loss_reduction == "mean":
                values /= dist.get_world_size(self.process_group)
        if self._norm is not None:
            self._estimate(values[1::2].contiguous(), values[2::2].contiguous(), self._norm)
        self._estimates = [
            (w.parameter.grad, w.parameter.grad._version) for w in self._weights if w.parameter.grad is not None
        ]
        self._passes, self._groups, self._norm = [], {}, None
        self._before = self._after = None
        self.steps += 1
        return values[0]

    def _estimate(self, plus: Tensor, minus: Tensor, norm: Tensor) -> None:
        for i, (key, weights) in enumerate(self._groups.items()):
            counters = torch.zeros_like(self.counters) if i else self.counters
            estimate_gradient_(
                _grads(weights), plus, minus, _alphas(weights), norm, **self._noise(key, weights),
                counters=counters,
            )  # fmt: skip
            if i:  # losses and norm are the same for every group, and counted with the first
                self.counters[2] += counters[2]

    # ---- passes

    def _enter(self, one: Pass) -> None:
        if self._active is not None or one.done or one not in self._passes:
            raise RuntimeError("a pass must be entered once, in the order that probes() gives")
        torch.clear_autocast_cache()
        if one.sign == 0:
            self._check_fresh()
            self._before = self._replay.save()
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
        if one.sign:
            for w in self._weights:
                for module in w.modules:
                    module.probe = None
            assert self._after is not None
            self._replay.load(self._after)
        elif failed:
            assert self._before is not None
            self._replay.load(self._before)
        elif len(self._passes) > 1:
            self._after = self._replay.save()
            self._read_guide()
        if failed:
            self._passes = []

    def _check_fresh(self) -> None:
        """An estimate left in .grad must not become part of the next guide."""
        for w in self._weights:
            grad = w.parameter.grad
            if grad is not None and any(grad is g and g._version == v for g, v in self._estimates):
                raise RuntimeError(
                    "model.zero_grad() (or the optimizer's) must be called before the next step:"
                    " .grad still holds the last estimate"
                )
        self._estimates = []

    @torch.no_grad()
    def _read_guide(self) -> None:
        """Group the weights that have a gradient, and take the norm over all of them."""
        self._groups = {}
        for w in self._weights:
            grad = w.parameter.grad
            if grad is None:  # took no part in the forward: no guide, no noise, no estimate
                continue
            if not grad.is_contiguous():
                w.parameter.grad = grad = grad.contiguous()
            m = w.modules[0]
            key = _Key(m.grid, m.straight_through, self.backend, w.parameter.dtype, grad.dtype)
            self._groups.setdefault(key, []).append(w)
        if not self._groups:
            raise RuntimeError("the gradient pass must leave a gradient for a quantized weight")
        sums = [
            guide_sumsq(_grads(weights), _alphas(weights), grid=key.grid, backend=key.backend)
            for key, weights in self._groups.items()
        ]
        self._norm = torch.stack(sums).sum().sqrt().float()

    def _write_probes(self, one: Pass) -> None:
        assert self._norm is not None
        for key, weights in self._groups.items():
            out = [w.probe() for w in weights]
            perturb_quantize_(
                out if one.sign > 0 else None, None if one.sign > 0 else out,
                [w.parameter for w in weights], _grads(weights), _alphas(weights), self._norm,
                direction=one.direction, **self._noise(key, weights),
            )  # fmt: skip

    def _noise(self, key: _Key, weights: list[_Weight]) -> dict[str, Any]:
        """What perturbation and estimate must agree on."""
        return {
            "grid": key.grid, "straight_through": key.straight_through, "backend": key.backend,
            "one_minus_beta": self.one_minus_beta, "seed": self.seed, "step": self.steps,
            "tensor_ids": [w.tensor_id for w in weights], "epsilon_scale": self.epsilon_scale,
        }  # fmt: skip

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
        self.steps = int(state["steps"])
        self.counters.copy_(state["counters"])


def _quantized_weights(model: nn.Module) -> list[_Weight]:
    found: dict[Tensor, _Weight] = {}
    for m in model.modules():
        if isinstance(m, QuantLinear) and m.weight.requires_grad:
            if m.weight in found:
                found[m.weight].modules.append(m)
            else:
                found[m.weight] = _Weight(m)
    weights = list(found.values())
    if not weights:
        raise ValueError("model must have trainable quantized weights: call quantize_model first")
    ids = [w.tensor_id for w in weights]
    if len(set(ids)) != len(ids):
        raise ValueError(f"model must have a tensor_id of its own for each weight, got {ids}")
    devices = {w.parameter.device for w in weights}
    if len(devices) > 1:
        raise ValueError(f"model must have its quantized weights on one device, got {devices}")
    modules = [w.modules[0] for w in weights]
    epsilons = {m.straight_through.epsilon(m.grid) for m in modules}
    if len(epsilons) > 1:
        raise ValueError(
            "model must have one eps in step units for all quantized weights, so that one finite"
            f" difference serves them all, got {sorted(epsilons)}"
        )
    return weights


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


def _grads(weights: list[_Weight]) -> list[Tensor]:
    grads = [w.parameter.grad for w in weights]
    if any(g is None for g in grads):
        raise RuntimeError(".grad must not be cleared between the passes of a step")
    return [g for g in grads if g is not None]


def _alphas(weights: list[_Weight]) -> list[Tensor]:
    return [w.modules[0].alpha for w in weights]
