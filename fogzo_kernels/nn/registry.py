"""Which modules have a quantized form, and why others have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..ops import checks
from ..spec.grid import FLOATS
from ..spec.quantizer import Quantizer
from .dims import DECLARED, Dims, read_by, reader_of, usual, weights_in
from .held import CHILD, GATE, HeldWeight, Holder, hold
from .linear import QuantLinear
from .module import QuantizedModule
from .quantized import QuantizedWeight
from .tied import quantized_at
from .view import is_fsdp, local
from .weight import WeightQuantizer


class QuantConv1d(QuantizedModule, nn.Conv1d):
    """``nn.Conv1d`` that runs with Q(weight); :func:`quantize_model` makes it.

    A row of the weight belongs to one output channel. It has the attributes of :class:`QuantLinear`.

    Example:
        >>> model = torch.nn.Conv1d(4, 8, 3)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2, "row"))
        >>> type(model).__name__, model.alpha.shape
        ('QuantConv1d', torch.Size([8, 1]))
    """

    PLAIN = nn.Conv1d


class QuantConv2d(QuantizedModule, nn.Conv2d):
    """``nn.Conv2d`` that runs with Q(weight); :func:`quantize_model` makes it.

    A row of the weight belongs to one output channel. A weight in the memory format channels_last draws its
    noise in the order of its memory. It has the attributes of :class:`QuantLinear`.

    Example:
        >>> model = torch.nn.Conv2d(4, 8, 3)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2, "row"))
        >>> type(model).__name__, model.alpha.shape
        ('QuantConv2d', torch.Size([8, 1]))
    """

    PLAIN = nn.Conv2d


class QuantConv3d(QuantizedModule, nn.Conv3d):
    """``nn.Conv3d`` that runs with Q(weight); :func:`quantize_model` makes it.

    A row of the weight belongs to one output channel. A weight in the memory format channels_last_3d draws its
    noise in the order of its memory. It has the attributes of :class:`QuantLinear`.

    Example:
        >>> model = torch.nn.Conv3d(4, 8, 3)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2, "row"))
        >>> type(model).__name__, model.alpha.shape
        ('QuantConv3d', torch.Size([8, 1]))
    """

    PLAIN = nn.Conv3d


class QuantEmbedding(QuantizedModule, nn.Embedding):
    """``nn.Embedding`` that runs with Q(weight); :func:`quantize_model` makes it.

    A row of the weight is the vector of one entry. The row of ``padding_idx`` gets no gradient, as in PyTorch,
    and no estimate of FOGZO. The forward returns Q of that row, which is not 0 on grids without 0. The
    attributes of :class:`QuantLinear` are here, too.

    Example:
        >>> model = torch.nn.Embedding(10, 8)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2, "row"))
        >>> type(model).__name__, model.alpha.shape
        ('QuantEmbedding', torch.Size([10, 1]))
    """

    PLAIN = nn.Embedding
    ROTATED = "output"  # only entries that were read, not all


#: The classes that were made, by the arguments of :func:`quantized_class`.
_classes: dict[tuple[Any, ...], type[QuantizedModule]] = {}


def quantized_class(
    plain: type[nn.Module], parameter: str = "weight", outputs: int = 0, rotated: str = "weight"
) -> type[QuantizedModule]:
    """The class of a module of any class that runs with one of its parameters quantized.

    Args:
        plain: the module's class.
        parameter: which of its parameters; it has two dimensions or more.
        outputs: the parameter's dimension that counts the outputs.
        rotated: where a transform of the weight is undone: at the "weight", or of a module that multiplies
            rows by its "input" there, or of one that returns rows at its "output".
    """
    made = plain, parameter, outputs, rotated

    def reduce(module: QuantizedModule, protocol: Any) -> Any:
        """Where the module is unpickled, its class is made again."""
        reduced: Any = nn.Module.__reduce_ex__(module, protocol)
        return (_blank, made, *reduced[2:]) if type(module) is _classes[made] else reduced

    if made not in _classes:
        names: dict[str, Any] = {"PLAIN": plain, "PARAMETER": parameter, "OUTPUTS": outputs, "ROTATED": rotated}
        names["__reduce_ex__"] = reduce
        _classes[made] = type(f"Quant{plain.__name__}", (QuantizedModule, plain), names)
    return _classes[made]


def _blank(*made: Any) -> QuantizedModule:
    """A module of a class that was made, without its state."""
    kind = quantized_class(*made)
    module: QuantizedModule = kind.__new__(kind)
    return module


#: Which class a plain module becomes. A subclass of such a module keeps its forward.
QUANTIZED: dict[type[nn.Module], type[QuantizedModule]] = {
    **{kind.PLAIN: kind for kind in (QuantLinear, QuantConv1d, QuantConv2d, QuantConv3d, QuantEmbedding)},
    **{kind: quantized_class(kind) for kind in (nn.EmbeddingBag, nn.Bilinear)},
    **{
        kind: quantized_class(kind, outputs=1)
        for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    },
}
#: Classes of other packages, which are not imported here, with the arguments of :func:`quantized_class`.
NAMED: dict[str, dict[str, Any]] = {
    "transformers.pytorch_utils.Conv1D": {"outputs": 1, "rotated": "input"},
}


def quantized_form(module: nn.Module) -> type[QuantizedModule] | None:
    """The class that a module of this type becomes; None if it has none with one weight."""
    kind = type(module)
    if isinstance(module, QuantizedWeight | Holder):
        return None
    options = NAMED.get(f"{kind.__module__}.{kind.__qualname__}")
    if options is not None:
        return quantized_class(kind, **options)
    if kind in QUANTIZED or is_fsdp(module) or kind.__module__.startswith("torch.ao."):
        return QUANTIZED.get(kind)
    base = next((k for k in kind.__mro__ if k in QUANTIZED or k in DECLARED), None)
    return quantized_class(kind, outputs=QUANTIZED[base].OUTPUTS) if base in QUANTIZED else None


def quantizing(
    modules: Mapping[str, nn.Module],
    name: str,
    dims: Dims | None,
    how: WeightQuantizer,
    alpha: Tensor,
    activation: Quantizer | None,
) -> Callable[[], QuantizedWeight]:
    """What quantizes a module of a model in place, or with ``dims`` a parameter, by its name in the model."""
    if dims is None:
        form = quantized_form(modules[name])
        assert form is not None
        return partial(form.from_plain, modules[name], how, alpha=alpha, activation=activation)
    path, _, own = name.rpartition(".")
    reader = reader_of(modules, path)
    return partial(hold, modules[path], own, dims, how, alpha=alpha, activation=activation, reader=reader)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters, and parameters of children that it reads itself; all must be initialized."""
    added = QuantizedModule.ADDED if isinstance(module, QuantizedWeight) else ()
    own: dict[str, Tensor] = {
        name: p for name, p in module._parameters.items() if p is not None and name not in added
    }
    for child in read_by(module):
        every = module.get_submodule(child).named_parameters()
        own |= {f"{child}.{name}": p for name, p in every if CHILD not in name}
    for name, p in own.items():
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"{type(module).__name__}.{name} must be initialized: run the model once before")
    return own


class Unit(NamedTuple):
    """A weight that can be quantized, or a module that holds others, with what it can become."""

    names: list[str]  # of the module
    module: nn.Module
    around: list[tuple[str, nn.Module]]  # the modules that it lies in, and itself
    weights: dict[str, Tensor]  # the tensors that the unit stands for, by their names
    form: type[QuantizedModule] | None  # of a module with one weight
    against: str | Exception | None  # see :func:`reason_against`
    dims: Dims | None = None  # of a parameter that is held
    usual: bool = True  # whether it is quantized unless a rule says so; else only if a rule names the parameter

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The weights of two dimensions or more; the others are biases and norms."""
        return {name: p for name, p in self.weights.items() if p.ndim > 1}

    @property
    def parameter(self) -> str:
        """The name of the parameter that is quantized, in the module."""
        return next(iter(self.weights)) if self.dims is not None else "weight"

    @property
    def paths(self) -> list[str]:
        """The names of the parameter in the model."""
        return [f"{name}.{self.parameter}".lstrip(".") for name in self.names]

    @property
    def name(self) -> str:
        """What messages and reports call it."""
        return self.names[0] if self.dims is None else self.paths[0]

    @property
    def home(self) -> tuple[nn.Module, str]:
        """The module that has the parameter, and its name there."""
        path, _, name = self.parameter.rpartition(".")
        return self.module.get_submodule(path), name

    @property
    def quantized(self) -> QuantizedWeight | None:
        """What quantizes it already."""
        if isinstance(self.module, QuantizedModule):
            return self.module
        return quantized_at(self.home) if self.dims is not None else None


def units_of(model: nn.Module) -> list[Unit]:
    """Returns weights that can be quantized, and modules that hold others, once with all their names."""
    paths = dict(model.named_modules(remove_duplicate=False))
    parts = {id(c) for m in paths.values() for child in read_by(m) for c in m.get_submodule(child).modules()}
    units: dict[nn.Module, list[Unit]] = {}
    around: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, m in paths.items():
        around[name] = [*(around[name.rpartition(".")[0]] if name else []), (name, m)]
        if m in units:
            for unit in units[m]:
                unit.names.append(name)
                unit.around.extend(around[name])
        elif id(m) not in parts and not isinstance(m, HeldWeight) and (weights := weights_of(m)):
            units[m] = list(units_in(name, m, around[name], weights))
    return [unit for own in units.values() for unit in own]


def units_in(
    name: str, module: nn.Module, around: list[tuple[str, nn.Module]], weights: dict[str, Tensor]
) -> Iterator[Unit]:
    """Yields the units of a module."""
    form = quantized_form(module)
    alone = is_fsdp(module) and any(kind in QUANTIZED for kind in type(module).__mro__)
    if form is not None or isinstance(module, QuantizedModule) or alone or made_anew(module):
        yield Unit([name], module, [*around], weights, form, reason_against(name, module, form))
        return
    known = weights_in(module)
    for parameter, p in weights.items():
        dims = known.get(parameter)
        if p.ndim > 1:
            own = dims if dims is not None else usual(p.ndim)
            part = parameter.rpartition(".")[0]  # a child that the module reads
            inside = [(f"{name}.{part}".lstrip("."), module.get_submodule(part))] if part else []
            unit = Unit([name], module, [*around, *inside], {parameter: p}, None, None, own, dims is not None)
            against = "it is quantized already" if unit.quantized else reason_against_parameter(unit)
            yield unit._replace(against=against)
    if rest := {parameter: p for parameter, p in weights.items() if p.ndim <= 1}:
        yield Unit([name], module, [*around], rest, None, f"{type(module).__name__} has no quantized form")


def reason_against_parameter(unit: Unit) -> str | Exception | None:
    """Why a parameter cannot be held; None if it can. See :func:`reason_against`."""
    weight, where, module = unit.weights[unit.parameter], unit.paths[0], unit.module
    if is_fsdp(module) and unit.usual:
        return ValueError(f"{where} must be quantized before fully_shard is given its module by itself")
    if parametrize.is_parametrized(unit.home[0]):
        return "its module is parametrized: made anew in each forward"
    if reason := reason_against_tensor(where, weight):
        return reason
    if made := made_of(*unit.home):
        return f"it is a part of {made}, which is made anew in each forward"
    if unit.usual:
        return None
    known = "it is no known weight" if weights_in(module) else f"{kind_of(module)} is unknown"
    return f"{known}: a rule can name it"


def reason_against_tensor(where: str, weight: Tensor) -> str | Exception | None:
    """Why a parameter is none that can be quantized; None if it can."""
    sharded = local(weight) is not weight and type(local(weight)) is Tensor
    if not sharded and (type(weight) is not nn.Parameter or type(weight.data) is not Tensor):
        return f"its weight is a {type(weight.data if type(weight) is nn.Parameter else weight).__name__}"
    if weight.dtype not in FLOATS:
        return TypeError(f"{where} must be {checks.named(FLOATS)}, got {checks.named([weight.dtype])}")
    return None


def reason_against(name: str, module: nn.Module, form: type[QuantizedModule] | None) -> str | Exception | None:
    """Why a module that holds weights cannot be quantized; None if it can.

    An error is to be raised if the module is to be quantized. With any other reason it is left alone.
    """
    if isinstance(module, QuantizedModule):
        return "it is quantized already"
    if form is None and is_fsdp(module):
        return ValueError(
            f"model must be quantized before fully_shard is given one of its modules by itself, got {module}"
        )
    weight = None if form is None else module._parameters.get(form.PARAMETER)
    if weight is None:
        without = "its weight is no Parameter" if form else f"{type(module).__name__} has no quantized form"
        return made_anew(module) or without
    reason = reason_against_tensor(f"{name}.weight".lstrip("."), weight)
    if isinstance(reason, str):
        return reason
    if getattr(module, "sparse", False):
        return "its gradients are sparse"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes its weight in the forward"
    taken = [x for x in QuantizedModule.ADDED if hasattr(module, x)]
    if taken:
        return ValueError(f"{name or 'model'} must not have an attribute {taken[0]!r} of its own")
    return reason


def kind_of(module: nn.Module) -> str:
    """The name of a module's class, before it was quantized."""
    return getattr(type(module), "PLAIN", type(module)).__name__


def against_activation(unit: Unit) -> str | None:
    """Why the input of a unit's weight cannot be quantized; None if it can, "" if nobody expects it."""
    module = unit.module
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return ""  # its input is indices
    if isinstance(module, nn.Bilinear):
        return "it has two inputs"
    if unit.dims is None or (hasattr(module, GATE) and getattr(module, "has_gate", False)):
        return None
    return f"{type(module).__name__} does not say which tensor meets this weight"


def made_of(module: nn.Module, name: str) -> str | None:
    """The tensor that hooks of weight_norm or prune make of a parameter, or None."""
    whole = name.removesuffix("_orig").removesuffix("_g").removesuffix("_v")
    return whole if whole != name and isinstance(vars(module).get(whole), Tensor) else None


def made_anew(module: nn.Module) -> str | None:
    """How a module's weight is made in each forward from others, or None."""
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is parametrized: made anew in each forward"
    hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    if "weight" not in module._parameters and isinstance(getattr(module, "weight", None), Tensor) and hooks:
        return f"its weight is made anew in each forward, by {hooks[0]}"
    return None
