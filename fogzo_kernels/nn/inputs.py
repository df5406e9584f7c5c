"""What a quantized module does with its input: quantize it, and bring it to the basis of its weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import hadamard, quantize
from ..ops import memory, transforms
from ..ops.differentiable import plain as plain_quantize
from ..ops.listop import is_plain
from ..spec.hadamard import Hadamard
from ..spec.quantizer import Quantizer
from ..spec.scale import FixedScale, LearnedScale, MeasuredScale
from .weight import FLOOR, QuantizerOptions, hold_alphas, in_its_range, is_held, measure_

if TYPE_CHECKING:
    from .quantized import QuantizedWeight


def rotated(x: Tensor, block: int, backend: str | None) -> Tensor:
    """H of each block of the last dimension, differentiable; x itself where there are none."""
    return hadamard(x.contiguous(), block=block, backend=backend) if block else x


def check_activation(name: str, activation: Quantizer) -> None:
    """Raise unless it is a quantizer that inputs can have: one that no input makes 0, one learned alpha."""
    scale = activation.scale
    if isinstance(scale, LearnedScale):
        first = scale.first(activation.grid)
        whole = isinstance(first, MeasuredScale) and first.granularity == "tensor"
        number = isinstance(first, FixedScale) and isinstance(first.alpha, int | float)
        if not (whole or number):
            raise ValueError(
                f"{name} must have one learned alpha for a module's inputs, granularity 'tensor', got {scale}"
            )
    if isinstance(scale, MeasuredScale) and not (scale.least or scale.add):
        raise ValueError(f"{name} must have a scale with least > 0, for inputs that are all 0, got {scale}")


class InputQuantizer(QuantizerOptions):
    """The quantizer of a module's input, and whether its scale has a value.

    A learned scale is the module's parameter ``input_alpha``.

    Attributes:
        quantizer: grid, scale and straight-through estimator.
        calibrated: whether ``input_alpha`` has a value.
        calibrating: whether the next input gives it one.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.calibrated = self.calibrating = False

    def note(self, loaded: Tensor) -> None:
        """Sets ``calibrated``: a loaded NaN means that the model's inputs were not calibrated."""
        self.calibrated = not bool(loaded.isnan())

    def values(self, module: QuantizedWeight, input: Tensor, block: int) -> Tensor:
        """The quantized input, in the basis of blocks of ``block`` elements (0: as it is)."""
        how, backend = self.quantizer, module.backend
        rows, alpha, factor, lost = self.scaled(module, input)
        if is_plain(rows, alpha):
            values = plain_quantize(rows, alpha, self.options(rows.shape[-1], backend))
        else:
            values = quantize(rows, alpha, alpha_factor=factor, backend=backend, **how.options)
        values = with_lost(values, lost).view(input.shape)
        own = how.block
        if own == block:
            return values
        if own:  # rows are what the transform went over, whatever the input's last dimension is
            values = rotated(module.input_rows(values), own, backend).view(input.shape)
        return rotated(values, block, backend)

    def scaled(self, module: QuantizedWeight, input: Tensor) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """Rows of an input, alpha, its gradient's factor, and the cells that :func:`with_lost` makes NaN."""
        rows, how = module.input_rows(input).contiguous(), self.quantizer
        if how.block and rows.shape[-1] % how.block:
            raise ValueError(
                f"activation must have a transform whose block divides a row of the input, of {rows.shape[-1]}"
                f" elements, got {how.transform}"
            )
        scale, factor = how.scale, 1.0
        if isinstance(scale, FixedScale | MeasuredScale):
            alpha = self._made(scale, rows.detach(), module.backend)
        else:
            assert isinstance(scale, LearnedScale)
            # of LSQ: the features of a layer, which are those of a token or a sample, share it
            factor = scale.gradient_factor(how.grid, rows.shape[-1])
            alpha = self._learned(scale, module, rows)
        alpha, lost = _usable(how, alpha, rows) if rows.numel() else (alpha, None)
        return rows, alpha, factor, lost

    def _made(self, scale: FixedScale | MeasuredScale, rows: Tensor, backend: str | None) -> Tensor:
        if isinstance(scale, FixedScale):
            return scale.of(rows)
        measure = Measured.apply if transforms.active() else Measured.forward
        alpha: Tensor = measure(rows, scale, self.quantizer.transform, backend)
        return alpha

    def _learned(self, scale: LearnedScale, module: QuantizedWeight, rows: Tensor) -> Tensor:
        """The parameter, which takes its first value here while it is calibrated, in its range."""
        name = module.weight_quantizer.path or "the model"
        if self.calibrating:
            first = scale.first(self.quantizer.grid)
            alpha = self._made(first, rows, module.backend)
            if not (float(alpha) > 0 and bool(alpha.isfinite()) and bool(rows.isfinite().all())):
                kind = "finite values" if rows.isfinite().all() else "values that are not finite"
                raise ValueError(
                    f"batch must give each input a scale > 0, got {kind} for the input of {name}, and"
                    f" {float(alpha)} by {first}"
                )
            self.set_alpha(module, alpha)
            self.calibrating = False
        if not self.calibrated:
            raise RuntimeError(
                f"input_alpha, the learned scale of the input of {name}, has no value yet: call"
                " fogzo_kernels.calibrate_inputs_(model, lambda: model(batch)) once, before training"
            )
        if torch.compiler.is_exporting():
            return in_its_range(module.input_alpha, module.input_alpha_least)
        alpha, least = module.input_alpha, module.input_alpha_least
        if module.pass_weight is None and not (is_plain(rows, alpha) and is_held(alpha, least)):
            hold_alphas([module], ("input_alpha",))  # in a pass the step has done it
        return alpha

    @torch.no_grad()
    def set_alpha(self, module: QuantizedWeight, alpha: Tensor) -> None:
        """Give a learned scale its first value, 0-dim."""
        module.input_alpha.copy_(alpha)
        module.input_alpha_least = module.input_alpha.detach() * FLOOR
        self.calibrated = True


@transforms.one_by_one
class Measured(torch.autograd.Function):
    """Alpha that a scale measures of rows; for transforms of ``torch.func``, which let nothing be written."""

    @staticmethod
    def forward(rows: Tensor, scale: MeasuredScale, transform: Hadamard | None, backend: str | None) -> Tensor:
        alpha = torch.empty(scale.shape_for(*rows.shape), dtype=torch.float32, device=rows.device)
        measure_([alpha], [rows.contiguous()], scale, transform, backend)
        return alpha

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return None, None, None, None


def _usable(how: Quantizer, alpha: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Alphas that ops take, whatever the input holds, and which cells :func:`with_lost` makes NaN.

    What is not finite must not become a finite value: the code of NaN is the lowest one. With NaN, as a plain
    network would have, the step is lost and the run goes on. Each alpha of a measured scale has a cell;
    the cell of another scale is all of the input. A GPU's kernels write NaN where alpha is NaN, without a wait.
    """
    on_cpu = rows.device.type == "cpu"
    seen = on_cpu and not (torch.compiler.is_compiling() or transforms.active())
    if isinstance(how.scale, MeasuredScale):
        low, high = memory.alpha_range(how.grid.r)
        if not on_cpu:
            return alpha + 0 * alpha, None  # inf becomes NaN
        if seen and memory.in_range(alpha, low, high):
            return alpha, None
        lost = ~((alpha >= low) & (alpha <= high))
    else:
        least, most = rows.detach().aminmax()
        if seen and math.isfinite(least) and math.isfinite(most):
            return alpha, None
        lost = ~(least.isfinite() & most.isfinite())
    if not on_cpu:
        return torch.where(lost, math.nan, alpha), None
    return torch.where(lost, 1.0, alpha), lost


def with_lost(rows: Tensor, lost: Tensor | None) -> Tensor:
    """Rows in which these cells are NaN."""
    if lost is None:
        return rows
    nan = torch.zeros_like(lost, dtype=rows.dtype).masked_fill(lost, math.nan)
    return (rows.view(lost.numel(), -1) + nan.view(-1, 1)).view(rows.shape)
