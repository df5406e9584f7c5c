"""Lightning: GuidedNoise, a callback; FogzoModuleMixin, a LightningModule whose steps are FOGZO's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..train.attached import Attached
from ..train.fogzo import Fogzo
from ..train.step import Pass

try:
    from lightning.pytorch import Callback
except ImportError:  # the package of the older name
    from pytorch_lightning import Callback  # type: ignore[assignment]

__all__ = ["FogzoModuleMixin", "GuidedNoise"]

KEY = "fogzo"  # in a checkpoint


def _begun(trainer: Any, options: Mapping[str, Any], state: dict[str, Any] | None) -> Fogzo:
    """Makes the Fogzo of a ``fit``; one that continues a checkpoint loads its state."""
    own = dict(options)
    may_differ = own.pop("may_differ", ())
    fogzo = Fogzo(trainer.strategy.model, int(trainer.estimated_stepping_batches), **own)
    if trainer.global_step:  # else a model that was loaded begins a run of its own
        assert state is not None
        fogzo.load_state_dict(state, may_differ=may_differ)
    return fogzo


class GuidedNoise(Callback):
    """Guided noise in any LightningModule with automatic optimization and one optimizer.

    ``fit`` makes a :class:`fogzo_kernels.Fogzo` of the model as it starts, and attaches the optimizer. The
    module stays as it is. Checkpoints hold the state, so a run resumes to the bit.

    Args:
        options: options of :class:`fogzo_kernels.Fogzo` but ``total_steps``, which is the Trainer's
            ``estimated_stepping_batches``, and ``directions``, which is 0. ``may_differ`` goes to
            :meth:`fogzo_kernels.Fogzo.load_state_dict`.

    Raises:
        ValueError: when ``fit`` starts, there are several optimizers, or an option is wrong.
        RuntimeError: when ``fit`` continues a checkpoint without the state of this callback.

    Attributes:
        fogzo: of the ``fit`` that runs or ran last, or None.

    Example:
        >>> import lightning
        >>> from fogzo_kernels.integrations.lightning import GuidedNoise
        >>> trainer = lightning.Trainer(max_epochs=1, callbacks=[GuidedNoise(kappa=0.1)], logger=False)
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.fogzo: Fogzo | None = None
        self._attached: Attached | None = None
        self._state: dict[str, Any] | None = None  # from a checkpoint

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the optimizer. Lightning calls it.

        Args:
            trainer, pl_module: as Lightning gives them.
        """
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"configure_optimizers must return one optimizer for GuidedNoise, got {len(trainer.optimizers)}"
            )
        if trainer.global_step and self._state is None:
            raise RuntimeError(
                "the checkpoint that fit continues must have the state of GuidedNoise, got one without: the"
                " noise would begin again. Train with the callback from the first step"
            )
        self.fogzo = _begun(trainer, self.options, self._state)
        self._attached = self.fogzo.attach(trainer.optimizers[0])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hook off the optimizer. Lightning calls it.

        Args:
            trainer, pl_module: as Lightning gives them.
        """
        if self._attached is not None:
            self._attached.remove()
        self._attached = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. Lightning calls it."""
        return {} if self.fogzo is None else self.fogzo.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts. Lightning calls it.

        Args:
            state_dict: what :meth:`state_dict` returned.
        """
        self._state = dict(state_dict)


class FogzoModuleMixin:
    """The steps of FOGZO in a LightningModule: ``class Mine(FogzoModuleMixin, L.LightningModule)``.

    Each pass of a step runs ``training_step``; with ``accumulate_grad_batches`` it runs all micro-batches, when
    the last has come. ``.grad`` holds the estimate afterwards, and Lightning clips, steps and saves as usual,
    with any optimizer. Logs come from the gradient pass alone. Anything else that ``training_step`` changes,
    such as the state of a metric, it changes in each pass, unless it asks ``self.probing``. With manual
    optimization, ``training_step`` runs the passes of ``self.fogzo`` itself, on one device.

    Set ``fogzo_options`` before ``fit``. The model comes from :func:`fogzo_kernels.quantize_model`.

    Raises:
        ValueError: at the first step, the strategy is neither DDP nor of a single device, or manual
            optimization meets DDP or a gradient scaler.
        RuntimeError: at the first step, the checkpoint that ``fit`` continues has no state of FOGZO.

    Attributes:
        fogzo_options: options of :class:`fogzo_kernels.Fogzo` except ``total_steps``, which is the Trainer's
            ``estimated_stepping_batches``. ``may_differ`` goes to
            :meth:`fogzo_kernels.Fogzo.load_state_dict`; ``["total_steps"]`` continues a run for more steps.
        probing: whether ``training_step`` runs in a probe, without gradients.

    Example:
        >>> import lightning
        >>> from fogzo_kernels.integrations.lightning import FogzoModuleMixin
        >>> class Mine(FogzoModuleMixin, lightning.LightningModule):
        ...     fogzo_options = {"directions": 1, "kappa": 0.1}
        ...     def training_step(self, batch, index): return self.model(batch).square().mean()
        >>> Mine().probing
        False
    """

    fogzo_options: Mapping[str, Any] = MappingProxyType({})
    probing = False
    _state: dict[str, Any] | None = None  # from a checkpoint
    _fogzo: Fogzo | None = None
    _waiting: tuple[Any, ...] = ()  # arguments of training_step, of micro-batches that have come

    @property
    def fogzo(self: Any) -> Fogzo:
        """The :class:`fogzo_kernels.Fogzo` of the ``fit`` that runs or ran last; the first use makes it."""
        if self._fogzo is None:
            object.__setattr__(self, "_fogzo", self._new_fogzo())  # no submodule: it has the model
        fogzo: Fogzo = self._fogzo
        return fogzo

    def optimizer_step(
        self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Run the passes, then a step of the optimizer. Lightning calls it.

        Args:
            epoch, batch_idx, optimizer, optimizer_closure: as Lightning gives them.
        """
        closure = optimizer_closure
        if self.trainer.fit_loop._skip_backward:
            closure()  # of StochasticWeightAveraging, for statistics of BatchNorm: no step
            return
        waiting, self._waiting = self._waiting, ()
        steps = [partial(closure._step_fn.func, dict(enumerate(arguments))) for arguments in waiting]
        steps.append(closure._step_fn)

        @torch.enable_grad()
        def passes() -> Tensor:
            if closure._zero_grad_fn is not None:
                closure._zero_grad_fn()
            for probe in self.fogzo.probes():
                with probe:
                    self.probing = probe.sign != 0
                    try:
                        for step in steps:
                            output = self._run(probe, step, last=step is steps[-1])
                    finally:
                        self.probing = False
                if probe.sign == 0:
                    closure._result = output  # what Lightning asks of the closure
            estimated: Tensor = self.fogzo.estimate_()
            return estimated

        super().optimizer_step(epoch, batch_idx, optimizer, passes)  # type: ignore[misc]

    def _run(self: Any, probe: Pass, step: Callable[[], Any], last: bool) -> Any:
        """Runs a micro-batch of a pass; the last exchanges gradients."""
        model, scaler = self.trainer.strategy.model, getattr(self.trainer.precision_plugin, "scaler", None)
        alone = probe.sign == 0 and not last and isinstance(model, DistributedDataParallel)
        with model.no_sync() if alone else nullcontext():
            output = step()
            if output.closure_loss is None:
                raise ValueError("training_step must return a loss in each pass of FOGZO, got None")
            probe.backward(output.closure_loss if scaler is None else scaler.scale(output.closure_loss))
        return output

    def _or_later(self: Any, step: Callable[..., Any]) -> Callable[..., Any]:
        """Makes a ``training_step`` that keeps its arguments and returns 0 until the last micro-batch."""

        def training_step(*arguments: Any) -> Any:
            loop = self.trainer.fit_loop
            if loop._skip_backward or not loop._should_accumulate():  # no pass of a step accumulates
                return step(*arguments)
            self._waiting = (*self._waiting, arguments)
            return torch.zeros((), dtype=torch.float32, device=self.device, requires_grad=True)

        return training_step

    def _new_fogzo(self: Any) -> Fogzo:
        trainer = self.trainer
        model: nn.Module = trainer.strategy.model
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and not self.automatic_optimization:
            raise ValueError(
                "precision must need no gradient scaler for FOGZO with manual optimization, got"
                f" {trainer.precision!r}"
            )
        shared = self.automatic_optimization and isinstance(model, DistributedDataParallel)
        if model is not self and not shared:
            raise ValueError(
                "strategy must be DDP or of a single device for FOGZO, of a single device with manual"
                f" optimization, got {type(trainer.strategy).__name__}"
            )
        if "total_steps" in self.fogzo_options:
            raise ValueError("fogzo_options must not have total_steps, which the Trainer knows")
        if trainer.global_step and self._state is None:
            raise RuntimeError(
                f"the checkpoint must have {KEY!r}, as FogzoModuleMixin writes it, got one without: FOGZO"
                " would begin again with beta = 1"
            )
        return _begun(trainer, self.fogzo_options, self._state)

    def on_fit_start(self: Any) -> None:
        """Begin a new run. Lightning calls it."""
        object.__setattr__(self, "_fogzo", None)
        self._waiting = ()
        if self.automatic_optimization and self.trainer.accumulate_grad_batches != 1:
            object.__setattr__(self, "training_step", self._or_later(type(self).training_step.__get__(self)))
        super().on_fit_start()  # type: ignore[misc]

    def on_fit_end(self: Any) -> None:
        """Restore ``training_step``. Lightning calls it."""
        self.__dict__.pop("training_step", None)
        super().on_fit_end()  # type: ignore[misc]

    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        """Add the state of FOGZO to a checkpoint. Lightning calls it.

        Args:
            checkpoint: the dict that Lightning saves.
        """
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if self._fogzo is not None:
            checkpoint[KEY] = self._fogzo.state_dict()

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the state of FOGZO until the first step. Lightning calls it.

        Args:
            checkpoint: the dict that Lightning loaded.
        """
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        self._state = checkpoint.get(KEY)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, except in a probe."""
        if not self.probing:
            super().log(*args, **kwargs)  # type: ignore[misc]
