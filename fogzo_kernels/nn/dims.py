"""Dims says what the dimensions of a parameter count. This file knows which parameters are weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize

LETTERS = "e: experts, each a weight of its own; o: outputs; i: inputs"


class Dims(NamedTuple):
    """What each dimension of a parameter counts, a letter each: e, experts; o, outputs; i, inputs."""

    letters: str

    @property
    def is_stack(self) -> bool:
        return self.letters.startswith("e")

    @property
    def rows(self) -> int:
        """The dimension that counts the rows of the matrix that is quantized."""
        return 0 if self.is_stack else self.letters.index("o")

    @property
    def expert_outputs(self) -> int | None:
        """The dimension that counts an expert's outputs; None where there are no experts."""
        return self.letters.index("o") if self.is_stack else None

    def __str__(self) -> str:
        return repr(self.letters)


#: Of attention, the parameters that its forward may multiply with.
IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
#: Of classes, the parameters that their forwards multiply with.
DECLARED: dict[type[nn.Module], dict[str, Dims]] = {}


def declare_weights(kind: type[nn.Module], **dims: str) -> None:
    """Say which parameters of a class of modules are weights, so that :func:`quantize_model` quantizes them.

    The forward of the class reads each parameter as ``self.name``, as often as it likes, and gets Q of it. It
    must not write into it. You need no declaration for linear layers, convolutions, embeddings, recurrent
    layers, attention and the experts of ``transformers``.

    Args:
        kind: the class. Its subclasses have the same weights.
        dims: for each parameter, by its name, one letter per dimension. ``"e"`` counts experts and comes first:
            each expert is a weight with its own scale and noise. ``"o"`` counts outputs and occurs once.
            ``"i"`` counts inputs. The weight of a linear layer is ``"oi"``, a stack of such weights ``"eoi"``,
            a transposed stack ``"eio"``.

    Raises:
        TypeError: ``kind`` is no class of modules, or the letters are no string.
        ValueError: the letters are not as above.

    Example:
        >>> class Experts(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = torch.nn.Parameter(torch.ones(4, 16, 8))
        >>> fk.declare_weights(Experts, up="eoi")
        >>> fk.quantize_model(Experts(), fk.presets.lsq(2)).quantized[0].scales
        4
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a class of modules, got {kind!r}")
    DECLARED[kind] = {name: checked(name, letters) for name, letters in dims.items()}


def checked(name: str, letters: str) -> Dims:
    """Dims of these letters; raises if they are wrong."""
    if not isinstance(letters, str):
        raise TypeError(f"{name} must be a string of letters ({LETTERS}), got {type(letters).__name__}")
    rest = letters.removeprefix("e")
    if set(rest) - set("oi") or rest.count("o") != 1 or len(rest) < 2 or (rest != letters and len(rest) != 2):
        raise ValueError(f"{name} must be letters such as 'oi', 'eoi' or 'eio' ({LETTERS}), got {letters!r}")
    return Dims(letters)


def usual(ndim: int) -> Dims:
    """Dims of a parameter that nothing is known of: a matrix, a stack of matrices, or outputs first."""
    return Dims("eoi" if ndim == 3 else "o" + "i" * (ndim - 1))


def read_by(module: nn.Module) -> list[str]:
    """The children whose weights a module reads without running them: they are a part of it."""
    if isinstance(module, nn.MultiheadAttention):
        return ["out_proj"]
    return ["parametrizations"] if parametrize.is_parametrized(module) else []


def reader_of(modules: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    """The module of a model that reads the weights of the one at ``path`` without running it, or None."""
    names = path.split(".")
    parents = (modules[".".join(names[:i])] for i in range(len(names)))
    return next((m for m, child in zip(parents, names, strict=True) if child in read_by(m)), None)


def weights_in(module: nn.Module) -> dict[str, Dims]:
    """The parameters that a module's forward multiplies with, of itself and of children that it reads.

    Empty for modules that nothing is known of. Names of children's parameters have a dot.
    """
    kind = next((k for k in type(module).__mro__ if k in DECLARED), None)
    own = module._parameters
    if kind is not None:
        declared = DECLARED[kind]
        for name, dims in declared.items():
            p = own.get(name)
            if p is not None and p.ndim != len(dims.letters):
                raise ValueError(
                    f"{kind.__name__}.{name} must have the {len(dims.letters)} dimensions that declare_weights"
                    f" gave it, {dims}, got shape {tuple(p.shape)}"
                )
        return {name: dims for name, dims in declared.items() if own.get(name) is not None}
    if isinstance(module, nn.MultiheadAttention):
        names = [name for name in own if name in IN_PROJECTIONS and own[name] is not None]
        return dict.fromkeys([*names, "out_proj.weight"], Dims("oi"))
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        flat = getattr(module, "_flat_weights_names", ["weight_ih", "weight_hh"])  # without what hooks remake
        return {name: Dims("oi") for name, p in own.items() if name in flat and p is not None and p.ndim == 2}
    if isinstance(getattr(module, "is_transposed", None), bool) and hasattr(module, "_apply_gate"):
        stack = Dims("eio" if module.is_transposed else "eoi")  # experts of transformers
        return {name: stack for name, p in own.items() if p is not None and p.ndim == 3}
    return {}
