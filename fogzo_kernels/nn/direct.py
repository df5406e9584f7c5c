"""Direct: Q of a module's weight outside of passes, where the host takes little longer than the kernel."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled, nn

from ..backends import VARIABLE, Backend, select
from ..backends.held import native
from ..functional import TensorList
from ..ops import checks, memory
from ..ops.differentiable import Options, gradients
from ..ops.listop import is_plain, watched
from ..spec.grid import FLOATS
from ..spec.scale import MeasuredScale
from .parameter import VALUES, Values
from .view import LOCAL
from .weight import MOST, changes, fits, hold_alphas, is_held, keeping_versions, measure_

if TYPE_CHECKING:
    from .quantized import QuantizedWeight


class Direct:
    """What a backend keeps of a module's weight, between forwards.

    The backend looks at the tensors in each call. It refuses tensors that it cannot take. The usual way then
    finds the reason.
    """

    def __init__(self, module: QuantizedWeight, weight: nn.Parameter, backend: Backend) -> None:
        own, self.weight, self.alpha = module.weight_quantizer, weight, module.alpha
        self.quantizer, self.learned = own.quantizer, own.quantizer.learned
        self.least = module.alpha_least if self.learned else None
        self.options: Options = own.options(weight.numel() // max(self.alpha.numel(), 1), own.backend)
        tensors = [weight, self.alpha, *([] if self.least is None else [self.least])]
        how = self.options.grid, self.options.straight_through, self.options.factor, self.options.block
        kind, named = backend.ModuleWeight, own.backend is not None  # type: ignore[attr-defined]
        self.checks = getattr(backend, "CHECKS_LISTS", False)  # else this looks at alpha and the environment
        self.backend = kind(TensorList(tensors), *how, *((MOST, named) if self.checks else ()))
        self.free = not (named or self.checks)
        self.asked = os.environ.get(VARIABLE)
        scale = own.quantizer.scale
        self.scale = scale if isinstance(scale, MeasuredScale) else None
        self.measured = TensorList([self.alpha]), TensorList([weight])
        self.changes = changes.count

    def serves(self, module: QuantizedWeight, weight: Tensor | None) -> bool:
        """Whether the module, whose parameter is ``weight``, still has what this was made of."""
        return (
            self.changes == changes.count
            and weight is self.weight
            and module.alpha is self.alpha  # as an attribute, which a tracer of torch.fx sees
            and module._buffers.get("alpha_least") is self.least
            and (self.learned or not self.alpha.requires_grad)
            and not (self.free and os.environ.get(VARIABLE) != self.asked)
        )

    def values(self, module: QuantizedWeight) -> Tensor | None:
        """Q, or None where the usual way must make it."""
        if not self.measure() or not (self.checks or self.alpha_holds(module)):
            return None
        weight, alpha = self.weight, self.alpha
        if is_grad_enabled() and (weight.requires_grad or alpha.requires_grad):
            quantized: Tensor | None = apply(weight, alpha, self)
            return quantized
        out = torch.empty_like(weight, requires_grad=False)
        return out if self.backend.quantize(out) else None

    def measure(self) -> bool:
        """Write the alpha that the quantizer measures, if it does. Returns whether the weight let it."""
        if self.scale is None:
            return True
        try:
            with keeping_versions([self.alpha]):
                measure_(*self.measured, self.scale, self.quantizer.transform, self.options.backend)
        except (RuntimeError, TypeError, ValueError):  # the usual way raises it again
            return False
        return True

    def alpha_holds(self, module: QuantizedWeight) -> bool:
        """Hold a learned alpha. Returns whether alpha may be used, as far as the host sees it."""
        if self.learned and not is_held(self.alpha, self.least):
            hold_alphas([module], ("alpha",))
        try:
            memory.alphas([self.alpha], self.options.grid.r)
        except ValueError:  # the usual way raises it again
            return False
        return True


def made(module: QuantizedWeight, weight: Tensor | None) -> Direct | None:
    """Direct of a module whose parameter lies as one piece, in the order of its rows.

    Not so if the quantizer measures what a transform makes of the weight.
    """
    alpha, scale = module.alpha, module.quantizer.scale
    if (
        type(weight) is not nn.Parameter
        or native() is None
        or not is_plain(weight, alpha)
        or not (weight.is_contiguous() and alpha.is_contiguous() and weight.numel())
        or not (weight.dtype in FLOATS and alpha.dtype is torch.float32 and alpha.device == weight.device)
        or module.OUTPUTS != 0
        or module.EXPERT_OUTPUTS is not None
        or module.placement is not LOCAL
        or (isinstance(scale, MeasuredScale) and scale.statistic != "rms" and module.quantizer.block)
        or not (module.quantizer.learned or not alpha.requires_grad)
        or not fits(module, weight, alpha)
    ):
        return None
    try:
        checks.alphas([alpha], "latents", [weight], module.quantizer.block)
        backend = select(module.backend, weight.device)
    except (RuntimeError, TypeError, ValueError):  # the usual way raises it again
        return None
    return Direct(module, weight, backend) if hasattr(backend, "ModuleWeight") else None


def direct_values(module: QuantizedWeight) -> Tensor | None:
    """Return Q of the module's weight, in the weight's shape; a transform of the quantizer is not undone.

    Returns None where the usual way must make Q. The caller checks that no compiler traces.
    """
    values: Values = vars(module)[VALUES]
    direct, weight = values.direct, module.registered
    if watched():
        return None
    if weight is not None and weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # a CUDA graph may run when the module is gone
    if direct is None or not direct.serves(module, weight):
        if values.direct_failed == changes.count:
            return None
        values.direct = direct = made(module, weight)
        if direct is None:
            values.direct_failed = changes.count
            return None
    found: Tensor | None = direct.values(module)
    if found is None:
        values.direct = None
    return found


class Quantized(torch.autograd.Function):
    """Q of a module's weight as one node; None where the backend refuses."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor, direct: Direct) -> Tensor | None:
        out = torch.empty_like(weight)
        if not direct.backend.quantize(out):
            return None
        ctx.save_for_backward(weight, alpha)
        ctx.direct = direct
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight, alpha), direct = grads, ctx.saved_tensors, ctx.direct
        learns = ctx.needs_input_grad[1]
        # a derivative of the derivative needs the op
        if type(grad) is Tensor and grad.dtype is weight.dtype and not (is_grad_enabled() or watched()):
            grad, out = grad.contiguous(), torch.empty_like(weight)
            of_alpha = torch.empty_like(alpha) if learns else None
            if grad.device == weight.device and direct.backend.backward(out, grad, of_alpha):
                return out, of_alpha, None
        return *gradients(grad, weight, alpha, learns, *direct.options.flat), None


#: Function.apply without the rest of what it does for transforms of ``torch.func``, a third of its time.
apply = super(torch.autograd.Function, Quantized).apply
