"""Prints of what a closure has beside the model, to see changes that no pass restores."""

from __future__ import annotations

import functools
import inspect
import operator
import os
import random
import sys
import sysconfig
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.quantized import QuantizedWeight

DEPTH, WIDTH = 4, 64  # how far and how wide it looks into what a closure holds
PLAIN = (type(None), bool, int, float, complex, str, bytes)
CODE = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType)

#: Where Python and packages are, fogzo_kernels too.
PACKAGES = (
    "<frozen",
    *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    os.path.join(os.path.dirname(torch.__file__), ""),
    os.path.join(Path(__file__).parents[2], ""),
)
#: Attributes that every module or every quantized module has.
OF_MODULES = {*vars(nn.Module()), *QuantizedWeight.ADDED}
BUFFERS, ATTRIBUTE = "the buffers of", "the attribute"

NOT_REPLAYED = (
    "a pass of a step changes {}, so that each pass sees other batches, masks or counts, and the difference of"
    " two losses measures these. Pass generators and stateful objects as Fogzo(..., replay=[...]), and move"
    " the rest out of the closure; fogzo.check(closure) looks closer"
)

#: What something is worth now: equal as long as it does not change.
Print = Any
Prints = dict[str, Print]


def global_generators(known: Iterable[object] = ()) -> Prints:
    """Returns the states of Python's and NumPy's global generators, without the modules in ``known``."""
    prints: Prints = {"random": hash(random.getstate())}
    if numpy := sys.modules.get("numpy"):
        state = numpy.random.get_state()
        prints["numpy.random"] = hash(repr([bytes(x) if hasattr(x, "tobytes") else x for x in state]))
    skip = set(map(id, known))
    return {name: state for name, state in prints.items() if id(sys.modules[name]) not in skip}


def seen_by(closure: Callable[..., Any], known: Iterable[object], model: nn.Module | None = None) -> Prints:
    """Prints of the closure's variables, by name, and of the user's functions that it calls.

    Args:
        known: objects that passes restore or do not change: the model, what is replayed.
        model: whose modules of the user are looked at, too: their attributes, and what their forward has.
    """
    skip = {id(x) for o in known for x in (o, *(o.modules() if isinstance(o, nn.Module) else ()))}
    todo: list[tuple[Callable[..., Any], str]] = [(closure, "")]
    prints: Prints = {}
    done: set[int] = set()
    for path, module in model.named_modules() if model is not None else ():
        forward = inspect.getattr_static(type(module), "forward", None)  # TorchScript raises
        if _is_users(forward):
            todo.append((forward, f" of {forward.__qualname__}"))
            prints |= {
                f"{ATTRIBUTE} {name!r} of module {path!r}": _print_of(value, 1, skip)
                for name, value in vars(module).items()
                if name not in OF_MODULES
            }
    for function, where in todo:  # grows
        if id(function) in done or len(done) > WIDTH:
            continue
        done.add(id(function))
        for name, value in _variables(function).items():
            prints[f"the variable {name!r}{where}"] = _print_of(value, DEPTH, skip)
            if isinstance(value, nn.Module) and id(value) not in skip and not _wraps(value, skip):
                prints[f"{BUFFERS} {name!r}{where}"] = [_print_of(b, 0, skip) for b in value.buffers()]
            inner = _unwrapped(value)
            if inspect.isfunction(inner) and _is_users(inner):
                todo.append((inner, f" of {inner.__qualname__}"))
    return prints


def changed(before: Prints, after: Prints) -> list[str]:
    """Returns the names whose prints differ."""
    return [name for name in before if name in after and before[name] != after[name]]


def warn_of(names: list[str]) -> None:
    """Warn if there are names of what passes change."""
    if names:
        warnings.warn(NOT_REPLAYED.format(" and ".join(names)), stacklevel=3)


def _variables(closure: Callable[..., Any]) -> dict[str, Any]:
    """What the function has from its surroundings, of a partial or a method also what it is bound to."""
    variables: dict[str, Any] = {}
    if isinstance(closure, functools.partial):
        variables.update({f"argument {i}": a for i, a in enumerate(closure.args)}, **closure.keywords)
        closure = closure.func
    if inspect.ismethod(closure):
        variables["self"] = closure.__self__
        closure = closure.__func__
    if inspect.isfunction(closure):
        names = closure.__code__.co_names
        globals_ = {n: closure.__globals__[n] for n in names if n in closure.__globals__}
        variables.update(globals_)
        for module in filter(_is_users, globals_.values()):
            variables.update({n: vars(module)[n] for n in names if n in vars(module)})
        for name, cell in zip(closure.__code__.co_freevars, closure.__closure__ or (), strict=True):
            with suppress(ValueError):  # nothing is in the cell yet
                variables[name] = cell.cell_contents
    elif not variables:
        variables["closure"] = closure
    return variables


def _print_of(value: Any, depth: int, skip: set[int]) -> Print:
    """Return what a value is worth; never raises. What cannot be looked into is worth its identity."""
    if id(value) in skip or isinstance(value, CODE):
        return None
    if isinstance(value, PLAIN):
        return value if value == value else "nan"
    try:
        worth = _print_inside(value, depth - 1, skip | {id(value)})
    except Exception:  # whatever an object of somebody's raises when it is looked at
        worth = None
    return id(value) if worth is None else worth


def _print_inside(value: Any, depth: int, skip: set[int]) -> Print:
    """Return the prints of an object's parts, or None; below depth 0, of tensors and generators only."""

    def each(values: Iterable[Any]) -> list[Print]:
        return [_print_of(v, depth, skip) for v in values]

    def items(values: dict[Any, Any]) -> list[Print]:
        return each(v for item in islice(values.items(), WIDTH) for v in item)

    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().tolist())
    if isinstance(value, random.Random):
        return hash(value.getstate())
    bits = getattr(value, "bit_generator", None)  # NumPy's
    if bits is not None:
        return repr(bits.state)
    if depth < 0:
        return None
    if isinstance(value, nn.Module) and _wraps(value, skip):
        # a wrapper of the model, compiled or parallel, may keep books of its own
        own = [m for m in value.modules() if id(m) not in skip or m is value]
        return each(b for m in own for b in m._buffers.values())
    original = getattr(value, "_torchdynamo_orig_callable", None)  # what torch.compile made a function of
    if original is not None:
        return _print_of(original, depth, skip)
    if isinstance(value, (list, tuple, deque)):
        return len(value), each([*islice(value, WIDTH), *islice(reversed(value), WIDTH)])
    if isinstance(value, (set, frozenset)):
        return len(value)
    if isinstance(value, dict):
        return len(value), items(value)
    if inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, functools.partial):
        plain = inspect.isfunction(value) and not value.__closure__  # it has its module's variables alone
        return None if plain else each(_variables(value).values())
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return frame is None or each([frame.f_lasti, *frame.f_locals.values()])
    if hasattr(type(value), "__next__") and not hasattr(value, "__dict__"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of iterators that are copied
            parts = value.__reduce__()[1:]  # what a zip, an enumerate or a cycle goes through, and where it is
        return operator.length_hint(value, -1), repr(value), each(x for x in parts if x is not None)
    if type(value).__module__ == "numpy":
        return id(value), bytes(value.tobytes()) if value.nbytes < 1 << 20 else None
    inside = getattr(value, "__dict__", None)
    return None if inside is None else items(inside)


def _wraps(value: nn.Module, skip: set[int]) -> bool:
    return any(id(m) in skip for m in value.children())


def _unwrapped(value: Any) -> Any:
    """The function that a decorator, torch.compile's too, was put around."""
    for name in ("_torchdynamo_orig_callable", "__wrapped__"):
        if inspect.isfunction(value) and callable(vars(value).get(name)):
            value = vars(value)[name]
    return value


def _is_users(value: Any) -> bool:
    """Whether a function or a module is of the program, not of a package."""
    if inspect.isfunction(value):
        return not value.__code__.co_filename.startswith(PACKAGES)
    file = getattr(value, "__file__", None) if isinstance(value, types.ModuleType) else None
    return file is not None and not file.startswith(PACKAGES)
