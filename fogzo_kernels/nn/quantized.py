"""QuantizedWeight: a module that keeps a weight as the latent and quantizes it, whatever computes with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..functional import quantize, quantize_
from ..ops import transforms
from ..ops.differentiable import plain as plain_quantize
from ..ops.listop import is_plain
from ..spec.quantizer import Quantizer
from ..spec.scale import LearnedScale, MeasuredScale
from .direct import direct_values
from .inputs import InputQuantizer, rotated
from .parameter import VALUES, Values
from .state_dict import SavedModule
from .view import LOCAL, Deferred, PassWeight, Placement, check_alpha, place, placement_of, whole
from .weight import (
    FLOOR,
    WeightQuantizer,
    against_alpha,
    alpha_of,
    changes,
    check,
    fits,
    hold_alphas,
    in_its_range,
    is_held,
    keeping_versions,
    measure_,
    name_of,
)

if TYPE_CHECKING:
    from typing import Self


def _of_weight(name: str) -> Any:
    """An attribute of the module that its :class:`WeightQuantizer` has."""
    return property(
        lambda module: getattr(module.weight_quantizer, name),
        lambda module, value: setattr(module.weight_quantizer, name, value),
    )


class QuantizedWeight(SavedModule):
    """A module that quantizes a weight: its own, or a parameter of the module that it is a child of.

    What is quantized is a matrix, the weight's rows: one row for each output of the module. Of a stack of
    experts a row is a whole expert, and its scales are groups of the row.

    Attributes:
        alpha: scale of the grid, a float32 buffer that keeps its dtype under ``.to(dtype)``: one element,
            one per row, or one per group of a row. Each forward writes an alpha that the quantizer measures. An
            alpha that is learned is a parameter, and modules that share a weight share it too.
        alpha_least: a float32 buffer beside a learned alpha: where one that left its range is held.
        quantizer: how the weight is quantized. It travels in the state dict, and one with another grid does
            not load.
        tensor_id: which noise the weight draws (docs/contract.md, section 2). The experts of a stack have this
            number and those that follow.
        backend: of the ops; None takes the best available.
        activation: how the module's input is quantized, or None. FOGZO does not perturb it. A scale that is
            learned is a parameter ``input_alpha``.
        weight_quantizer: quantizer, tensor id, backend and state of the weight.
        input_quantizer: ``activation`` and the state of its scale, or None.
        pass_weight: None, or what to run with during a pass of :class:`fogzo_kernels.Fogzo`.
        placement: under ``fully_shard``, which rows of the weight this process has.
    """

    #: The names of what it has beside the plain module.
    ADDED: ClassVar[tuple[str, ...]] = (
        "alpha", "alpha_least", "input_alpha", "input_alpha_least", "quantizer", "tensor_id", "backend",
        "activation", "weight_quantizer", "input_quantizer", "pass_weight", "placement", "probe", "product",
        VALUES,
    )  # fmt: skip
    #: The name of the parameter that is quantized.
    PARAMETER: str = "weight"
    #: The dimension of the parameter that counts the rows.
    OUTPUTS: int = 0
    #: The dimension of a stack of experts that counts an expert's outputs; None: the weight is no stack.
    EXPERT_OUTPUTS: int | None = None
    #: Where the Hadamard transform of the weight is undone: at the "weight", "input" or "output".
    ROTATED: ClassVar[str] = "weight"

    alpha_least: Tensor
    input_alpha: Tensor
    input_alpha_least: Tensor
    pass_weight: PassWeight | None
    placement: Placement = LOCAL

    quantizer: Quantizer = _of_weight("quantizer")
    tensor_id: int = _of_weight("tensor_id")
    backend: str | None = _of_weight("backend")

    def begin(self, weight: WeightQuantizer, alpha: Tensor, activation: Quantizer | None) -> None:
        """Take quantizers and a first alpha."""
        vars(self).update({VALUES: Values(), "weight_quantizer": weight, "pass_weight": None})
        self.activation = activation
        if weight.quantizer.learned:
            self.register_parameter("alpha", nn.Parameter(alpha))
            self.register_buffer("alpha_least", alpha.detach() * FLOOR)
        else:
            self.register_buffer("alpha", alpha)
        if activation is not None and activation.learned:
            none = torch.full((), math.nan, dtype=torch.float32, device=alpha.device)
            self.register_parameter("input_alpha", nn.Parameter(none))
            self.register_buffer("input_alpha_least", none.clone())

    @property
    def home(self) -> nn.Module:
        """The module that has the weight as a parameter."""
        return self

    @property
    def registered(self) -> Tensor | None:
        """The parameter where PyTorch keeps it; None where something else has taken its place."""
        return self._parameters.get(self.PARAMETER)

    @property
    def expert_count(self) -> int | None:
        """How many weights a stack of experts holds; None where the weight is no stack."""
        return None if self.EXPERT_OUTPUTS is None else self.latent.shape[0]

    @property
    def activation(self) -> Quantizer | None:
        return None if self.input_quantizer is None else self.input_quantizer.quantizer

    @activation.setter
    def activation(self, quantizer: Quantizer | None) -> None:
        self.input_quantizer = None if quantizer is None else InputQuantizer(quantizer)

    # ---- the weight as rows

    @property
    def latent(self) -> Tensor:
        """The parameter itself, also inside a forward."""
        weight, home = self.registered, self.home
        if weight is None:  # PyTorch keeps here what is no Parameter, as of prune or DataParallel
            weight = home.__dict__.get(self.PARAMETER)
        return getattr(home, self.PARAMETER) if weight is None else weight

    def order(self) -> tuple[int, ...]:
        """The weight's dimensions as its rows lie in memory, that of the outputs first.

        In memory of the format channels_last the channels come last, and a row is still in one piece. Groups
        are cut from a row in the plain order, whatever its memory.
        """
        w = self.latent
        if self.EXPERT_OUTPUTS is not None:  # without scales or blocks within an expert their order is free
            alone = self.alpha.numel() == w.shape[0] and not self.quantizer.block
            return (0, 1, 2) if alone or self.EXPERT_OUTPUTS == 1 else (0, 2, 1)
        plain = (self.OUTPUTS, *(d for d in range(w.ndim) if d != self.OUTPUTS))
        last = (*plain[:1], *plain[2:], *plain[1:2])
        in_order = w.permute(plain).is_contiguous() if self.OUTPUTS else w.is_contiguous()
        if in_order or self.alpha.numel() > w.shape[self.OUTPUTS]:
            return plain
        return last if w.permute(last).is_contiguous() else plain

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as the matrix that is quantized; a view where memory allows it."""
        if tensor.ndim == 2 and not self.OUTPUTS:
            return tensor
        return tensor.permute(self.order()).flatten(1)

    def shaped(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`, a view."""
        shape = self.latent.shape
        if len(shape) == 2 and not self.OUTPUTS:
            return rows
        order = self.order()
        return rows.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])

    def in_rows(self, tensor: Tensor) -> bool:
        """Whether a tensor of the weight's shape lies in memory as rows, one behind the other."""
        if tensor.ndim > 2 or self.OUTPUTS:
            tensor = tensor.permute(self.order())
        return tensor.is_contiguous()

    @torch.no_grad()
    def lay_out(self) -> None:
        """Put the weight's memory in rows, so that ops take it as it lies; shape and values stay."""
        self.__dict__[VALUES].kept = None
        if not self.in_rows(self.latent):
            self.latent.data = self.shaped(self.rows(self.latent.data).contiguous())
        if self.placement is not LOCAL:  # its shard may be another tensor now
            place(self)

    # ---- Q(weight)

    @property
    def probe(self) -> Tensor | None:
        """Rows to run with instead of Q(weight), without a gradient, or None; a loop of one's own sets it."""
        own = self.pass_weight
        return own.values(self.alpha, self.quantizer.grid) if own is not None and own.probe else None

    @probe.setter
    def probe(self, rows: Tensor | None) -> None:
        if self.placement is not LOCAL:
            raise RuntimeError("probe must not be set under fully_shard: Fogzo lets processes exchange probes")
        self.pass_weight = None if rows is None else PassWeight(self.latent, rows, probe=True)

    def effective_weight(self) -> Tensor:
        """Return the weight that the forward runs with: Q(weight) with a gradient, or inside a probe the probe.

        It has the shape of the weight. A transform of the quantizer is undone.

        Raises:
            RuntimeError: alpha was made for another weight, or a pass perturbs another weight.
            ValueError: alpha requires grad, or is out of range.

        Example:
            >>> model = torch.nn.Linear(1, 1)
            >>> with torch.no_grad(): _ = model.weight.fill_(0.3)
            >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.5))
            >>> model.effective_weight().item()
            0.5
        """
        return self.shaped(rotated(self.quantized_rows(), self.quantizer.block, self.backend))

    def quantized_rows(self) -> Tensor:
        """Rows of the probe, or of Q(weight) with a gradient, in the basis in which they are quantized.

        Raises:
            RuntimeError: alpha was made for another weight, or a pass perturbs another weight.
            ValueError: alpha requires grad, or is out of range.
        """
        own, weight = self.pass_weight, self.latent
        if own is not None and own.ready and own.weight is weight:
            return own.rows
        if own is None and not is_compiling() and (values := direct_values(self)) is not None:
            return values if values.ndim == 2 else values.flatten(1)
        alpha = self.alpha
        fit = fits(self, weight, alpha)
        if own is None and fit and self.placement is LOCAL and is_plain(weight, alpha):
            return self._plain_rows(weight, alpha)
        if not fit or transforms.active():
            check(self)
        return placement_of(self, weight).rows(self, weight, self._rows_of)

    def _plain_rows(self, weight: Tensor, alpha: Tensor) -> Tensor:
        """:meth:`_rows_of` a whole weight outside of a pass, where nothing looks at ops: with less work."""
        own, rows = self.weight_quantizer, self.rows(weight).contiguous()
        if not own.quantizer.learned:
            check_alpha(self, alpha)
            self._measure(rows)
        elif not is_held(alpha, self._buffers.get("alpha_least")):
            hold_alphas([self], ("alpha",))
        options = own.options(weight.numel() // max(alpha.numel(), 1), own.backend)
        try:
            return plain_quantize(rows, alpha, options)
        except ValueError as error:
            raise against_alpha(name_of(self), rows.detach(), alpha.detach(), own.quantizer) or error from None

    def _rows_of(self, weight: Tensor, alpha: Tensor) -> Tensor:
        """Rows to run with, of the weight, or of the part of it that this process has, with its scales."""
        of_pass, how = self.pass_weight, self.quantizer
        if of_pass is not None and of_pass.weight is not self.latent:
            raise RuntimeError(
                "inside a pass of Fogzo a quantized module must run with its own weight, got another tensor:"
                " call functional_call with other weights outside of passes"
            )
        if of_pass is not None and of_pass.probe:
            return of_pass.values(alpha, how.grid)
        check_alpha(self, alpha)
        if of_pass is not None and of_pass.deferred:
            quantized: Tensor = Deferred.apply(self.rows(weight), alpha, of_pass.rows)
            return quantized
        rows = self.rows(weight).contiguous()
        if of_pass is None and not how.learned:
            self._measure(rows)
        elif of_pass is None and torch.compiler.is_exporting():
            alpha = in_its_range(alpha, self.alpha_least)
        elif of_pass is None:
            hold_alphas([self], ("alpha",))
        factor, known = self.alpha_factor if how.learned else 1.0, of_pass and of_pass.rows
        return quantize(rows, alpha, alpha_factor=factor, quantized=known, backend=self.backend, **how.options)

    def _measure(self, rows: Tensor) -> None:
        """Write the alpha of these rows, where the quantizer measures it."""
        scale = self.quantizer.scale
        if isinstance(scale, MeasuredScale):
            with keeping_versions([self.alpha]):
                measure_([self.alpha], [rows.detach()], scale, self.quantizer.transform, self.backend)

    @property
    def alpha_factor(self) -> float:
        """What LSQ multiplies the gradient of a learned alpha by."""
        scale = self.quantizer.scale
        assert isinstance(scale, LearnedScale)
        return scale.gradient_factor(self.quantizer.grid, self.latent.numel() // max(self.alpha.numel(), 1))

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the int8 codes of Q(weight), a matrix with one row per output of the module.

        A row has the weight's other dimensions in their order. :func:`fogzo_kernels.functional.dequantize` with
        ``alpha`` gives the values, of the transformed weight if there is a transform.

        Returns:
            An int8 tensor of shape (outputs, elements of a row).

        Raises:
            RuntimeError, ValueError: alpha was made for another weight, or is out of range.

        Example:
            >>> model = torch.nn.Linear(1, 1)
            >>> with torch.no_grad(): _ = model.weight.fill_(0.3)
            >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.5))
            >>> model.codes()
            tensor([[1]], dtype=torch.int8)
        """
        check(self)
        rows = self.rows(whole(self.latent)).contiguous()
        self._measure(rows)
        out, how = torch.empty_like(rows, dtype=torch.int8), self.quantizer
        quantize_(out, rows, self.alpha, grid=how.grid, transform=how.transform, backend=self.backend)
        return self.shaped(out).movedim(self.OUTPUTS, 0).flatten(1).contiguous()

    def made_weight(self) -> Tensor:
        """What the forward runs with: :meth:`quantized_rows`, shaped, in the forward's basis."""
        block = self.quantizer.block if self.ROTATED == "weight" else 0
        return self.shaped(rotated(self.quantized_rows(), block, self.backend))

    def input_rows(self, input: Tensor) -> Tensor:
        """An input as a matrix. A row is a token, what the last dimension holds; of convolutions, a sample."""
        if self.latent.ndim > 2:
            return (input if input.ndim == self.latent.ndim else input.unsqueeze(0)).flatten(1)
        return input.flatten(0, -2) if input.ndim > 1 else input.unsqueeze(0)

    def effective_input(self, input: Tensor, block: int = 0) -> Tensor:
        """The input to run with: quantized, with a straight-through gradient, if ``activation`` says so.

        A ``block`` of the weight's transform brings it to the basis of :meth:`quantized_rows`.

        Raises:
            RuntimeError: a learned scale of the input has no value yet.
            ValueError: the input does not fit ``activation``.
        """
        if self.input_quantizer is None:
            return rotated(input, block, self.backend)
        return self.input_quantizer.values(self, input, block)

    # ---- alpha

    @torch.no_grad()
    def calibrate_(self) -> None:
        """Let the quantizer's scale make alpha anew, from the weight as it is now."""
        self.set_alpha(self.alpha_by(self.quantizer))

    def alpha_by(self, quantizer: Quantizer) -> Tensor:
        """The alpha that a quantizer's scale makes of the weight as it is now; raises if it does not fit."""
        return alpha_of(self.PARAMETER, whole(self.latent), self.OUTPUTS, quantizer, self.EXPERT_OUTPUTS)

    @torch.no_grad()
    def set_alpha(self, alpha: Tensor) -> None:
        """Give alpha another value, of any shape that fits; in place where it can be."""
        self.weight_quantizer.stale, self.__dict__[VALUES].kept = False, None
        learned = self.quantizer.learned
        if self.alpha.is_meta:
            self.alpha = nn.Parameter(alpha) if learned else alpha
        elif self.alpha.shape == alpha.shape:
            self.alpha.copy_(alpha)
        else:
            self.alpha.data = alpha
        if learned:
            self.alpha_least = alpha * FLOOR

    def learned_alphas(self, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Those of these names that are learned and have a value, each with where it is held."""
        buffers, pairs = self._buffers, []
        if "alpha" in names and buffers.get("alpha_least") is not None:
            if self.weight_quantizer.shares and self.alpha_least.shape != self.alpha.shape:
                self.alpha_least = self.alpha.detach() * FLOOR  # the first was calibrated after a resize
            pairs.append((self._parameters["alpha"], buffers["alpha_least"]))
        if "input_alpha" in names and buffers.get("input_alpha_least") is not None:
            assert self.input_quantizer is not None
            if self.input_quantizer.calibrated:
                pairs.append((self._parameters["input_alpha"], buffers["input_alpha_least"]))
        return pairs  # type: ignore[return-value]

    # ---- what PyTorch does to a module

    def train(self, mode: bool = True) -> Self:
        self.__dict__[VALUES].kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.__dict__[VALUES].kept = None
        changes.count += 1
        names = self.own_tensors()
        before = {name: getattr(self, name).detach() for name in names}
        super()._apply(fn, recurse)
        for name in names:  # alphas move with the module but stay float32
            now = getattr(self, name)
            if now.dtype != torch.float32:
                now.data = before[name].to(now.device)
            if before[name].is_meta and not now.is_meta:  # it had no value: not to be taken for one
                now.detach().fill_(math.nan)
        if self.placement is not LOCAL:  # its shard may be another tensor now
            place(self)
        return self
