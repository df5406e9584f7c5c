"""Rules: which quantizer each module of a model gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from ..spec.quantizer import Quantizer
from .inputs import check_activation
from .module import QuantizedModule
from .registry import quantized_form, read_by, reason_against, weights_of

#: A name or pattern of names, a type, or a function of name and module.
Which = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Rule = tuple[Which, Quantizer | None] | tuple[Which, Quantizer | None, Quantizer | None]
#: A rule as it is decided: which modules, their weights' quantizer, their inputs'.
Full = tuple[Which, Quantizer | None, Quantizer | None]


class Unit(NamedTuple):
    """A module that holds weights, with what it reads of its children."""

    names: list[str]  # the first is what messages and reports call it
    module: nn.Module
    inside: list[nn.Module]  # the modules that it lies in, and itself


class Choice(NamedTuple):
    """What becomes of a module."""

    unit: Unit
    quantizer: Quantizer | None
    activation: Quantizer | None
    reason: str | None  # why it is left alone


def choose(
    model: nn.Module,
    quantizer: Quantizer | None,
    activation: Quantizer | None,
    rules: Sequence[Rule],
    skip: Which | Sequence[Which],
) -> list[Choice]:
    """What becomes of each module of ``model`` that holds weights; the first rule that matches decides.

    Raises:
        TypeError: a rule is none.
        ValueError: a rule matches nothing, or asks for what cannot be quantized.
    """
    given = [skip] if isinstance(skip, str | type) or callable(skip) else skip
    if not isinstance(given, Sequence):
        raise TypeError(
            f"skip must be a name, a type or a function, or a list of them, got {type(skip).__name__}"
        )
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise TypeError(f"rules must be a list of pairs, got {type(rules).__name__}")
    named: list[tuple[str, Full]] = [(f"skip[{i}]", (which, None, None)) for i, which in enumerate(given)]
    named += [(f"rules[{i}]", _checked(i, rule, activation)) for i, rule in enumerate(rules)]
    for name, (which, _, _) in named:
        if not (isinstance(which, str) or callable(which)):
            raise TypeError(f"{name} must be a name, a type or a function, got {type(which).__name__}")
    units = units_of(model)
    first: dict[int, int] = {}  # unit to rule, by their places
    for r, (name, (which, _, _)) in enumerate(named):
        matched = [u for u, unit in enumerate(units) if _matches(which, unit)]
        if not matched:
            raise ValueError(f"{name} must match a module of model that holds weights, got {shown(which)}")
        for u in matched:
            first.setdefault(u, r)
    for r, (name, rule) in enumerate(named):
        _check_asked(name, rule, [units[u] for u, found in first.items() if found == r])
    default = quantizer, activation
    return [_choice(unit, default, named[first[u]] if u in first else None) for u, unit in enumerate(units)]


def units_of(model: nn.Module) -> list[Unit]:
    """The modules that hold weights. One that has several names, being used in several places, is one."""
    paths = dict(model.named_modules(remove_duplicate=False))
    parts = {id(c) for m in paths.values() for child in read_by(m) for c in m.get_submodule(child).modules()}
    names: dict[nn.Module, list[str]] = {}
    for name, m in paths.items():
        if id(m) not in parts and any(weights_of(m)):
            names.setdefault(m, []).append(name)
    around = {m: [paths[part] for name in own for part in _path(name)] for m, own in names.items()}
    return [Unit(own, m, around[m]) for m, own in names.items()]


def _path(name: str) -> list[str]:
    """The names of the modules from the root to that one."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _checked(i: int, rule: object, activation: Quantizer | None) -> Full:
    if not isinstance(rule, tuple | list) or len(rule) not in (2, 3):
        raise TypeError(
            f"rules[{i}] must be (which modules, quantizer) or that and an activation, got {rule!r}"
        )
    which, quantizer, of_input = (*rule, activation)[:3]
    for k, value in ((1, quantizer), (2, of_input)):
        if value is not None and not isinstance(value, Quantizer):
            raise TypeError(f"rules[{i}][{k}] must be a Quantizer or None, got {type(value).__name__}")
    if of_input is not None:
        check_activation(f"rules[{i}][2]", of_input)
    return which, quantizer, of_input


def _matches(which: Which, unit: Unit) -> bool:
    """A name or type that fits a module fits all that lies in it; a function is asked for each module."""
    if isinstance(which, str):
        return any(fnmatchcase(part, which) for name in unit.names for part in _path(name))
    if isinstance(which, type):
        return any(isinstance(m, which) for m in unit.inside)
    return any(which(name, unit.module) for name in unit.names)


def shown(which: Which) -> str:
    """A rule's first half as messages and reports print it."""
    return repr(which) if isinstance(which, str) else getattr(which, "__name__", repr(which))


def _check_asked(name: str, rule: Full, matched: list[Unit]) -> None:
    """Raise if a rule asks for what cannot be quantized; ``matched`` is what it decides on."""
    which, quantizer, _ = rule
    if quantizer is None or not matched:
        return
    against = {unit.names[0]: reason_against(unit.module) for unit in matched if _is_weight(unit)}
    refused = [f"{unit or 'model'}: {reason}" for unit, reason in against.items() if reason is not None]
    if refused:
        raise ValueError(
            f"{name} must match modules that can be quantized, got {shown(which)}, which matches"
            f" {'; '.join(refused[:5])}{'; ...' if len(refused) > 5 else ''}. A rule before it, with None,"
            " leaves them alone"
        )
    if not against:
        raise ValueError(f"{name} must match a module that can be quantized, got {shown(which)}")


def _is_weight(unit: Unit) -> bool:
    """Whether it holds a weight that multiplies: norms and position tables are no reason to refuse a rule."""
    module = unit.module
    if isinstance(module, QuantizedModule) or quantized_form(module) is not None:
        return True
    return any("weight" in name for name in weights_of(module).matrices)


def _choice(
    unit: Unit, default: tuple[Quantizer | None, Quantizer | None], first: tuple[str, Full] | None
) -> Choice:
    quantizer, activation = default
    if isinstance(unit.module, QuantizedModule):
        return Choice(unit, None, None, "quantized before")
    if first is not None:
        name, (which, quantizer, activation) = first
        if quantizer is None:
            return Choice(unit, None, None, f"{name}, {shown(which)}")
    elif quantizer is None:
        return Choice(unit, None, None, "no rule names it")
    reason = reason_against(unit.module)
    if isinstance(unit.module, nn.Embedding):  # whose input is indices
        activation = None
    return Choice(unit, None if reason else quantizer, activation, reason)
