"""HeldWeight: quantizes one parameter of a module that may have several, such as a stack of experts.

The module's class gets a property of each parameter's name (:mod:`fogzo_kernels.nn.parameter`), and a child for
each, which has alpha and quantizer. The parameter stays where PyTorch keeps it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..spec.quantizer import Quantizer
from .dims import Dims, read_by
from .kept import forward_weight
from .module import QuantizedModule
from .parameter import VALUES, Values, read_as_values
from .quantized import QuantizedWeight
from .view import place
from .weight import WeightQuantizer, changes, is_replaced

#: A child has the name of its parameter with this at the end.
CHILD = "_quantizer"
#: The method of transformers' experts between their two products, whose result ``down_proj`` multiplies.
GATE = "_apply_gate"


class HeldWeight(QuantizedWeight):
    """Quantizes a parameter of its parent module; made by :func:`fogzo_kernels.quantize_model`.

    Attributes:
        dims: the letters of the parameter's dimensions, see :func:`fogzo_kernels.declare_weights`.
        came: whether the state dict that is being loaded has the parameter.
    """

    came: bool

    def __init__(
        self, home: nn.Module, name: str, dims: Dims, weight: WeightQuantizer, alpha: Tensor,
        activation: Quantizer | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.training = home.training
        # in a tuple, as PyTorch would take a module for a child
        vars(self).update(_home=(home,), PARAMETER=name, dims=dims, OUTPUTS=dims.rows, came=False)
        self.EXPERT_OUTPUTS = dims.expert_outputs
        self.begin(weight, alpha, activation)

    @property
    def home(self) -> nn.Module:
        home: nn.Module = vars(self)["_home"][0]
        return home

    @property
    def registered(self) -> Tensor | None:
        registered: Tensor | None = vars(self)["_home"][0]._parameters.get(self.PARAMETER)
        return registered

    @property
    def letters(self) -> str:
        """The letters of ``dims``."""
        dims: Dims = vars(self)["dims"]
        return dims.letters

    def input_rows(self, input: Tensor) -> Tensor:
        return input.flatten(0, -2) if input.ndim > 1 else input.unsqueeze(0)

    def weight_key(self, prefix: str) -> str:
        return prefix.removesuffix(f"{self.PARAMETER}{CHILD}.") + self.PARAMETER

    def has_weight(self, state_dict: dict[str, Any], prefix: str) -> bool:
        return self.came  # a child is given its own keys alone

    def __setattr__(self, name: str, value: Any) -> None:
        changes.count += 1
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        how = self.quantizer
        text = f"dims={self.dims}, levels={how.grid.levels}, alpha={tuple(self.alpha.shape)}"
        return f"{text}, {how.straight_through}" + (f", {how.transform}" if how.transform else "")


class Holder(nn.Module):
    """Mixin of a module that runs with Q of parameters of itself and of children that it reads.

    Attributes:
        PLAIN: the class of the module before.
        NAMES: the parameters that are quantized.
    """

    PLAIN: ClassVar[type[nn.Module]]
    NAMES: ClassVar[tuple[str, ...]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain class's forward, which reads Q of the parameters."""
        first, run = args[0] if args else next(iter(kwargs.values()), None), super().forward
        parts = (self, *map(self.get_submodule, read_by(self)))
        weights = {part: own for part in parts if (own := [*held_in(part)])}
        inputs = [h for own in weights.values() for h in own if h.input_quantizer is not None]
        if inputs:
            return self._with_inputs(inputs, weights, run, args, kwargs)
        return with_values(weights, first, run, args, kwargs)

    def _with_inputs(
        self, inputs: list[HeldWeight], weights: dict[nn.Module, list[HeldWeight]], run: Callable[..., Any],
        args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """Run experts with a quantized input of each of their products."""
        by_name = {h.PARAMETER: h for h in inputs}
        down = by_name.pop("down_proj", None)
        name = next(iter(kwargs), "")
        hidden = args[0] if args else kwargs[name]
        first = hidden
        for h in by_name.values():
            hidden = h.effective_input(first)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, name: hidden}
        seen = vars(self)["gated"] = []
        try:
            out = with_values(weights, first, run, args, kwargs)
        finally:
            del vars(self)["gated"]
        if down is not None and not seen and first.numel():
            raise RuntimeError(
                f"{down.weight_quantizer.path} must get its input from {GATE}, got a forward that does not call"
                " it, so that the input would stay unquantized: set the model's experts implementation to"
                " 'grouped_mm' or 'batched_mm', or quantize without activation"
            )
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute and notes a new weight. ``fully_shard`` sets its shards through this method."""
        old, names = self._parameters.get(name), self.NAMES
        super().__setattr__(name, value)
        if name in names:
            changes.count += 1
            held = self._modules.get(name + CHILD)
            if isinstance(held, HeldWeight):
                place(held)
                if is_replaced(held, old, value):
                    held.weight_quantizer.stale = True

    def _load_from_state_dict(self, *args: Any) -> None:
        state_dict, prefix = args[:2]
        super()._load_from_state_dict(*args)
        for held in held_in(self):  # whose own keys are loaded next
            vars(held)["came"] = prefix + held.PARAMETER in state_dict

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for held in held_in(self):
            held.lay_out()
        return self


def with_values(
    weights: dict[nn.Module, list[HeldWeight]], input: object, run: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Run a forward in which modules read these weights as their values."""
    for module, own in weights.items():
        values: Values = vars(module)[VALUES]
        run = partial(_during, values, {h.PARAMETER: forward_weight(h, input) for h in own}, run)
    return run(*args, **kwargs)


def _during(values: Values, own: dict[str, Tensor], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return values.during(own, run, args, kwargs)


def gated(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The input of experts' second product, quantized where it has a quantizer."""
    out: Tensor = getattr(self.PLAIN, GATE)(self, *args, **kwargs)
    down = self._modules.get("down_proj" + CHILD)
    if down is None or down.input_quantizer is None:
        return out
    if "gated" in vars(self):
        vars(self)["gated"].append(True)
    quantized: Tensor = down.effective_input(out)
    return quantized


class _FlatWeights:
    """What PyTorch's recurrent layers compute with: in a forward Q of the weights, else the parameters."""

    def __get__(self, module: Any, kind: Any = None) -> Any:
        flat = vars(module)["_flat_weights"]
        values = vars(module)[VALUES].now() if VALUES in vars(module) else None
        if values is None:
            return flat
        return [values.get(name, w) for name, w in zip(module._flat_weights_names, flat, strict=True)]

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)["_flat_weights"] = value


@functools.cache
def holder_class(plain: type[nn.Module], names: tuple[str, ...]) -> type[Holder]:
    """The class of a module of any class that runs with Q of these parameters."""
    made: dict[str, Any] = {"PLAIN": plain, "NAMES": names, "__reduce_ex__": _reduce}
    made |= {name: read_as_values(name) for name in names}
    if hasattr(plain, GATE):
        made[GATE] = gated
    if issubclass(plain, nn.RNNBase):
        made["_flat_weights"] = _FlatWeights()
    return type(f"Quant{plain.__name__}", (Holder, plain), made)


def _reduce(module: Any, protocol: Any) -> Any:
    """Where the module is unpickled, its class is made again."""
    reduced: Any = nn.Module.__reduce_ex__(module, protocol)
    kind = type(module)
    return (_blank, (kind.PLAIN, kind.NAMES), *reduced[2:]) if "PLAIN" in vars(kind) else reduced


def _blank(plain: Any, names: tuple[str, ...]) -> nn.Module:
    """A module of a class that was made, without its state."""
    kind = holder_class(plain, names)
    return kind.__new__(kind)


def hold(
    home: nn.Module, name: str, dims: Dims, weight: WeightQuantizer, *, alpha: Tensor,
    activation: Quantizer | None = None, reader: nn.Module | None = None,
) -> HeldWeight:  # fmt: skip
    """Let a module run with Q of a parameter, in place, and return what quantizes it.

    ``reader``: the parent whose forward reads the parameter, if it is not the module's own.
    """
    held = HeldWeight(home, name, dims, weight, alpha, activation)
    for module, names in ((home, {name}), (reader, set())):
        if module is not None:
            kind: Any = type(module)
            if isinstance(module, Holder):
                kind, names = module.PLAIN, {*module.NAMES, *names}
            module.__class__ = holder_class(kind, tuple(sorted(names)))
            vars(module).setdefault(VALUES, Values())
    home.register_module(name + CHILD, held)
    held.lay_out()
    return held


@torch.no_grad()
def let_go(model: nn.Module) -> None:
    """Turn all quantized modules and parameters of a model back into plain ones; their values stay."""
    for m in [m for m in model.modules() if isinstance(m, QuantizedModule)]:
        m.to_plain()
    for home in [m for m in model.modules() if isinstance(m, Holder)]:
        for held in [*held_in(home)]:
            held.latent.data = held.latent.data.contiguous()
            del home._modules[held.PARAMETER + CHILD]
        home.__class__ = home.PLAIN  # type: ignore[assignment]
        vars(home).pop(VALUES, None)


def held_in(module: nn.Module) -> Iterator[HeldWeight]:
    """Yields what quantizes parameters of a module."""
    return (child for child in module._modules.values() if isinstance(child, HeldWeight))
