"""QuantLinear: a linear layer rotates its input instead of its weight, and can multiply int8 codes."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes as disabled_modes

from ..functional import learned_backward_, quantize_, straight_through_backward_
from ..ops import checks, transforms
from ..spec.quantizer import Quantizer
from ..spec.scale import FixedScale
from ..spec.straight_through import NO_SECOND
from .inputs import with_lost
from .kept import Kept, forward_weight
from .module import QuantizedModule
from .parameter import VALUES

COMPUTE = ("int8",)
LONGEST = 2**17 - 1  # products of two int8 codes, at most 2^14 each, of which int32 holds the sum


NO_CODES = "cannot multiply codes:"


class QuantLinear(QuantizedModule, nn.Linear):
    """``nn.Linear`` that runs with Q(weight); :func:`quantize_model` makes it.

    ``weight``, of shape (out_features, in_features), is the latent. It keeps its name, so that a checkpoint of
    the plain model loads.
    A call with arguments makes a plain ``nn.Linear``, as adapters make their layers.

    Attributes:
        alpha: the scale, float32: 0-dim, (out_features, 1) or (out_features, groups). A learned alpha is a
            parameter, any other a buffer.
        quantizer: the :class:`Quantizer` of the weight.
        activation: the :class:`Quantizer` of the input, or None.
        product: ``"int8"`` if the layer multiplies codes, None if it multiplies values; see
            :func:`set_compute_`.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2))
        >>> type(model).__name__, model.codes().dtype, model.effective_weight().shape
        ('QuantLinear', torch.int8, torch.Size([4, 8]))
    """

    PLAIN = nn.Linear
    ROTATED = "input"

    product: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        own = self.pass_weight
        if own is not None and own.plain and self.input_quantizer is None and self.product is None:
            if own.weight is self._parameters["weight"]:
                return F.linear(input, own.rows, self.bias)
        elif own is None and self.input_quantizer is None and not is_compiling():
            kept: Kept | None = self.__dict__[VALUES].kept
            if kept is not None and not kept.rotated and kept.serves(self, input):
                parameters = self._parameters  # quicker than an attribute of a module
                bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401  a call less
                return F.linear(input, kept.value, bias)
        if self.product is not None and not transforms.active():  # a transform of torch.func takes values
            return self._product(input)
        how = self.weight_quantizer.quantizer
        if self.input_quantizer is not None or how.transform is not None:
            input = self.effective_input(input, how.block)
        if own is None and not (self.training or is_compiling()):
            rows = forward_weight(self, input)
        else:
            rows = self.quantized_rows()
        return F.linear(input, rows, self.bias)

    def _product(self, input: Tensor) -> Tensor:
        """The forward by a product of codes."""
        inputs = self.input_quantizer
        assert inputs is not None
        rows, alpha, factor, lost = inputs.scaled(self, input)
        own = self.pass_weight
        probe = own is not None and own.probe and own.weight is self.latent
        weight = own.rows if own is not None and probe else forward_weight(self, input)
        out: Tensor = Product.apply(
            rows, alpha, weight, self.alpha.detach(), inputs.quantizer, self.quantizer, factor, self.backend
        )
        out = with_lost(out, lost)
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", int8 products" if self.product is not None else "")


def set_compute_(model: nn.Module, compute: str | None) -> None:
    """Choose how the quantized linear layers of a model multiply: with values, or with int8 codes.

    ``"int8"`` multiplies int8 codes into exact int32 sums, and those by the scales (``torch._int_mm``; on a GPU
    its tensor cores). The result equals that of values up to their rounding in the product, and gradients are
    the same. The backward keeps the codes of the input instead of its values, a quarter or half of the memory.
    FOGZO writes its probes as codes. A checkpoint does not hold the choice.

    Args:
        model: a model that :func:`quantize_model` quantized, with a quantizer for inputs, ``activation``.
        compute: ``"int8"``, or None for values.

    Raises:
        TypeError, ValueError: an argument is wrong; the model has no quantized linear layer; or one of them has
            no quantized input, scales for groups, or another transform for its weight than for its input.
            Nothing has changed then.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.lsq(4), activation=fk.presets.dynamic(8))
        >>> fk.set_compute_(model, "int8")
        >>> model.product
        'int8'
    """
    checks.instance("model", model, nn.Module)
    if compute is not None and compute not in COMPUTE:
        raise ValueError(f"compute must be None or 'int8', got {compute!r}")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    if not linears:
        raise ValueError("model must have quantized linear layers, got none")
    for name, m in linears.items() if compute else ():
        reason = reason_against(m)
        if reason is not None:
            raise ValueError(f"{f'layer {name!r}' if name else 'model'} {reason}")
    for m in linears.values():
        m.product = compute


def reason_against(module: QuantLinear) -> str | None:
    """None, or why a linear module cannot multiply codes: how a message goes on after its name."""
    how = module.activation
    if how is None:
        return (
            "needs activation= to multiply codes, as its input is not quantized:"
            " quantize_model(model, quantizer, activation=fk.presets.dynamic(8)), say"
        )
    rows = module.rows(module.weight)
    if module.alpha.numel() not in (1, rows.shape[0]):
        return f"{NO_CODES} its weight has scales for groups of a row"
    if rows.shape[1] > LONGEST:
        return f"{NO_CODES} its rows of {rows.shape[1]} elements exceed {LONGEST}, which int32 has room for"
    granularity = getattr(how.scale, "granularity", None)
    tensor = isinstance(how.scale, FixedScale) and not isinstance(how.scale.alpha, int | float)
    if isinstance(granularity, int) or tensor:
        return f"{NO_CODES} its input has scales for groups of a row, or given ones"
    if how.transform != module.quantizer.transform:
        both = f"is transformed by {module.quantizer.transform}, its input by {how.transform}"
        return f"{NO_CODES} its weight {both}"
    return None


class Product(torch.autograd.Function):
    """Q(x) Q(w)^T from the rows x, the values Q(w) or the int8 codes of a probe, and the scales of both."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, alpha: Tensor, weight: Tensor, weight_alpha: Tensor, how: Quantizer,
        q: Quantizer, factor: float, backend: str | None,
    ) -> Tensor:  # fmt: skip
        codes = torch.empty_like(rows, dtype=torch.int8)
        quantize_(codes, rows, alpha, grid=how.grid, transform=how.transform, backend=backend)
        delta = weight_alpha.reshape(-1, 1) * q.grid.r
        if weight.dtype == torch.int8:
            weight_codes = weight
        else:  # values are delta (code + offset) up to their dtype's rounding, at most a quarter of a step
            weight_codes = (weight.float() / delta - q.grid.offset).round_().to(torch.int8)
        ctx.save_for_backward(rows, alpha, codes, weight)
        ctx.options = how, factor, backend
        out = multiplied(codes, weight_codes, how.grid.offset, q.grid.offset)
        out *= (alpha.reshape(-1, 1) * how.grid.r) * delta.view(1, -1)
        enabled = torch.is_autocast_enabled(rows.device.type)
        return out.to(torch.get_autocast_dtype(rows.device.type) if enabled else rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what follows writes in place, and would leave no graph of the mask
            raise RuntimeError(NO_SECOND.format("products of codes (set_compute_)"))
        (grad,), (rows, alpha, codes, weight) = grads, ctx.saved_tensors
        how, factor, backend = ctx.options
        of_rows = of_alpha = of_weight = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            of_rows = (grad.to(weight.dtype) @ weight).to(rows.dtype)  # and from here on in place
            if ctx.needs_input_grad[1]:
                of_alpha = torch.empty_like(alpha)
                learned_backward_(
                    of_rows, of_alpha, rows, alpha, factors=factor, backend=backend, **how.options
                )
            else:
                straight_through_backward_(of_rows, rows, alpha, backend=backend, **how.options)
        if ctx.needs_input_grad[2]:
            values = (codes.float() + how.grid.offset) * (alpha.reshape(-1, 1) * how.grid.r)
            of_weight = grad.to(weight.dtype).t() @ values.to(weight.dtype)
        return of_rows, of_alpha, of_weight, None, None, None, None, None


def multiplied(codes: Tensor, other: Tensor, offset: float, other_offset: float) -> Tensor:
    """(codes + offset) (other + other_offset)^T of int8 (m, k) and (n, k), float32; with a rounding."""
    total = int_mm(codes, other.t())
    if codes.shape[1] > LONGEST // 4:  # four times as much would not fit
        total = total.long()
    if offset or other_offset:  # in halves, which int32 holds
        twice, other_twice = int(2 * offset), int(2 * other_offset)
        sums = codes.sum(1, dtype=torch.int32).unsqueeze(1) * other_twice
        other_sums = other.sum(1, dtype=torch.int32).unsqueeze(0) * twice
        return (4 * total + 2 * (sums + other_sums) + codes.shape[1] * twice * other_twice).float() / 4
    return total.float()


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b of int8 matrices, int32.

    A GPU's product wants more than 16 rows, and multiples of 8. PyTorch's on a CPU reads other memory where
    there is one product to a sum (2.13: the strides of such a matrix are ambiguous).
    """
    (m, k), n = a.shape, b.shape[1]
    if not a.is_cuda:
        return torch._int_mm(a, b) if k > 1 and adds_exactly() else (a.double() @ b.double()).to(torch.int32)
    more_rows, more, more_columns = max(17 - m, 0), -k % 8, -n % 8
    a, b = F.pad(a, (0, more, 0, more_rows)), F.pad(b.t(), (0, more, 0, more_columns)).t()
    return torch._int_mm(a, b)[:m, :n]


def adds_exactly() -> bool:
    """Whether ``torch._int_mm`` is right on this CPU.

    Without VNNI, x86 adds two products in 16 bits, which hold no more than 2^15 - 1. oneDNN does so, as
    https://uxlfoundation.github.io/oneDNN/dev_guide_int8_computations.html says.
    """
    return _adds_exactly()


#: torch.compiler.assume_constant_result does only this, but loads all of the compiler with the package.
adds_exactly._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _adds_exactly() -> bool:
    with disabled_modes():  # a trace may be the first to ask
        a, b = torch.full((17, 64), 127, dtype=torch.int8), torch.full((16, 64), -128, dtype=torch.int8)
        return bool((torch._int_mm(a, b.t()) == -64 * 127 * 128).all())
