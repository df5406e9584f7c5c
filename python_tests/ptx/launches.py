"""Every launch of the executor: one place where its modes and checks are set."""

from __future__ import annotations

import functools

from .build import executor
from .decode import Kernel
from .memory import Span
from .modes import APPROXIMATE, ORDER, number


@functools.cache
def set_approximation() -> None:
    executor().approximate(number(APPROXIMATE))


#: Kernels that were launched, for bench/executed.py.
launched: dict[int, Kernel] = {}


def run(kernel: Kernel, blocks: int, threads: int, parameters: bytes, shared: int, memory: list[Span]) -> None:
    """Run a launch; an access outside of ``memory`` is an error."""
    set_approximation()
    launched[id(kernel)] = kernel
    try:
        kernel.program.run(blocks, threads, parameters, shared, memory, number(ORDER))
    except RuntimeError as error:
        raise RuntimeError(f"{kernel.name}: {error}") from None
