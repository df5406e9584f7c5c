"""Rules: which quantizer each module of a model gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from ..spec import presets
from ..spec.quantizer import Quantizer
from .inputs import check_activation
from .registry import Unit, against_activation, reason_against_parameter

#: A name or pattern of names, a type, or a function of name and module.
Which = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Rule = tuple[Which, Quantizer | None] | tuple[Which, Quantizer | None, Quantizer | None]


class Checked(NamedTuple):
    """A checked rule."""

    name: str  # in messages; "" of the default
    which: Which
    quantizer: Quantizer | None
    activation: Quantizer | None


class Choice(NamedTuple):
    """How a module is quantized, or why it is left alone."""

    unit: Unit
    quantizer: Quantizer | None
    activation: Quantizer | None
    reason: str | None
    inputs: str | None = None  # why its inputs stay as they are though they were to be quantized


def choose(
    units: list[Unit], default: Checked, rules: Sequence[Rule], skip: Which | Sequence[Which], may_be_none: bool
) -> list[Choice]:
    """Decides on each module that holds weights, by the first rule that matches, or by the default.

    ``may_be_none`` says whether it is no error that no module is to be quantized.
    """
    given = [skip] if isinstance(skip, str | type) or callable(skip) else skip
    if not isinstance(given, Sequence):
        raise TypeError(
            f"skip must be a name, a type or a function, or a list of them, got {type(skip).__name__}"
        )
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise TypeError(f"rules must be a list of pairs, got {type(rules).__name__}")
    full = [_checked(f"skip[{i}]", (which, None), None) for i, which in enumerate(given)]
    full += [_checked(f"rules[{i}]", rule, default.activation) for i, rule in enumerate(rules)]
    first: dict[int, Checked] = {}  # by the unit's place
    for rule in full:
        matched = [i for i, unit in enumerate(units) if _matches(rule.which, unit)]
        if not matched:
            raise ValueError(
                f"{rule.name} must match a module of model that holds weights, or such a weight, got"
                f" {shown(rule.which)}"
            )
        first = dict.fromkeys(matched, rule) | first
    decided = [_decided(unit, first.get(i, default)) for i, unit in enumerate(units)]
    choices = [_choice(*pair) for pair in decided]
    for rule in full:
        _check_asked(rule, [unit for unit, own in decided if own is rule])
    if not may_be_none and all(c.quantizer is None for c in choices):
        raise ValueError(_nothing_to_do(choices))
    return choices


def check_quantizer(name: str, value: object) -> None:
    """Raise unless ``value`` is a quantizer or None."""
    if value is None or isinstance(value, Quantizer):
        return
    got, function = type(value).__name__, None
    if isinstance(value, str):
        got, function = f"the str {value!r}", getattr(presets, value, None)
    elif callable(value) and getattr(value, "__module__", "") == presets.__name__:
        got, function = f"the function {value.__name__}", value  # type: ignore[attr-defined]
    preset = getattr(function, "__name__", "lsq")
    call = {"bitnet": "bitnet()", "fixed": "fixed(2, alpha)"}.get(preset, f"{preset}(2)")
    raise TypeError(f"{name} must be a Quantizer or None, got {got}: try fk.presets.{call}")


def _checked(name: str, rule: object, activation: Quantizer | None) -> Checked:
    if not isinstance(rule, tuple | list) or len(rule) not in (2, 3):
        raise TypeError(f"{name} must be (which modules, quantizer) or that and an activation, got {rule!r}")
    full = Checked(name, *(*rule, activation)[:3])
    if not (isinstance(full.which, str) or callable(full.which)):
        raise TypeError(f"{name} must be a name, a type or a function, got {type(full.which).__name__}")
    for k, value in enumerate(full[2:], 1):
        check_quantizer(f"{name}[{k}]", value)
    if full.activation is not None:
        check_activation(f"{name}[2]", full.activation)
    return full


def _matches(which: Which, unit: Unit) -> bool:
    """A name or type that fits a module fits all that lies in it; a function is asked for each module."""
    if isinstance(which, str):
        return any(fnmatchcase(path, which) for path, _ in unit.around) or _names_parameter(which, unit)
    if isinstance(which, type):
        return any(isinstance(m, which) for _, m in unit.around)
    return any(which(name, unit.module) for name in unit.names)


def _names_parameter(which: Which, unit: Unit) -> bool:
    """Whether a name fits the parameter of a unit, and no module that it lies in."""
    if not isinstance(which, str) or any(fnmatchcase(path, which) for path, _ in unit.around):
        return False
    return bool(unit.matrices) and any(fnmatchcase(path, which) for path in unit.paths)


def _decided(unit: Unit, rule: Checked) -> tuple[Unit, Checked]:
    """A unit and its rule; a parameter of an unknown module becomes a usual one if the rule names it."""
    if not unit.usual and _names_parameter(rule.which, unit):
        unit = unit._replace(usual=True)
        unit = unit._replace(against=reason_against_parameter(unit))
    return unit, rule


def shown(which: Which) -> str:
    """A rule's first half as messages and reports print it."""
    return repr(which) if isinstance(which, str) else getattr(which, "__name__", repr(which))


def _check_asked(rule: Checked, units: list[Unit]) -> None:
    """Raise if a rule with a quantizer decides on modules that cannot be quantized."""
    if rule.quantizer is None or not units:
        return
    against = {unit.name: unit.against for unit in units if _asked(rule, unit)}
    refused = [f"{unit or 'model'}: {reason}" for unit, reason in against.items() if reason is not None]
    if refused:
        raise ValueError(
            f"{rule.name} must match modules that can be quantized, got {shown(rule.which)}, which matches"
            f" {'; '.join(refused[:5])}{'; ...' if len(refused) > 5 else ''}. A rule before it, with None,"
            " leaves them alone"
        )
    if not against:
        raise ValueError(f"{rule.name} must match a module that can be quantized, got {shown(rule.which)}")


def _asked(rule: Checked, unit: Unit) -> bool:
    """Whether a rule asks for a unit: for a weight that multiplies, or by the parameter's name.

    Norms and position tables do not multiply, and are no reason to refuse a rule.
    """
    known = unit.quantized or unit.form or (unit.dims and unit.usual)
    return bool(known) or any("weight" in name for name in unit.matrices) or _names_parameter(rule.which, unit)


def _choice(unit: Unit, rule: Checked) -> Choice:
    reason = unit.against
    if unit.quantized is not None:
        reason = "quantized before"
    elif rule.quantizer is None:
        reason = f"{rule.name}, {shown(rule.which)}" if rule.name else "no rule names it"
    elif isinstance(reason, Exception):
        raise reason
    if reason or rule.activation is None:
        return Choice(unit, None if reason else rule.quantizer, None, reason)
    inputs = against_activation(unit)
    return Choice(unit, rule.quantizer, rule.activation if inputs is None else None, None, inputs)


def _nothing_to_do(choices: list[Choice]) -> str:
    before = [c for c in choices if c.unit.quantized is not None]
    if before:
        return (
            f"model must have modules that are not quantized yet, got {len(before)} that are and no other to"
            " quantize; dequantize_model(model) turns them back"
        )
    reasons = "; ".join(f"{c.unit.name or 'model'}: {c.reason}" for c in choices[:5])
    return f"model must have a module to quantize, got none ({reasons or 'it holds no weights'})"
