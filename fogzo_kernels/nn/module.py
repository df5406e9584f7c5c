"""QuantizedModule: what makes a module run with Q(weight), whatever it computes with it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional import quantize, quantize_
from ..ops import transforms
from ..spec.hadamard import block_of
from ..spec.quantizer import Quantizer
from ..spec.scale import LearnedScale, MeasuredScale
from .inputs import quantized_input, rotated
from .pass_weight import Deferred, Held
from .scales import HELD, alpha_of, hold_alphas, in_its_range, measure_
from .stale import check, fits, is_replaced
from .state_dict import EXTRA_STATE, check_alpha, loaded_plain, quantizers_as_state, saved_quantizers
from .view import LOCAL, Placement, place, placement_of, whole

if TYPE_CHECKING:
    from typing import Self


class QuantizedModule(nn.Module):
    """Mixin of a module that keeps its ``weight`` as the latent and runs with Q(weight).

    A subclass also inherits from the plain module's class, :meth:`from_plain` turns such a module into
    one, and ``forward`` takes :meth:`effective_weight` where the plain one takes ``weight``.

    What is quantized is a matrix, the weight's rows: one row for each output of the module.

    Attributes:
        alpha: scale of the grid, a float32 buffer that keeps its dtype under ``.to(dtype)``: one element,
            one per row, or one per group of a row. One that the quantizer measures is written by each forward;
            one that is learned is a parameter, and modules that share a weight share it too.
        quantizer: how the weight is quantized. It travels in the state dict, and one with another grid does
            not load.
        tensor_id: which noise the weight draws (docs/contract.md, section 2).
        backend: of the ops; None takes the best available.
        activation: how the module's input is quantized, or None. FOGZO does not perturb it. A scale that is
            learned is a parameter ``input_alpha``.
        held: None, or what to run with during a pass of :class:`fogzo_kernels.Fogzo`.
        placement: under ``fully_shard``, which rows of the weight this process has.
        alpha_least: of a learned alpha, a float32 buffer: where one that left its range is held.
        path: its name in the model that was quantized, for messages.
        stale: whether its weight was replaced since alpha was made.
    """

    #: The names that from_plain takes in a module.
    ADDED: ClassVar[tuple[str, ...]] = (
        "alpha", "alpha_least", "quantizer", "tensor_id", "backend", "held", "placement", "probe", "warned",
        "shares", "path", "stale", "activation", "input_alpha", "input_alpha_least", "input_is_calibrated",
        "calibrating",
    )  # fmt: skip
    #: The dimension of the weight that counts the outputs.
    OUTPUTS: ClassVar[int] = 0
    #: The class of the module that it was.
    PLAIN: ClassVar[type[nn.Module]]

    weight: Tensor
    alpha: Tensor
    alpha_least: Tensor
    input_alpha: Tensor
    input_alpha_least: Tensor
    input_is_calibrated: bool  # whether input_alpha has a value
    calibrating: bool  # whether the next input gives it one
    warned: bool  # of an alpha that is held
    shares: bool  # whether its learned alpha is the parameter of another module, too, that had it first
    quantizer: Quantizer
    activation: Quantizer | None
    tensor_id: int
    backend: str | None
    held: Held | None
    placement: Placement = LOCAL
    path: str = ""
    stale: bool = False

    # ---- from a plain module, and back

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes a plain module from arguments: adapters call the type of the module that they adapt."""
        return cls.PLAIN(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Why a module of the plain class cannot be quantized, or None."""
        return None

    @classmethod
    def from_plain(
        cls,
        module: nn.Module,
        quantizer: Quantizer,
        *,
        alpha: Tensor,
        tensor_id: int,
        path: str,
        activation: Quantizer | None = None,
        backend: str | None = None,
    ) -> Self:
        """Turn a plain module into a quantized one, in place: parameters, hooks and names stay."""
        module.__class__ = cls
        assert isinstance(module, cls)
        if isinstance(quantizer.scale, LearnedScale):
            module.register_parameter("alpha", nn.Parameter(alpha))
            module.register_buffer("alpha_least", alpha.detach() * HELD)
        else:
            module.register_buffer("alpha", alpha)
        module.quantizer, module.tensor_id, module.backend = quantizer, tensor_id, backend
        module.held, module.warned, module.shares = None, False, False
        module.activation, module.path = activation, path
        module.input_is_calibrated, module.calibrating = False, False
        if activation is not None and isinstance(activation.scale, LearnedScale):
            none = torch.full((), math.nan, dtype=torch.float32, device=alpha.device)
            module.register_parameter("input_alpha", nn.Parameter(none))
            module.register_buffer("input_alpha_least", none.clone())
        module.lay_out()
        return module

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """Turn it back, in place; its weight stays as it is."""
        for name in self.own_tensors():
            self._buffers.pop(name, None)
            self._parameters.pop(name, None)
        for name in self.ADDED:
            self.__dict__.pop(name, None)
        if self.OUTPUTS:
            self.weight.data = self.weight.data.contiguous()
        self.__class__ = self.PLAIN  # type: ignore[assignment]
        return self

    # ---- the weight as rows: here those of a matrix; see permuted.py for others

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as the matrix that is quantized; a view where memory allows it."""
        return tensor

    def shaped(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`, a view."""
        return rows

    def in_rows(self, tensor: Tensor) -> bool:
        """Whether a tensor of the weight's shape lies in memory as rows, one behind the other."""
        return tensor.is_contiguous()

    @torch.no_grad()
    def lay_out(self) -> None:
        """Put the weight's memory in rows, so that ops take it as it lies; shape and values stay."""
        if not self.in_rows(self.weight):
            self.weight.data = self.shaped(self.rows(self.weight.data).contiguous())

    @property
    def still_row(self) -> int | None:
        """A row that the module's forward gives no gradient, or None."""
        return None

    # ---- Q(weight)

    @property
    def probe(self) -> Tensor | None:
        """Rows to run with instead of Q(weight), without a gradient, or None; a loop of one's own sets it."""
        held = self.held
        return held.values(self.alpha, self.quantizer.grid) if held is not None and held.probe else None

    @probe.setter
    def probe(self, rows: Tensor | None) -> None:
        if self.placement is not LOCAL:
            raise RuntimeError("probe must not be set under fully_shard: Fogzo lets processes exchange probes")
        self.held = None if rows is None else Held(self.weight, rows, probe=True)

    @property
    def block(self) -> int:
        """Of the weight's transform; 0 without one."""
        return block_of(self.quantizer.transform)

    def effective_weight(self) -> Tensor:
        """The weight to run with: the probe where there is one, else Q(weight), with a gradient.

        It is of the basis that the weight has; of a rotated one, H is applied to Q. A module that can rotate
        its input instead takes :meth:`quantized_rows`.

        Raises:
            RuntimeError, ValueError: as :meth:`quantized_rows`.
        """
        return self.shaped(rotated(self.quantized_rows(), self.block, self.backend))

    def quantized_rows(self) -> Tensor:
        """Rows of the probe, or of Q(weight) with a gradient, in the basis in which they are quantized.

        Raises:
            RuntimeError: alpha was made for another weight; inside a pass, the module has another weight than
                the one that is perturbed.
            ValueError: alpha requires grad, or is out of range.
        """
        if not fits(self) or transforms.active():
            check(self)
        return placement_of(self).rows(self)

    def quantized(self, weight: Tensor, alpha: Tensor) -> Tensor:
        """Rows to run with, of the weight, or of the part of it that this process has, with its scales."""
        held = self.held
        if held is not None and held.weight is not self.weight:
            raise RuntimeError(
                "weight must be the parameter that Fogzo perturbs, inside a pass, got another tensor:"
                " functional_call with other weights, say, would run with values that are not theirs"
            )
        if held is not None and held.probe:
            return held.values(alpha, self.quantizer.grid)
        learned = isinstance(self.quantizer.scale, LearnedScale)
        if self.alpha.requires_grad and not learned:
            raise ValueError("alpha must not require grad, as no gradient reaches it")
        if held is not None and held.deferred:
            found: Tensor = Deferred.apply(self.rows(weight), alpha, held.rows)
            return found
        rows = self.rows(weight).contiguous()
        if learned and held is None and torch.compiler.is_exporting():
            alpha = in_its_range(alpha, self.alpha_least)
        elif learned and held is None:
            hold_alphas([self], ("alpha",))
        elif held is None:
            self._measure(rows)
        return quantize(
            rows, alpha,
            alpha_factor=self.alpha_factor if learned else 1.0,
            grid=self.quantizer.grid, straight_through=self.quantizer.straight_through,
            quantized=held and held.rows, transform=self.quantizer.transform, backend=self.backend,
        )  # fmt: skip

    @property
    def alpha_factor(self) -> float:
        """What LSQ multiplies the gradient of a learned alpha by."""
        scale = self.quantizer.scale
        assert isinstance(scale, LearnedScale)
        return scale.gradient_factor(self.quantizer.grid, self.weight.numel() // max(self.alpha.numel(), 1))

    def input_rows(self, input: Tensor) -> Tensor:
        """An input as a matrix: a row is what its last dimension holds, a token."""
        return input.flatten(0, -2) if input.ndim > 1 else input.unsqueeze(0)

    def effective_input(self, input: Tensor, block: int = 0) -> Tensor:
        """The input to run with: quantized, with a straight-through gradient, if ``activation`` says so.

        Args:
            input: of the module.
            block: of the weight's transform, where the module takes :meth:`quantized_rows`: the input is
                brought to their basis.

        Raises:
            RuntimeError: a learned scale of the input has no value yet.
            ValueError: the input does not fit ``activation``.
        """
        return quantized_input(self, input, block)

    def _measure(self, rows: Tensor) -> None:
        """Let alpha be that of the weight as it is, where the quantizer measures it."""
        scale = self.quantizer.scale
        if isinstance(scale, MeasuredScale):
            measure_([self.alpha], [rows.detach()], scale, self.quantizer.transform, self.backend)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The int8 codes of Q(weight), for export: a matrix with a row for each output of the module.

        A row has the weight's other dimensions in their order. :func:`fogzo_kernels.dequantize` with ``alpha``
        gives its values; with a transform, those of the rotated weight.
        """
        check(self)
        rows = self.rows(whole(self.weight)).contiguous()
        self._measure(rows)
        out = torch.empty_like(rows, dtype=torch.int8)
        how = self.quantizer
        quantize_(out, rows, self.alpha, grid=how.grid, transform=how.transform, backend=self.backend)
        return self.shaped(out).movedim(self.OUTPUTS, 0).flatten(1).contiguous()

    @torch.no_grad()
    def calibrate_(self) -> None:
        """Let the quantizer's scale make alpha anew, from the weight as it is now."""
        self.set_alpha(alpha_of("weight", whole(self.weight), self.OUTPUTS, self.quantizer))

    @property
    def reset_parameters(self) -> Callable[[], None]:
        """Initializes the plain module's weights, where it can, and makes alpha anew from them."""
        plain = super().reset_parameters  # type: ignore[misc]

        def reset() -> None:
            plain()
            self.calibrate_()

        return reset

    @torch.no_grad()
    def set_alpha(self, alpha: Tensor) -> None:
        """Give alpha another value, of any shape that fits; in place where it can be."""
        self.stale = False
        is_learned = isinstance(self.alpha, nn.Parameter)
        if self.alpha.is_meta:
            self.alpha = nn.Parameter(alpha) if is_learned else alpha
        elif self.alpha.shape == alpha.shape:
            self.alpha.copy_(alpha)
        else:
            self.alpha.data = alpha
        if is_learned:
            self.alpha_least = alpha * HELD

    def note_input_alpha(self, loaded: Tensor) -> None:
        """Note whether what was loaded is a value, or that of a model whose inputs were not calibrated."""
        self.input_is_calibrated = not bool(loaded.isnan())

    @torch.no_grad()
    def set_input_alpha(self, alpha: Tensor) -> None:
        """Give the learned scale of the input its first value, 0-dim."""
        self.input_alpha.copy_(alpha)
        self.input_alpha_least = alpha * HELD
        self.input_is_calibrated = True

    def extra_repr(self) -> str:
        levels, alpha = self.quantizer.grid.levels, tuple(self.alpha.shape)
        added = f"levels={levels}, alpha={alpha}, {self.quantizer.straight_through}"
        added += f", {self.quantizer.transform}" if self.quantizer.transform else ""
        inputs = "" if self.activation is None else f"input levels={self.activation.grid.levels}"
        return ", ".join(filter(None, [super().extra_repr(), added, inputs]))

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute and notes a new weight. ``fully_shard`` sets its shards through this method."""
        old = self._parameters.get(name) if name == "weight" else None
        super().__setattr__(name, value)
        if name == "weight":
            place(self)
            if is_replaced(self, old, value):
                self.stale = True

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
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

    def own_tensors(self) -> list[str]:
        """The tensors that the plain module does not have."""
        found = ["alpha", "alpha_least"] if isinstance(self.quantizer.scale, LearnedScale) else ["alpha"]
        learned = self.activation is not None and isinstance(self.activation.scale, LearnedScale)
        return found + ["input_alpha", "input_alpha_least"] * learned

    def learned_alphas(self, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Those of these names that are learned and have a value, each with where it is held."""
        there = [name for name in names if f"{name}_least" in self._buffers]
        ready = [name for name in there if name == "alpha" or self.input_is_calibrated]
        if (
            self.shares and self.alpha_least.shape != self.alpha.shape
        ):  # the first was calibrated after a resize
            self.alpha_least = self.alpha.detach() * HELD
        return [(getattr(self, name), getattr(self, f"{name}_least")) for name in ready]

    def share_alpha(self, first: QuantizedModule) -> None:
        """Train the same alpha as another module that has the same weight."""
        self.alpha, self.alpha_least, self.shares = first.alpha, first.alpha_least.clone(), True

    # ---- checkpoints

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A shared alpha has memory of its own there: formats that take each memory once hold it twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shares and not keep_vars:
            destination[prefix + "alpha"] = destination[prefix + "alpha"].clone()

    def get_extra_state(self) -> Tensor:
        """The quantizers, as a tensor."""
        return quantizers_as_state(self.quantizer, self.activation)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a state dict's quantizer is that of this module.

        Raises:
            ValueError: its grid is another one, or it cannot be read.
        """
        saved = self._accepted(state)
        if saved.straight_through != self.quantizer.straight_through:
            warnings.warn(
                f"training goes on with {self.quantizer.straight_through}, but the loaded state was trained"
                f" with {saved.straight_through}",
                stacklevel=2,
            )

    def _accepted(self, state: object) -> Quantizer:
        """The quantizer in a state dict's entry; raise unless codes mean the same with it."""
        saved, activation = saved_quantizers(state)
        own = self.quantizer
        for mine, found in ((own.grid, saved.grid), (own.transform, saved.transform)):
            if found != mine:
                raise ValueError(f"the quantizer must have {mine or 'no transform'}, got a state with {found}")
        if type(saved.scale) is not type(own.scale):  # a measured alpha may be older than the weight beside it
            raise ValueError(f"the quantizer must have {own.scale}, got a state with {saved.scale}")
        if (activation and activation.to_dict()) != (self.activation and self.activation.to_dict()):
            raise ValueError(f"activation must be {self.activation}, got a state with {activation}")
        return saved

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own, extra, name = self.own_tensors(), prefix + EXTRA_STATE, prefix.removesuffix(".") or "model"
        added = [*(prefix + x for x in own), extra]
        try:
            for x in own:
                if prefix + x in state_dict:
                    check_alpha(x, getattr(self, x), state_dict[prefix + x])
            if extra in state_dict:
                self._accepted(state_dict[extra])
        except ValueError as error:  # with those of other modules, in one exception at the end
            error_msgs.append(f"{name}: {error}")
            return
        plain = not any(key in state_dict for key in added)
        if prefix + "input_alpha" in state_dict:
            self.note_input_alpha(state_dict[prefix + "input_alpha"])
        missing: list[str] = []
        failed = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        self.stale = self.stale and prefix + "weight" not in state_dict
        missing_keys += [key for key in missing if not (plain and key in added)]
        self.lay_out()
        if self.placement is not LOCAL:  # its shard may be another tensor now
            place(self)
        if plain and prefix + "weight" in state_dict and len(error_msgs) == failed:
            try:
                loaded_plain(self)
            except (TypeError, ValueError, RuntimeError) as error:
                error_msgs.append(f"{name}: {error}")
