"""GridPull: pulls weights towards their grid points, beside any optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import hadamard_, quantize_
from ..nn.weights import quantized_weights
from ..ops import checks
from ..train.calls import Together, set_alphas, together
from ..train.replay import capturing


class GridPull:
    """After each step of an optimizer, w -= lr * strength * (w - Q(w)) for quantized weights that it updated.

    As decoupled weight decay, but to the nearest point of the grid instead of 0: what CAGE adds to an optimizer
    (arXiv 2510.18784, decoupled form, with lr of the step that was taken). It takes any optimizer of PyTorch's
    kind, with or without :class:`Fogzo`, and costs a pass that quantizes and one that pulls; while it runs, one
    more quantized copy of the weights. Where alpha stays, no pull changes Q(w).

    Args:
        model: with trainable quantized weights.
        optimizer: holds those that are to be pulled, all or some. A learning rate is that of the weight's
            parameter group, as a schedule has left it.
        strength: >= 0; 0 pulls nothing. Set the attribute of this name between steps for a ramp: CAGE starts
            from 0 late in training.
        backend: of the ops; None takes the best available.

    Raises:
        TypeError, ValueError: an argument is wrong, or the optimizer holds no quantized weight of the model.

    Attributes:
        strength: of the coming steps.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, strength: float, *, backend: str | None = None
    ) -> None:
        checks.instance("optimizer", optimizer, torch.optim.Optimizer)
        self.strength, self.backend = strength, backend
        self._weights = {id(w.parameter): w for w in quantized_weights(model)}
        if not any(id(p) in self._weights for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer must hold quantized weights of the model, got none")
        self._handle = optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self.pull(optimizer))

    @property
    def strength(self) -> float:
        """How strong the pull is, in units of 1 / lr."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        checks.finite("strength", value)
        self._strength = float(value)

    def remove(self) -> None:
        """Pull no more."""
        self._handle.remove()

    @torch.no_grad()
    def pull(self, optimizer: torch.optim.Optimizer) -> None:
        """What each step of the optimizer ends with.

        Raises:
            ValueError: lr * strength is above 1: the pull would lead beyond the grid point.
        """
        if not self._strength:
            return
        lost = getattr(optimizer, "found_inf", None)  # in a step that was skipped it is not 0
        if lost is None and capturing():
            lost = getattr(getattr(optimizer, "fogzo", None), "found_inf", None)
        for group in optimizer.param_groups:
            weights = [w for p in group["params"] if p.grad is not None and (w := self._weights.get(id(p)))]
            if not weights:
                continue
            share = group["lr"] * self._strength
            if not isinstance(share, Tensor) and not share <= 1:
                raise ValueError(
                    f"lr * strength must be at most 1, got {group['lr']:g} * {self._strength:g}: the pull would"
                    " lead beyond the grid point"
                )
            if lost is not None:
                device = weights[0].parameter.device
                share = torch.as_tensor(share, device=device).masked_fill(
                    torch.as_tensor(lost).to(device, non_blocking=True).reshape(()) != 0, 0.0
                )
            set_alphas(weights, self.backend)
            for alike in together(weights, self.backend):
                self._pull(alike, [optimizer.state[w.parameter].get("master") for w in alike.weights], share)

    def _pull(self, alike: Together, masters: list[Tensor | None], share: float | Tensor) -> None:
        """Weights of one kind; those with a float32 master copy receive what becomes of that, rounded."""
        latents, how = alike.latents, alike.kind
        pulled = [
            t if m is None else w.rows(m) for w, t, m in zip(alike.weights, latents, masters, strict=True)
        ]
        points = [torch.empty_like(t) for t in pulled]
        quantize_(points, latents, alike.alphas, grid=how.grid, transform=how.transform, backend=self.backend)
        if how.transform is not None:
            hadamard_(points, points, block=how.transform.block, backend=self.backend)
        if isinstance(share, Tensor):
            for t, point in zip(pulled, points, strict=True):
                t.lerp_(point, share.to(t.dtype))
        else:
            torch._foreach_lerp_(pulled, points, share)
        for t, source, master in zip(latents, pulled, masters, strict=True):
            if master is not None:
                t.copy_(source)
