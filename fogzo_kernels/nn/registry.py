"""Which modules have a quantized form, and why others have none."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..ops import checks
from ..spec.grid import FLOATS
from .linear import QuantLinear
from .module import QuantizedModule
from .view import FSDPModule, local


class QuantConv1d(QuantizedModule, nn.Conv1d):
    """``nn.Conv1d`` that runs with Q(weight); made by :func:`fogzo_kernels.quantize_model`.

    A row of the weight is what one output channel is made of.
    """

    PLAIN = nn.Conv1d


class QuantConv2d(QuantizedModule, nn.Conv2d):
    """``nn.Conv2d`` that runs with Q(weight); made by :func:`fogzo_kernels.quantize_model`.

    The weight may lie in memory as channels_last. Its elements then draw their noise in that order.
    """

    PLAIN = nn.Conv2d


class QuantConv3d(QuantizedModule, nn.Conv3d):
    """``nn.Conv3d`` that runs with Q(weight); made by :func:`fogzo_kernels.quantize_model`.

    The weight may lie in memory as channels_last_3d. Its elements then draw their noise in that order.
    """

    PLAIN = nn.Conv3d


class QuantEmbedding(QuantizedModule, nn.Embedding):
    """``nn.Embedding`` that runs with Q(weight); made by :func:`fogzo_kernels.quantize_model`.

    A row is the vector of one entry. The row of ``padding_idx`` gets no gradient, as in PyTorch, and no
    estimate of FOGZO; what is read from it is Q of it, which is not 0 on grids without a 0.
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


#: Which class a plain module becomes; subclasses of it stay as they are.
QUANTIZED: dict[type[nn.Module], type[QuantizedModule]] = {
    kind.PLAIN: kind for kind in (QuantLinear, QuantConv1d, QuantConv2d, QuantConv3d, QuantEmbedding)
}
#: Classes of other packages, which are not imported here, with the arguments of :func:`quantized_class`.
NAMED: dict[str, dict[str, Any]] = {
    "transformers.pytorch_utils.Conv1D": {"outputs": 1, "rotated": "input"},
}


def quantized_form(module: nn.Module) -> type[QuantizedModule] | None:
    """The class that a module of this type becomes; None if there is none."""
    kind = type(module)
    options = NAMED.get(f"{kind.__module__}.{kind.__qualname__}")
    return QUANTIZED.get(kind) if options is None else quantized_class(kind, **options)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters, and parameters of children that it reads itself; all must be initialized."""
    added = QuantizedModule.ADDED if isinstance(module, QuantizedModule) else ()
    own: dict[str, Tensor] = {
        name: p for name, p in module._parameters.items() if p is not None and name not in added
    }
    for child in read_by(module):
        own |= {f"{child}.{name}": p for name, p in module.get_submodule(child).named_parameters()}
    for name, p in own.items():
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"{type(module).__name__}.{name} must be initialized: run the model once before")
    return own


def read_by(module: nn.Module) -> list[str]:
    """The children whose weights a module reads without running them: they are a part of it."""
    if isinstance(module, nn.MultiheadAttention):
        return ["out_proj"]
    return ["parametrizations"] if parametrize.is_parametrized(module) else []


class Unit(NamedTuple):
    """A module that holds weights, with what it reads of its children, and what it can become."""

    names: list[str]  # messages and reports say the first
    module: nn.Module
    around: list[tuple[str, nn.Module]]  # the modules that it lies in, and itself
    weights: dict[str, Tensor]  # the tensors that it holds itself, by their names
    form: type[QuantizedModule] | None
    against: str | Exception | None  # see :func:`reason_against`

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The weights of two dimensions or more; the others are biases and norms."""
        return {name: p for name, p in self.weights.items() if p.ndim > 1}


def units_of(model: nn.Module) -> list[Unit]:
    """Returns the modules that hold weights, each once with all its names."""
    paths = dict(model.named_modules(remove_duplicate=False))
    parts = {id(c) for m in paths.values() for child in read_by(m) for c in m.get_submodule(child).modules()}
    units: dict[nn.Module, Unit] = {}
    around: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, m in paths.items():
        around[name] = [*(around[name.rpartition(".")[0]] if name else []), (name, m)]
        if m in units:
            units[m].names.append(name)
            units[m].around.extend(around[name])
        elif id(m) not in parts and (weights := weights_of(m)):
            form = quantized_form(m)
            against = reason_against(name, m, form)
            units[m] = Unit([name], m, list(around[name]), weights, form, against)
    return list(units.values())


def reason_against(name: str, module: nn.Module, form: type[QuantizedModule] | None) -> str | Exception | None:
    """Why a module that holds weights cannot be quantized; None if it can.

    An error is to be raised if the module is to be quantized. With any other reason it is left alone.
    """
    if isinstance(module, QuantizedModule):
        return "it is quantized already"
    if form is None and isinstance(module, FSDPModule) and QUANTIZED.get(type(module).__mro__[2]):
        return ValueError(
            f"model must be quantized before fully_shard is given one of its modules by itself, got {module}"
        )
    weight = None if form is None else module._parameters.get(form.PARAMETER)
    if weight is None:
        without = "its weight is no Parameter" if form else f"{type(module).__name__} has no quantized form"
        return made_anew(module) or without
    sharded = local(weight) is not weight and type(local(weight)) is Tensor
    if not sharded and (type(weight) is not nn.Parameter or type(weight.data) is not Tensor):
        return f"its weight is a {type(weight.data if type(weight) is nn.Parameter else weight).__name__}"
    if getattr(module, "sparse", False):
        return "its gradients are sparse"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes its weight in the forward"
    taken = [x for x in QuantizedModule.ADDED if hasattr(module, x)]
    if taken:
        return ValueError(f"{name or 'model'} must not have an attribute {taken[0]!r} of its own")
    if weight.dtype not in FLOATS:
        where, got = f"{name}.weight".lstrip("."), checks.named([weight.dtype])
        return TypeError(f"{where} must be {checks.named(FLOATS)}, got {got}")
    return None


def made_anew(module: nn.Module) -> str | None:
    """How a module's weight is made in each forward from others, or None."""
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is parametrized: made anew in each forward"
    hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    if "weight" not in module._parameters and isinstance(getattr(module, "weight", None), Tensor) and hooks:
        return f"its weight is made anew in each forward, by {hooks[0]}"
    return None
