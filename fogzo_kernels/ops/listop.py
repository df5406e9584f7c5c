"""What the ops over lists share: registration, the way around the dispatcher, and who checks first."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..spec.grid import Grid
from ..spec.noise import Layout

KEPT = 64  # lists whose checks are remembered: a training loop asks about the same ones at every step

#: Parts of schemas. Scalars that change each step are tensors, so that a new value neither recompiles a graph
#: nor waits for the device; ``layouts`` holds offset, inner and stride of each tensor in a row.
GRID = "int qmin, int qmax, float offset, int r"
NAMES = "SymInt[] tensor_ids, SymInt[] layouts"
STATE = "Tensor norm, Tensor seed, Tensor step, Tensor one_minus_beta"


class ListOp:
    """A custom op over lists of tensors, as ``torch._foreach_*`` are.

    Eager calls on plain tensors skip the dispatcher, which takes longer over a list of small tensors than the
    kernel does; whatever traces, wraps or profiles gets the op.
    """

    def __init__(self, name: str, mutates_args: tuple[str, ...], schema: str, run: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(name, run, mutates_args=mutates_args, schema=schema)
        self.run = run
        parameters = list(inspect.signature(run).parameters)
        self.mutated = [parameters.index(argument) for argument in mutates_args]
        self.register_fake = self.op.register_fake

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or watched() or not plain(args):
            return self.op(*map(detached, args))
        if torch.is_grad_enabled():
            with torch.no_grad():
                found = self.run(*args)
        else:
            found = self.run(*args)
        for i in self.mutated:
            torch.autograd.graph.increment_version(args[i])
        return found


def list_op(name: str, *, mutates_args: tuple[str, ...], schema: str) -> Callable[[Callable[..., Any]], ListOp]:
    return lambda run: ListOp(name, mutates_args, schema, run)


def detached(argument: Any) -> Any:
    """Autograd has no formula for these ops, and none of their results needs one."""
    if isinstance(argument, list):
        return [t.detach() if isinstance(t, Tensor) and t.requires_grad else t for t in argument]
    return argument


def watched() -> bool:
    """Whether some mode, transform or profiler must see the ops."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


#: Types of arguments, none of them a subclass of Tensor with an idea of its own.
PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer, list, str, int, float, bool, type(None)}


def plain(args: Sequence[Any]) -> bool:
    """No tensor is of a subclass, which may have its own idea of an op; lists hold data, on no meta device."""
    kinds = set(map(type, args))
    for argument in args:
        if isinstance(argument, list) and argument:
            kinds.update(map(type, argument))
            if isinstance(argument[0], Tensor) and argument[0].is_meta:
                return False
    return kinds <= PLAIN or not any(issubclass(kind, Tensor) for kind in kinds - PLAIN)


def run_checked(backend: Backend, check: Callable[[], None], op: str, *args: Any) -> Any:
    """Check the lists, then let the backend run ``op`` on them.

    A backend with ``CHECKS_LISTS`` refuses bad lists itself, before it writes, and far cheaper than Python can
    over thousands of tensors; the checks then only word what it refused.
    """
    run = getattr(backend, op)
    if not getattr(backend, "CHECKS_LISTS", False):
        check()
        return run(*args)
    try:
        return run(*args)
    except Exception:
        check()
        raise


def counters_of(counters: Sequence[Tensor]) -> Tensor | None:
    """An optional output, which a schema writes as a list."""
    return counters[0] if counters else None


#: The grid that a schema writes as flat arguments.
grid_of = functools.lru_cache(KEPT)(Grid)


# ---- layouts, three numbers in a row for each tensor


def triples(layouts: Sequence[int]) -> Sequence[Layout]:
    known = set(map(type, layouts)) <= {int}  # not symbolic
    return (_triples if known else _triples.__wrapped__)(tuple(layouts))


@functools.lru_cache(KEPT)
def _triples(layouts: tuple[int, ...]) -> tuple[Layout, ...]:
    return tuple(zip(layouts[::3], layouts[1::3], layouts[2::3], strict=True))
