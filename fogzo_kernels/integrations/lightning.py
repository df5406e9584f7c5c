"""FogzoMixin: a LightningModule whose steps of automatic optimization are FOGZO's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..train.estimator import Fogzo

KEY = "fogzo"  # in a checkpoint


class FogzoMixin:
    """Put before ``LightningModule``: ``class Mine(FogzoMixin, L.LightningModule)``.

    Each pass of a step runs ``training_step``. Then the gradients are the estimate, and Lightning clips, steps
    and saves as ever. What ``training_step`` logs is taken from the gradient pass alone; whatever else it
    changes (a metric's state, say) it changes in each pass, unless it asks :attr:`probing`.

    Set :attr:`fogzo_options` before ``fit``: options of :class:`Fogzo` but for ``total_steps``, which is the
    Trainer's ``estimated_stepping_batches``. The model is one from ``quantize_model``. Any optimizer will do.

    Raises:
        ValueError: at the first step, for what FOGZO cannot run: ``accumulate_grad_batches`` above 1, manual
            optimization, a gradient scaler, a strategy that is neither DDP nor of one device.
        RuntimeError: at the first step, the checkpoint that ``fit`` goes on from has no state of FOGZO.

    Attributes:
        fogzo_options: of :class:`Fogzo`.
        fogzo: from the first step of ``fit``; None before.
        probing: whether ``training_step`` runs in a probe, without gradients.
    """

    fogzo_options: Mapping[str, Any] = MappingProxyType({})
    fogzo: Fogzo | None = None
    probing = False
    _state: dict[str, Any] | None = None  # from a checkpoint

    def optimizer_step(
        self: Any,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """A step of the optimizer, which begins with the passes."""
        closure: Any = optimizer_closure
        if self.fogzo is None:
            object.__setattr__(self, "fogzo", self._made())  # it holds the model, and is no part of it
        fogzo: Fogzo = self.fogzo

        @torch.enable_grad()
        def passes() -> Tensor:
            if closure._zero_grad_fn is not None:
                closure._zero_grad_fn()
            for probe in fogzo.probes():
                with probe:
                    self.probing = probe.sign != 0
                    try:
                        output = closure._step_fn()
                        if output.closure_loss is None:
                            raise ValueError("training_step must return a loss in each pass of FOGZO, got None")
                        probe.backward(output.closure_loss)
                    finally:
                        self.probing = False
                if probe.sign == 0:
                    closure._result = output  # what Lightning asks of the closure
            return fogzo.estimate_()

        super().optimizer_step(epoch, batch_idx, optimizer, passes)  # type: ignore[misc]

    def _made(self: Any) -> Fogzo:
        trainer = self.trainer
        model: nn.Module = trainer.strategy.model
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "accumulate_grad_batches must be 1 for FOGZO, whose passes run all micro-batches of a step, got"
                f" {trainer.accumulate_grad_batches}"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(f"precision must need no gradient scaler for FOGZO, got {trainer.precision!r}")
        if model is not self and not isinstance(model, DistributedDataParallel):
            name = type(trainer.strategy).__name__
            raise ValueError(f"strategy must be DDP or of a single device for FOGZO, got {name}")
        if "total_steps" in self.fogzo_options:
            raise ValueError("fogzo_options must not have total_steps, which the Trainer knows")
        fogzo = Fogzo(model, total_steps=int(trainer.estimated_stepping_batches), **self.fogzo_options)
        if trainer.global_step:  # else a model that was loaded begins a run of its own
            if self._state is None:
                raise RuntimeError(
                    f"the checkpoint that fit goes on from must have {KEY!r}, got one without: FOGZO would"
                    " begin again with beta = 1"
                )
            fogzo.load_state_dict(self._state)
        return fogzo

    def on_fit_start(self: Any) -> None:
        """Another ``fit`` is another run."""
        if not self.automatic_optimization:
            raise ValueError("automatic_optimization must be True for FOGZO's mixin, got False")
        object.__setattr__(self, "fogzo", None)
        super().on_fit_start()  # type: ignore[misc]

    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        """Its state goes with the model's."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if self.fogzo is not None:
            checkpoint[KEY] = self.fogzo.state_dict()

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        """Kept until the first step."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        self._state = checkpoint.get(KEY)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, but not in a probe."""
        if not self.probing:
            super().log(*args, **kwargs)  # type: ignore[misc]
