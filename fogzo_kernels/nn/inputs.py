"""What a quantized module does with its input: quantize it, and bring it to the basis of its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import hadamard, quantize
from ..ops import transforms
from ..spec.hadamard import Hadamard, block_of
from ..spec.quantizer import Quantizer
from ..spec.scale import FixedScale, LearnedScale, MeasuredScale
from .scales import hold_alphas, in_its_range, measure_

if TYPE_CHECKING:
    from .quantized import QuantizedModule


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
    alpha, factor = input_alpha(module, how, rows)
    found = quantize(
        rows, alpha, grid=how.grid, straight_through=how.straight_through, transform=how.transform,
        alpha_factor=factor, backend=backend,
    ).view(input.shape)  # fmt: skip
    if own == block:
        return found
    if own:  # rows are what the transform went over, whatever the input's last dimension is
        found = rotated(module.input_rows(found), own, backend).view(input.shape)
    return rotated(found, block, backend)


def input_alpha(module: QuantizedModule, how: Quantizer, rows: Tensor) -> tuple[Tensor, float]:
    """Alpha of an input, and the factor of its gradient."""
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
            "input_alpha, the learned scale of this module's input, has no value yet: call"
            " fogzo_kernels.calibrate_inputs_(model, lambda: model(batch)) once, before training"
        )
    alpha = module.input_alpha
    if torch.compiler.is_exporting():
        alpha = in_its_range(alpha, module.input_alpha_least)
    elif module.held is None:  # else the step has done it
        hold_alphas([module], ("input_alpha",))
    # of LSQ: the features of a layer, which are those of a token or a sample, share it
    return alpha, scale.gradient_factor(how.grid, rows.shape[-1])


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
    if not (float(alpha) > 0 and bool(alpha.isfinite())):
        raise ValueError(f"batch must give each input a scale > 0, got {float(alpha)} by {scale}")
    module.set_input_alpha(alpha)
    module.calibrating = False
