"""A parameter that its module's forward reads as other values: any parameter of any module.

The module's class gets a property of the parameter's name. Inside a forward that runs :meth:`Values.during`
the property gives the values, and elsewhere the parameter. The parameter stays where PyTorch keeps it, so
optimizers, state dicts and what wraps a model see what they saw before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

#: Where a module keeps its :class:`Values`.
VALUES = "values_in_forward"


class Values:
    """What the parameters of a module are worth in the forwards that run now, in each thread."""

    def __init__(self) -> None:
        self.of_threads: dict[int, dict[str, Tensor]] = {}
        self.traced: dict[str, Tensor] | None = None  # of the forward that a compiler traces
        self.kept: Any = None  # what forwards without grad share
        self.direct: Any = None  # what native code keeps for forwards with grad
        self.direct_failed = -1  # at which count of changes there could be none

    def now(self) -> dict[str, Tensor] | None:
        """The values of this thread's forward, or None outside a forward."""
        if not is_compiling():
            return self.of_threads.get(threading.get_ident(), self.traced)
        if self.traced is None and self.of_threads:  # the compiler began inside a forward
            (values,) = self.of_threads.values()
            return values
        return self.traced

    def during(self, values: dict[str, Tensor], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a forward that reads parameters as these values."""
        if is_compiling():
            last, self.traced = self.traced, values
            try:
                return forward(*args, **kwargs)
            finally:
                self.traced = last
        threads, thread = self.of_threads, threading.get_ident()
        before = threads.get(thread)
        threads[thread] = values
        try:
            return forward(*args, **kwargs)
        finally:
            if before is None:
                del threads[thread]
            else:  # a forward that runs its own module again
                threads[thread] = before

    def __reduce__(self) -> tuple[type[Values], tuple[()]]:
        return Values, ()  # a copy runs no forward


def read_as_values(name: str) -> property:
    """The property of a parameter's name.

    Its setter and deleter serve what PyTorch puts there that is no Parameter (``prune``, ``DataParallel``).
    """

    def get(module: nn.Module) -> Any:
        state = module.__dict__
        values = state[VALUES].now() if VALUES in state else None
        if values is not None:
            return values[name]
        return state[name] if name in state else nn.Module.__getattr__(module, name)

    def put(module: nn.Module, value: Tensor) -> None:
        module.__dict__[name] = value

    def delete(module: nn.Module) -> None:
        del module.__dict__[name]

    return property(get, put, delete)
