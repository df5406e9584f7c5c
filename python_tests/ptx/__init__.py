"""Runs on the CPU the PTX that Triton and nvcc make of the GPU kernels: the tests run the code that ships.

``text.py`` reads PTX. ``decode.py`` makes a program of a kernel. The C++ in ``executor/`` runs all threads of a
block, and gives each instruction the result that the PTX manual states. It checks every launch:

- a thread touches no byte outside of the op's tensors, and no address that is not aligned;
- it reads no shared memory that nobody wrote;
- two threads do not race, in shared or in global memory;
- a warp does not diverge at a barrier or a shuffle, and no thread waits for one that has ended.

A kernel that fails a check raises ``RuntimeError`` with the line of its PTX.

``triton_driver.py`` takes the place of Triton's GPU, ``cuda_driver.py`` the place of CUDA's runtime.
``modes.py`` lists what can be varied. ``python -m ptx MODULE ARGUMENTS`` runs any module so.
"""

from __future__ import annotations


def install(triton: bool = True) -> dict[str, str]:
    """Let both GPU backends run on CPU tensors in this process, or CUDA's alone.

    Returns the backends that cannot, each with the reason. Call it before ``fogzo_kernels`` runs an op.
    """
    missing = {}
    from . import cuda_driver
    from .build import executor

    try:
        executor()
    except RuntimeError as error:
        return dict.fromkeys(("cuda", "triton"), str(error))
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
