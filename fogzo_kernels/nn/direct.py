"""Direct: Q of a module's weight outside of passes, where the host takes little longer than the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled, nn

from ..backends.held import native
from ..functional import TensorList
from ..ops.differentiable import Options, gradients
from ..ops.listop import is_plain, watched
from ..spec.scale import MeasuredScale
from .parameter import VALUES, Values
from .view import LOCAL
from .weight import MOST, changes, fits

if TYPE_CHECKING:
    from .quantized import QuantizedWeight


class Direct:
    """What native code keeps of a module's weight on the CPU, between forwards.

    Native code looks at the tensors in each call. It refuses what it may not take as it stands, and the usual
    way then finds out why.
    """

    def __init__(self, module: QuantizedWeight, weight: nn.Parameter) -> None:
        own, self.weight, self.alpha = module.weight_quantizer, weight, module.alpha
        self.quantizer, self.backend, self.learned = own.quantizer, own.backend, own.quantizer.learned
        self.least = module.alpha_least if self.learned else None
        self.options: Options = own.options(weight.numel() // max(self.alpha.numel(), 1), own.backend)
        *grid, variant, _, factor, block = self.options.flat
        tensors = [weight, self.alpha, *([] if self.least is None else [self.least])]
        self._list = TensorList(tensors)
        named = self.backend is not None
        self.native = native().ModuleWeight(self._list.number, *grid, block, variant, factor, MOST, named)
        self.changes = changes.count

    def serves(self, module: QuantizedWeight) -> bool:
        """Whether the module still has what this was made of."""
        return (
            self.changes == changes.count
            and module.registered is self.weight
            and module.alpha is self.alpha  # as an attribute, which a tracer of torch.fx sees
            and module._buffers.get("alpha_least") is self.least
            and (self.learned or not self.alpha.requires_grad)
        )


def can_be_direct(module: QuantizedWeight, weight: object) -> bool:
    """Whether the weight lies on the CPU as one piece, in the order of its rows, and nothing is measured."""
    alpha = module.alpha
    return (
        type(weight) is nn.Parameter
        and native() is not None
        and module.backend in (None, "cpu")
        and is_plain(weight, alpha)
        and (weight.is_cpu and alpha.is_cpu and weight.is_contiguous())
        and module.OUTPUTS == 0
        and module.EXPERT_OUTPUTS is None
        and module.placement is LOCAL
        and not isinstance(module.quantizer.scale, MeasuredScale)
        and (module.quantizer.learned or not alpha.requires_grad)
        and fits(module, weight, alpha)
    )


def direct_values(module: QuantizedWeight) -> Tensor | None:
    """Return Q of the module's weight, in the weight's shape; a transform of the quantizer is not undone.

    Returns None where the usual way must make Q. The caller checks that no compiler traces.
    """
    values: Values = vars(module)[VALUES]
    direct: Direct | None = values.direct
    if watched():
        return None
    if direct is None or not direct.serves(module):
        if values.direct_failed == changes.count:
            return None
        values.direct, weight = None, module.registered
        if not can_be_direct(module, weight):
            values.direct_failed = changes.count
            return None
        assert isinstance(weight, nn.Parameter)
        values.direct = direct = Direct(module, weight)
    weight, alpha = direct.weight, direct.alpha
    if is_grad_enabled() and (weight.requires_grad or alpha.requires_grad):
        made: Tensor | None = apply(weight, alpha, direct)
        return made
    out = torch.empty_like(weight, requires_grad=False)
    return out if direct.native.quantize(out.data_ptr()) else None


class Quantized(torch.autograd.Function):
    """Q of a module's weight as one node; None where native code refuses."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor, direct: Direct) -> Tensor | None:
        out = torch.empty_like(weight)
        if not direct.native.quantize(out.data_ptr()):
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
            pointer = 0 if of_alpha is None else of_alpha.data_ptr()
            if grad.is_cpu and direct.native.backward(out.data_ptr(), grad.data_ptr(), pointer):
                return out, of_alpha, None
        return *gradients(grad, weight, alpha, learns, *direct.options.flat), None


#: Function.apply without the rest of what it does for transforms of ``torch.func``, a third of its time.
apply = super(torch.autograd.Function, Quantized).apply
