"""Attached: guided noise as a hook of an optimizer, for training loops that know no passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from .guards.uncompiled import uncompiled

if TYPE_CHECKING:
    from .fogzo import Fogzo


class Attached:
    """The hook of :meth:`Fogzo.attach`, which adds guided noise when a step of the optimizer begins.

    Attributes:
        optimizer: the optimizer that has the hook.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2))
        >>> fogzo = fk.Fogzo(model, total_steps=100)
        >>> attached = fogzo.attach(torch.optim.AdamW(model.parameters()))
        >>> attached.remove()
        >>> fogzo.attached
        False
    """

    def __init__(self, fogzo: Fogzo, optimizer: Optimizer) -> None:
        self._fogzo, self.optimizer = fogzo, unwrapped(optimizer)
        self._fused = hasattr(self.optimizer, "fogzo")  # whether its step makes the estimate itself
        self._check()
        if self._fused:
            self.optimizer.fogzo = fogzo  # type: ignore[attr-defined]
        self._let_backwards(True)
        self._hook = self.optimizer.register_step_pre_hook(self._before_step)
        fogzo._run.attached = self

    def _check(self) -> None:
        run, optimizer = self._fogzo._run, self.optimizer
        if run.settings.directions:
            raise ValueError(
                f"directions must be 0 for attach, got {run.settings.directions}: probes run the model again,"
                " by a closure or passes (fogzo.backward, fogzo.probes); guided noise has none"
            )
        if run.attached is not None:
            raise RuntimeError(
                "attach must be called once, got a Fogzo that is attached: call remove() on what attach"
                " returned"
            )
        if self._fused and getattr(optimizer, "fogzo", None) not in (None, self._fogzo):
            raise ValueError("optimizer must have no other Fogzo, got one with another as its fogzo")
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = [w.name for w in run.weights if id(w.parameter) not in own]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise ValueError(
                f"optimizer must have every quantized weight of the model, got one without {others[0]}{more}:"
                " the noise is in proportion to the norm of all gradients. For several optimizers run"
                " fogzo.backward(closure), then their steps"
            )

    def remove(self) -> None:
        """Remove the hook. The optimizer's steps are plain straight-through from now on."""
        self._hook.remove()
        self._let_backwards(False)
        if self._fogzo._run.attached is self:
            self._fogzo._run.attached = None
            if self._fused:
                self.optimizer.fogzo = None

    def _let_backwards(self, attached: bool) -> None:
        """Let sharded weights have backwards outside of passes, or no more."""
        for placement in [w.placement for w in self._fogzo._run.weights if w.placement.sends_codes]:
            placement.attached = attached

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Add the noise now, or, where the step runs a closure, after that."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._add_noise()
            return None
        if len(args) > 1:
            return (args[0], self._then_noise(closure), *args[2:]), kwargs
        return args, {**kwargs, "closure": self._then_noise(closure)}

    def _then_noise(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._add_noise()
            return loss

        return run

    @uncompiled
    @torch.no_grad()
    def _add_noise(self) -> None:
        run = self._fogzo._run
        if run.gradients.all_estimates:
            return  # nothing has written gradients since the last step, which gave them their noise
        step = self._fogzo._begin_step("the step of an optimizer")
        step.take_over()
        if not (step.groups or step.lost):  # no gradient, or all are 0
            step.end()
        if self._fused or not step.groups:
            return
        try:
            step.replace_gradients(step.collect())
        except BaseException:
            step.end()
            raise
        step.end(estimated=True)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that a wrapper of accelerate or Lightning steps."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer
