"""What runs outside of a function that is compiled around it: a step of FOGZO in a compiled training step."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """As ``torch.compiler.disable`` makes it, which alone would load all of the compiler with the package.

    A compiled function that calls it is compiled before and after it. Compiled parts of a closure stay so.
    """
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:  # nothing can be compiled yet
            return function(*args, **kwargs)
        if disabled is None:
            disabled = cast("Callable[P, R]", torch.compiler.disable(function))
        return disabled(*args, **kwargs)

    marked: Any = plain  # by what the compiler looks at before it looks into a function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "a step of FOGZO is not compiled; compile the model or the loss instead"
    return plain
