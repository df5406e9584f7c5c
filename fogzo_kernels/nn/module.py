"""QuantizedModule: what makes a module run with Q(weight), whatever it computes with it."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.checks import article
from ..spec.quantizer import Quantizer
from .inputs import rotated
from .kept import forward_weight
from .parameter import VALUES, Values, read_as_values
from .quantized import QuantizedWeight
from .view import place
from .weight import WeightQuantizer, changes, is_replaced

if TYPE_CHECKING:
    from typing import Self


class QuantizedModule(QuantizedWeight):
    """Mixin of a module that keeps a parameter as the latent and runs with Q of it.

    A subclass also inherits from the plain module's class, and names it as ``PLAIN``. That class's forward
    reads Q, see :mod:`fogzo_kernels.nn.parameter`. :meth:`from_plain` turns a plain module into a quantized
    one.

    In ``eval()``, without grad, Q is made once and kept until weight or alpha change. An edit in place through
    ``.data`` is not seen: call ``model.eval()`` again after it.
    """

    #: The class of the module that it was.
    PLAIN: ClassVar[type[nn.Module]]
    #: The first argument of the forward.
    INPUT: ClassVar[str]
    #: The property of the parameter's name.
    READ: ClassVar[property]

    weight: Tensor

    # ---- from a plain module, and back

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "PLAIN" in vars(cls):
            cls.READ = read_as_values(cls.PARAMETER)
            setattr(cls, cls.PARAMETER, cls.READ)
            cls.INPUT = [*inspect.signature(cls.PLAIN.forward).parameters, ""][1]
            if "forward" not in vars(cls):  # with the plain forward's signature
                own = QuantizedModule.forward
                copy = types.FunctionType(own.__code__, own.__globals__, closure=own.__closure__)
                cls.forward = functools.update_wrapper(copy, cls.PLAIN.forward)  # type: ignore[method-assign]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes a plain module from arguments: adapters call the type of the module that they adapt."""
        return cls.PLAIN(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __init__(self) -> None:
        """Raise; a call without arguments alone comes here, and quantized modules are made in place."""
        raise TypeError(
            f"{type(self).__name__} is made by quantize_model(model, quantizer), in place, from"
            f" {article(self.PLAIN.__name__)}"
        )

    @classmethod
    def from_plain(
        cls, module: nn.Module, weight: WeightQuantizer, *, alpha: Tensor, activation: Quantizer | None = None
    ) -> Self:
        """Turn a plain module into a quantized one, in place: parameters, hooks and names stay."""
        module.__class__ = cls
        assert isinstance(module, cls)
        module.begin(weight, alpha, activation)
        module.lay_out()
        return module

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """Turn it back, in place; its weight stays as it is."""
        for name in self.ADDED:
            for kept in (self._buffers, self._parameters, self.__dict__):
                kept.pop(name, None)
        if self.OUTPUTS:
            self.latent.data = self.latent.data.contiguous()
        self.__class__ = self.PLAIN  # type: ignore[assignment]
        return self

    # ---- the forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain class's forward, which reads Q(weight)."""
        if not args and self.INPUT in kwargs:
            args = (kwargs.pop(self.INPUT),)
        if getattr(type(self), self.PARAMETER) is not type(self).READ:
            raise RuntimeError(
                f"{self.PARAMETER} must not be parametrized in a quantized {self.PLAIN.__name__}: the forward"
                " would read values that are not quantized. Call dequantize_model(model, latents=True) before"
                " you do"
            )
        block, at = self.quantizer.block, self.ROTATED
        if self.input_quantizer is not None or (block and at == "input"):
            args = (self.effective_input(args[0], block if at == "input" else 0), *args[1:])
        values: Values = self.__dict__[VALUES]
        own = {self.PARAMETER: forward_weight(self, args[0] if args else None)}
        out = values.during(own, super().forward, args, kwargs)
        return rotated(out, block, self.backend) if block and at == "output" else out

    # ---- what PyTorch does to a module

    @property
    def reset_parameters(self) -> Callable[[], None]:
        """Initializes the plain module's weights, where it can, and makes alpha anew from them."""
        plain = super().reset_parameters  # type: ignore[misc]

        def reset() -> None:
            plain()
            self.calibrate_()

        return reset

    __repr__ = nn.Module.__repr__  # the plain class's own would not show the quantizer

    def extra_repr(self) -> str:
        own, how, alpha = self.PLAIN.__repr__, self.quantizer, tuple(self.alpha.shape)
        plain = super().extra_repr() if own is nn.Module.__repr__ else own(self).partition("(")[2][:-1]
        added = f"levels={how.grid.levels}, alpha={alpha}, {how.straight_through}"
        added += f", {how.transform}" if how.transform else ""
        inputs = "" if self.activation is None else f"input levels={self.activation.grid.levels}"
        return ", ".join(filter(None, [plain, added, inputs]))

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute and notes a new weight. ``fully_shard`` sets its shards through this method."""
        old, is_weight = self._parameters.get(name), name == self.PARAMETER
        changes.count += is_weight or name in self.ADDED
        super().__setattr__(name, value)
        if is_weight:
            place(self)
            if is_replaced(self, old, value):
                self.weight_quantizer.stale = True
