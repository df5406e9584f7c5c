"""What a quantized module does with its input: quantize it, and bring it to the basis of its weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import hadamard, quantize
from ..ops import memory, transforms
from ..spec.hadamard import Hadamard, block_of
from ..spec.quantizer import Quantizer
from ..spec.scale import FixedScale, LearnedScale, MeasuredScale
from .scales import hold_alphas, in_its_range, measure_

if TYPE_CHECKING:
    from .module import QuantizedModule


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


def quantized_input(module: QuantizedModule, input: Tensor, block: int) -> Tensor:
    """The input that a module runs with, in the basis of blocks of ``block`` elements (0: as it is)."""
    how, backend = module.activation, module.backend
    if how is None:
        return rotated(input, block, backend)
    rows, own = module.input_rows(input).contiguous(), block_of(how.transform)
    if own and rows.shape[-1] % own:
        raise ValueError(
            f"activation must have a transform whose block divides a row of the input, of {rows.shape[-1]}"
            f" elements, got {how.transform}"
        )
    alpha, factor, lost = input_alpha(module, how, rows)
    found = quantize(
        rows, alpha, grid=how.grid, straight_through=how.straight_through, transform=how.transform,
        alpha_factor=factor, backend=backend,
    )  # fmt: skip
    found = with_lost(found, lost).view(input.shape)
    if own == block:
        return found
    if own:  # rows are what the transform went over, whatever the input's last dimension is
        found = rotated(module.input_rows(found), own, backend).view(input.shape)
    return rotated(found, block, backend)


def input_alpha(module: QuantizedModule, how: Quantizer, rows: Tensor) -> tuple[Tensor, float, Tensor | None]:
    """Alpha of an input, the factor of its gradient, and which cells are to be NaN, see :func:`usable`."""
    alpha, factor = scale_of(module, how, rows)
    return (alpha, factor, None) if not rows.numel() else usable(how, alpha, factor, rows)


def usable(how: Quantizer, alpha: Tensor, factor: float, rows: Tensor) -> tuple[Tensor, float, Tensor | None]:
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
            return alpha + 0 * alpha, factor, None  # inf becomes NaN
        if seen and memory.in_range(alpha, low, high):
            return alpha, factor, None
        lost = ~((alpha >= low) & (alpha <= high))
    else:
        least, most = rows.detach().aminmax()
        if seen and math.isfinite(least) and math.isfinite(most):
            return alpha, factor, None
        lost = ~(least.isfinite() & most.isfinite())
    if not on_cpu:
        return torch.where(lost, math.nan, alpha), factor, None
    return torch.where(lost, 1.0, alpha), factor, lost


def with_lost(rows: Tensor, lost: Tensor | None) -> Tensor:
    """Rows in which these cells are NaN."""
    if lost is None:
        return rows
    nan = torch.zeros_like(lost, dtype=rows.dtype).masked_fill(lost, math.nan)
    return (rows.view(lost.numel(), -1) + nan.view(-1, 1)).view(rows.shape)


def scale_of(module: QuantizedModule, how: Quantizer, rows: Tensor) -> tuple[Tensor, float]:
    """Alpha as the scale has it, and the factor of its gradient."""
    scale = how.scale
    if isinstance(scale, MeasuredScale):
        if transforms.active():
            return Measured.apply(rows.detach(), scale, how.transform, module.backend), 1.0
        alpha = torch.empty(scale.shape_for(*rows.shape), dtype=torch.float32, device=rows.device)
        measure_([alpha], [rows.detach()], scale, how.transform, module.backend)
        return alpha, 1.0
    if isinstance(scale, FixedScale):
        return scale.of(rows), 1.0
    assert isinstance(scale, LearnedScale)
    if module.calibrating:
        first_alpha_(module, how, rows)
    if not module.input_is_calibrated:
        raise RuntimeError(
            f"input_alpha, the learned scale of the input of {named(module)}, has no value yet: call"
            " fogzo_kernels.calibrate_inputs_(model, lambda: model(batch)) once, before training"
        )
    alpha = module.input_alpha
    if torch.compiler.is_exporting():
        alpha = in_its_range(alpha, module.input_alpha_least)
    elif module.held is None:  # else the step has done it
        hold_alphas([module], ("input_alpha",))
    # of LSQ: the features of a layer, which are those of a token or a sample, share it
    return alpha, scale.gradient_factor(how.grid, rows.shape[-1])


def named(module: QuantizedModule) -> str:
    return module.path or "the model"


@transforms.one_by_one
class Measured(torch.autograd.Function):
    """Alpha of rows under a transform of ``torch.func``, which lets nothing be written; no gradient."""

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


@torch.no_grad()
def first_alpha_(module: QuantizedModule, how: Quantizer, rows: Tensor) -> None:
    """Give a learned alpha its first value, from the first input that comes while it is calibrated."""
    assert isinstance(how.scale, LearnedScale)
    scale = how.scale.first(how.grid)
    alpha = torch.empty((), dtype=torch.float32, device=rows.device)
    if isinstance(scale, MeasuredScale):
        measure_([alpha], [rows], scale, how.transform, module.backend)
    else:
        alpha.copy_(scale.of(rows))
    if not (float(alpha) > 0 and bool(alpha.isfinite()) and bool(rows.isfinite().all())):
        kind = "finite values" if rows.isfinite().all() else "values that are not finite"
        raise ValueError(
            f"batch must give each input a scale > 0, got {kind} for the input of {named(module)}, and"
            f" {float(alpha)} by {scale}"
        )
    module.set_input_alpha(alpha)
    module.calibrating = False
