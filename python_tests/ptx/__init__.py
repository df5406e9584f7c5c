"""Runs on the CPU the PTX that Triton and nvcc make of the GPU kernels: what ships is what is tested.

``text.py`` reads PTX, ``decode.py`` makes a program of a kernel, and the C++ in ``executor/`` runs it: all threads of
a block, with every instruction's documented result. Each launch is checked. It may touch no byte outside the op's
tensors, no address that is not aligned, no shared memory that nobody wrote. Two threads may not race. A warp may not
diverge at a barrier, and no thread may wait for one that has ended. A kernel that fails a check raises ``RuntimeError``
with the line of its PTX.

``triton_driver.py`` puts the executor in the place of Triton's GPU, ``cuda_driver.py`` in the place of CUDA's runtime.
``modes.py`` lists what can be varied. ``python -m ptx MODULE ARGUMENTS`` runs any module so.
"""

from __future__ import annotations

import sys
from pathlib import Path


def install(triton: bool = True) -> dict[str, str]:
    """Let both GPU backends run on CPU tensors in this process, or CUDA's alone.

    Returns the backends that cannot, each with the reason. Call it before ``fogzo_kernels`` runs an op.
    """
    root = str(Path(__file__).parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)
    missing = {}
    from . import cuda_driver

    if reason := cuda_driver.install():
        missing["cuda"] = reason
    if triton:
        try:
            from . import triton_driver
        except ImportError as error:
            missing["triton"] = str(error)
        else:
            triton_driver.install()
    return missing
