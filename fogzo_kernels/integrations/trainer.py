"""FogzoTrainer: transformers' Trainer, whose steps are FOGZO's. Needs ``accelerate``, as the Trainer does."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from ..train.fogzo import Fogzo

__all__ = ["FogzoTrainer", "FogzoTrainerMixin"]

STATE = "fogzo.pt"  # in a checkpoint's folder
REFUSED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


class FogzoTrainerMixin:
    """The steps of FOGZO in a ``transformers.Trainer``: ``class Mine(FogzoTrainerMixin, SFTTrainer)``.

    Put it before ``Trainer`` or a subclass of it. It keeps the micro-batches of gradient accumulation until the
    last has come. Each pass of the step then runs them all, by the Trainer's own ``training_step``. ``.grad``
    holds the estimate afterwards, and the Trainer clips, steps, logs and saves as usual, with any optimizer. A
    checkpoint has a file ``fogzo.pt``, and logs have the numbers of :meth:`fogzo_kernels.Fogzo.stats` with
    ``fogzo_`` before their names.

    Args:
        fogzo: options of :class:`fogzo_kernels.Fogzo` except ``total_steps``, which is the Trainer's
            ``max_steps``. ``may_differ`` goes to :meth:`fogzo_kernels.Fogzo.load_state_dict`;
            ``["total_steps"]`` resumes a run for more steps.
        args, kwargs: arguments of the Trainer. The model comes from :func:`fogzo_kernels.quantize_model`.

    Raises:
        ValueError: at the first step, an option is wrong, or the model is one of DeepSpeed, FSDP, Megatron or
            DataParallel, which FOGZO cannot run.
        FileNotFoundError: at the first step, the checkpoint to resume from has no ``fogzo.pt``.

    Attributes:
        fogzo: the :class:`fogzo_kernels.Fogzo` from the first step of ``train()`` on; None before.

    Example:
        >>> import transformers
        >>> from fogzo_kernels.integrations.trainer import FogzoTrainerMixin
        >>> class Mine(FogzoTrainerMixin, transformers.Trainer):
        ...     def compute_loss(self, model, inputs, **options):
        ...         return model(inputs["x"]).square().mean()
        >>> Mine(torch.nn.Linear(8, 4), fogzo={"kappa": 0.1}).fogzo is None
        True
    """

    def __init__(self, *args: Any, fogzo: dict[str, Any], **kwargs: Any) -> None:
        if "total_steps" in fogzo:
            raise ValueError("fogzo must not have total_steps, which is the Trainer's max_steps")
        self._options = dict(fogzo)
        self._may_differ = self._options.pop("may_differ", ())
        self.fogzo: Fogzo | None = None
        self._resumed: str | None = None  # the checkpoint's folder
        self._awaited = 1  # micro-batches of the step
        self._batches: list[Any] = []  # that have come
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of the next step, as the Trainer does, and note how many they are."""
        samples = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._awaited, self._batches = len(samples[0]), []
        return samples

    def training_step(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run all passes at the last micro-batch of a step.

        Args:
            model: the model, as the Trainer has wrapped it.
            inputs: a micro-batch.
            num_items_in_batch: number of targets in the step, as the Trainer counts them.

        Returns:
            The loss of the gradient pass, a 0-dim float32 tensor; 0 before the last micro-batch.
        """
        total = torch.zeros((), dtype=torch.float32, device=self.args.device)
        self._batches.append(inputs)
        if len(self._batches) < self._awaited:
            return total
        batches, self._batches = self._batches, []
        if self.fogzo is None:
            self.fogzo = self._new_fogzo(model)
        scaler = getattr(self.accelerator, "scaler", None)
        for probe in self.fogzo.probes():
            with probe:

                def backward(loss: Tensor, probe: Any = probe, **kwargs: Any) -> None:
                    probe.backward(loss if scaler is None else scaler.scale(loss))

                self.accelerator.backward = backward  # hides the class's own
                try:
                    for i, batch in enumerate(batches):
                        alone = probe.sign == 0 and i < len(batches) - 1
                        with self.accelerator.no_sync(model) if alone else nullcontext():
                            loss = super().training_step(model, batch, num_items_in_batch)  # type: ignore[misc]
                        if probe.sign == 0:
                            total += loss
                finally:
                    del self.accelerator.backward
        self.fogzo.estimate_()
        return total

    def _new_fogzo(self: Any, model: nn.Module) -> Fogzo:
        kind = self.accelerator.distributed_type
        if kind in REFUSED or isinstance(model, nn.DataParallel):
            shown = "DataParallel" if isinstance(model, nn.DataParallel) else kind.value
            raise ValueError(f"model must be plain or DistributedDataParallel for FOGZO, got {shown}")
        fogzo = Fogzo(model, total_steps=self.state.max_steps, **self._options)
        if self._resumed is not None:
            path = Path(self._resumed, STATE)
            if not path.exists():
                raise FileNotFoundError(
                    f"resume_from_checkpoint must have {STATE}, got {self._resumed} without: FOGZO would begin"
                    " again with beta = 1"
                )
            state = torch.load(path, map_location=fogzo.device, weights_only=True)
            fogzo.load_state_dict(state, may_differ=self._may_differ)
        return fogzo

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.fogzo, self._batches = None, []
        given = kwargs.get("resume_from_checkpoint", args[2] if len(args) > 2 else None)
        self._resumed = given if isinstance(given, str) else None
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save and self.fogzo is not None:
            part = Path(output_dir, STATE + ".part")
            torch.save(self.fogzo.state_dict(), part)
            os.replace(part, Path(output_dir, STATE))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the numbers of :meth:`fogzo_kernels.Fogzo.stats` added.

        Args:
            logs: numbers by name; FOGZO's numbers are added.
            args, kwargs: other arguments of the Trainer's method.
        """
        if self.fogzo is not None and "loss" in logs:
            stats = self.fogzo.stats()
            logs |= {f"fogzo_{name}": x for name, x in stats.items() if math.isfinite(x) and name != "loss"}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class FogzoTrainer(FogzoTrainerMixin, Trainer):
    """``transformers.Trainer`` with the steps of FOGZO; :class:`FogzoTrainerMixin` says how.

    Args:
        fogzo: options of :class:`fogzo_kernels.Fogzo`, as :class:`FogzoTrainerMixin` takes them.
        args, kwargs: arguments of the Trainer. The model comes from :func:`fogzo_kernels.quantize_model`.

    Example:
        >>> from fogzo_kernels.integrations.trainer import FogzoTrainer
        >>> options = {"directions": 1, "kappa": 0.1}
        >>> trainer = FogzoTrainer(torch.nn.Linear(8, 4), fogzo=options)
        >>> trainer.fogzo is None  # until the first step
        True
    """
