"""Triton on NVIDIA GPUs; on the CPU through Triton's interpreter (``TRITON_INTERPRET=1``).

One file an op, with its kernels and below them what launches these: once for all tensors, which a plan
(backends/gpu/plans.py) names to them.
"""

from .estimate import estimate_gradient_
from .hadamard import hadamard_
from .launch import unavailable
from .learned import learned_backward_
from .measure import measure_alphas_
from .noise import noise
from .norm import guide_sumsq
from .perturb import perturb_quantize_
from .quantize import quantize_, straight_through_backward_
from .tail import estimate_update_

__all__ = [
    "estimate_gradient_",
    "estimate_update_",
    "guide_sumsq",
    "hadamard_",
    "learned_backward_",
    "measure_alphas_",
    "noise",
    "perturb_quantize_",
    "quantize_",
    "straight_through_backward_",
    "unavailable",
]
