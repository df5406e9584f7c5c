"""QuantizedModule: what makes a module run with Q(weight), whatever it computes with it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import quantize, quantize_
from ..ops import checks
from ..spec.quantizer import Quantizer
from .scales import alpha_of

if TYPE_CHECKING:
    from typing import Self


class Held(NamedTuple):
    """What a module runs with during a pass, instead of quantizing its weight itself."""

    weight: Tensor  # the parameter that the values belong to
    values: Tensor  # rows, as :meth:`QuantizedModule.rows` has them
    probe: bool  # whether they are a probe, without a gradient, or Q(weight)


class QuantizedModule(nn.Module):
    """Mixin of a module that keeps its ``weight`` as the latent and runs with Q(weight).

    A subclass also inherits from the plain module's class, :meth:`from_plain` turns such a module into
    one, and ``forward`` takes :meth:`effective_weight` where the plain one takes ``weight``.

    What is quantized is a matrix, the weight's rows: one row for each output of the module.

    Attributes:
        alpha: scale of the grid, a float32 buffer that keeps its dtype under ``.to(dtype)``: one element,
            one per row, or one per group of a row.
        quantizer: how the weight is quantized. It travels in the state dict, and one with another grid does
            not load.
        tensor_id: which noise the weight draws (docs/contract.md, section 2).
        backend: of the ops; None takes the best available.
        held: None, or what to run with during a pass of :class:`fogzo_kernels.Fogzo`.
    """

    #: The names that from_plain takes in a module.
    ADDED = ("alpha", "quantizer", "tensor_id", "backend", "held", "probe")
    #: The dimension of the weight that counts the outputs.
    OUTPUTS: ClassVar[int] = 0
    #: The class of the module that it was.
    PLAIN: ClassVar[type[nn.Module]]

    weight: Tensor
    alpha: Tensor
    quantizer: Quantizer
    tensor_id: int
    backend: str | None
    held: Held | None

    # ---- from a plain module, and back

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
        backend: str | None = None,
    ) -> Self:
        """Turn a plain module into a quantized one, in place: parameters, hooks and names stay."""
        module.__class__ = cls
        assert isinstance(module, cls)
        module.register_buffer("alpha", alpha)
        module.quantizer, module.tensor_id, module.backend = quantizer, tensor_id, backend
        module.held = None
        module.lay_out()
        return module

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """Turn it back, in place; its weight stays as it is."""
        del self._buffers["alpha"]
        self._non_persistent_buffers_set.discard("alpha")
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
        return self.held.values if self.held is not None and self.held.probe else None

    @probe.setter
    def probe(self, rows: Tensor | None) -> None:
        self.held = None if rows is None else Held(self.weight, rows, probe=True)

    def effective_weight(self) -> Tensor:
        """The weight to run with: the probe where there is one, else Q(weight), with a gradient.

        Raises:
            RuntimeError: inside a pass, the module has another weight than the one that is perturbed.
            ValueError: alpha requires grad, or is out of range.
        """
        held = self.held
        if held is not None:
            if held.weight is not self.weight:
                raise RuntimeError(
                    "weight must be the parameter that Fogzo perturbs, inside a pass, got another tensor:"
                    " functional_call with other weights, say, would run with values that are not theirs"
                )
            if held.probe:
                return self.shaped(held.values)
        if self.alpha.requires_grad:
            raise ValueError("alpha must not require grad, as no gradient reaches it")
        found = quantize(
            self.rows(self.weight).contiguous(),
            self.alpha,
            grid=self.quantizer.grid,
            straight_through=self.quantizer.straight_through,
            quantized=None if held is None else held.values,
            backend=self.backend,
        )
        return self.shaped(found)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The int8 codes of Q(weight), for export: a matrix with a row for each output of the module.

        A row has the weight's other dimensions in their order. :func:`fogzo_kernels.dequantize` with ``alpha``
        gives its values.
        """
        rows = self.rows(self.weight).contiguous()
        out = torch.empty_like(rows, dtype=torch.int8)
        quantize_(out, rows, self.alpha, grid=self.quantizer.grid, backend=self.backend)
        return self.shaped(out).movedim(self.OUTPUTS, 0).flatten(1).contiguous()

    @torch.no_grad()
    def calibrate_(self) -> None:
        """Let the quantizer's scale make alpha anew, from the weight as it is now."""
        self.alpha = alpha_of("weight", self.weight, self.OUTPUTS, self.quantizer)

    def extra_repr(self) -> str:
        levels, alpha = self.quantizer.grid.levels, tuple(self.alpha.shape)
        added = f"levels={levels}, alpha={alpha}, {self.quantizer.straight_through}"
        return ", ".join(filter(None, [super().extra_repr(), added]))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        alpha = self.alpha
        super()._apply(fn, recurse)
        if self.alpha.dtype != torch.float32:  # alpha moves with the module but stays float32
            self.alpha = alpha.to(self.alpha.device)
        if alpha.is_meta and not self.alpha.is_meta:  # it had no value: not to be taken for one
            self.alpha.fill_(math.nan)
        return self

    # ---- checkpoints

    def get_extra_state(self) -> Tensor:
        """The quantizer, as JSON in a uint8 tensor, so that formats of tensors alone can hold it."""
        text = json.dumps(self.quantizer.to_dict(), sort_keys=True)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

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
        saved = saved_quantizer(state)
        if saved.grid != self.quantizer.grid:
            raise ValueError(f"the quantizer must have {self.quantizer.grid}, got a state with {saved.grid}")
        return saved

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        alpha, extra, name = prefix + "alpha", prefix + EXTRA_STATE, prefix.removesuffix(".") or "model"
        try:
            if alpha in state_dict:
                self._check_alpha(state_dict[alpha])
            if extra in state_dict:
                self._accepted(state_dict[extra])
        except ValueError as error:  # with those of other modules, in one exception at the end
            error_msgs.append(f"{name}: {error}")
            return
        plain = alpha not in state_dict and extra not in state_dict
        missing: list[str] = []
        failed = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [key for key in missing if not (plain and key in (alpha, extra))]
        self.lay_out()
        if plain and prefix + "weight" in state_dict and len(error_msgs) == failed:
            try:
                self._loaded_plain()
            except (TypeError, ValueError, RuntimeError) as error:
                error_msgs.append(f"{name}: {error}")

    def _check_alpha(self, found: object) -> None:
        if not isinstance(found, Tensor):
            raise ValueError(f"alpha must be a tensor, got {type(found).__name__}")
        if found.dtype != torch.float32:
            wrong = checks.named([found.dtype])
            raise ValueError(f"alpha must be float32, got {wrong}: was the state dict cast?")
        if found.shape != self.alpha.shape:
            raise ValueError(f"alpha must have shape {tuple(self.alpha.shape)}, got {tuple(found.shape)}")

    def _loaded_plain(self) -> None:
        """The weight came from a checkpoint of the plain model, which has no alpha."""
        if self.quantizer.scale.from_weight:
            self.calibrate_()
        else:
            warnings.warn(
                "alpha is fixed and stays as it was, though the weights came from a checkpoint of a model that"
                " was not quantized: does it fit them? (A scale that is a function would be called again.)",
                stacklevel=2,
            )


EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def saved_quantizer(state: object) -> Quantizer:
    """The quantizer in an entry of a state dict.

    Raises:
        ValueError: it cannot be read.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        what = checks.named([state.dtype]) if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"the quantizer's state must be a uint8 tensor, got {what}")
    text = bytes(state.flatten().tolist())
    try:
        return Quantizer.from_dict(json.loads(text))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the quantizer's state must be JSON, got {text!r}") from error
