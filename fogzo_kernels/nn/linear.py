"""Quantized modules: a module keeps its ``weight`` as the latent and runs with Q(weight)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import quantize, quantize_
from ..ops import checks as validation
from ..ops.memory import DELTA_RANGE
from ..spec.dtypes import FLOATS
from ..spec.grid import Grid
from ..spec.straight_through import StraightThrough

Alpha = float | Tensor | Callable[[Tensor], float | Tensor]


class QuantLinear(nn.Linear):
    """``nn.Linear`` that runs with Q(weight); made by :func:`quantize_model`.

    ``weight`` is the latent and keeps its name, so a checkpoint of the plain model loads. ``alpha``
    is a float32 buffer that keeps its dtype under ``.to(dtype)``; a state dict without it leaves it
    as it is. ``probe`` is None, or the quantized weight to use instead of Q(weight); ``quantized`` is
    None, or Q(weight) where it is known already.
    """

    alpha: Tensor
    grid: Grid
    straight_through: StraightThrough
    tensor_id: int
    backend: str | None
    probe: Tensor | None
    quantized: Tensor | None

    @classmethod
    def from_linear(
        cls, module: nn.Linear, *, grid: Grid, alpha: Tensor, straight_through: StraightThrough,
        tensor_id: int, backend: str | None = None,
    ) -> QuantLinear:  # fmt: skip
        """Turn a linear module into a quantized one, in place: parameters, hooks and names stay."""
        module.__class__ = cls
        assert isinstance(module, cls)
        module.register_buffer("alpha", alpha)
        module.grid, module.straight_through, module.backend = grid, straight_through, backend
        module.tensor_id, module.probe, module.quantized = tensor_id, None, None
        return module

    def forward(self, input: Tensor) -> Tensor:
        weight = self.probe
        if weight is None:
            weight = quantize(
                self.weight, self.alpha, grid=self.grid, straight_through=self.straight_through,
                quantized=self.quantized, backend=self.backend,
            )  # fmt: skip
        return F.linear(input, weight, self.bias)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The int8 codes of Q(weight), for export; see :func:`fogzo_kernels.dequantize`."""
        out = torch.empty_like(self.weight, dtype=torch.int8)
        quantize_(out, self.weight, self.alpha, grid=self.grid, backend=self.backend)
        return out

    def extra_repr(self) -> str:
        levels, alpha = self.grid.levels, tuple(self.alpha.shape)
        return f"{super().extra_repr()}, levels={levels}, alpha={alpha}, {self.straight_through}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantLinear:
        alpha = self.alpha
        super()._apply(fn, recurse)
        if self.alpha.dtype != torch.float32:  # alpha moves with the module but stays float32
            self.alpha = alpha.to(self.alpha.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "alpha" not in state_dict:  # a checkpoint of the plain model
            state_dict = {**state_dict, prefix + "alpha": self.alpha}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def quantize_model(
    model: nn.Module,
    *,
    grid: Grid,
    alpha: Alpha,
    straight_through: StraightThrough,
    skip: Sequence[str] = (),
    backend: str | None = None,
) -> nn.Module:
    """Quantize the weights of every ``nn.Linear`` of ``model``, in place.

    Args:
        alpha: scale of the grid: a number or a tensor for all, or a function of a weight that returns
            one. One element, one per row, or one per group of the last dimension.
        skip: names of modules to leave alone, as ``model.named_modules()`` gives them; ``*`` and
            ``?`` stand for anything. A name that matches nothing is an error.

    Returns:
        ``model``. Tied weights are quantized once and share their alpha and noise.
    """
    straight_through.check_grid(grid)
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    for pattern in skip:
        matched = [name for name in linears if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"skip must name nn.Linear modules of model, got {pattern!r}")
        for name in matched:
            linears.pop(name)
    if not linears:
        raise ValueError("model must have an nn.Linear to quantize, got none outside skip")
    alphas = {}  # everything is checked before the first module changes
    for name, m in linears.items():
        if m.weight not in alphas:
            alphas[m.weight] = _alpha_of(m.weight, alpha, grid, name)
    taken = [m.tensor_id for m in model.modules() if isinstance(m, QuantLinear)]
    ids = {weight: max(taken, default=-1) + 1 + i for i, weight in enumerate(alphas)}
    for m in linears.values():
        QuantLinear.from_linear(
            m, grid=grid, alpha=alphas[m.weight], straight_through=straight_through,
            tensor_id=ids[m.weight], backend=backend,
        )  # fmt: skip
    return model


@torch.no_grad()
def _alpha_of(weight: Tensor, alpha: Alpha, grid: Grid, name: str) -> Tensor:
    if weight.dtype not in FLOATS:
        wanted = validation.named(FLOATS)
        raise TypeError(f"{name}.weight must be {wanted}, got {validation.named([weight.dtype])}")
    value = alpha(weight.detach()) if callable(alpha) else alpha
    if not isinstance(value, int | float | Tensor):
        raise TypeError(
            "alpha must be a number, a tensor or a function of a weight that returns one, got"
            f" {type(value).__name__}"
        )
    found = torch.as_tensor(value, dtype=torch.float32, device=weight.device).clone().contiguous()
    if not validation.divides(found, weight):
        raise ValueError(
            f"alpha must have one element, one per row or one per group of the last dimension of"
            f" {name}.weight, shape {tuple(weight.shape)}, got shape {tuple(found.shape)}"
        )
    low, high = (x / grid.r for x in DELTA_RANGE)
    if not bool(((low <= found) & (found <= high)).all()):  # NaN fails too
        raise ValueError(
            f"alpha must be finite, > 0 and in {low:g}..{high:g}, got {found.min()}..{found.max()} for {name}"
        )
    return found
