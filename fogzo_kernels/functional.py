"""The functional API: stable, the base of other front ends (docs/contract.md).

Every op takes lists of tensors, a whole model in one call; a list of one tensor may be given bare.
Tensors are contiguous; latents, grads and outputs are float32, bfloat16 or float16, one dtype per
list, and outputs may be int8 to hold codes. An alpha is float32 with one element (per tensor), one
per row, or one per group of the last dimension: for a tensor of shape (32, 1024), of shape (1,), (32, 1)
or (32, groups), say (docs/contract.md, section 4). ``seed`` (unsigned 64 bits), ``step`` and
``one_minus_beta`` are numbers, or 0-dim tensors (int64, int64, float64) on the CPU or on the
device; so are ``lr`` (float64) and ``optimizer_step`` (int64). ``backend=None`` means the variable
``FOGZO_BACKEND``, else the best one available. Bad input raises TypeError or ValueError, a backend
that is unavailable RuntimeError, before anything is written.
"""

from __future__ import annotations

from .ops.alphas import measure_alphas_
from .ops.estimate import estimate_gradient_
from .ops.hadamard import hadamard, hadamard_
from .ops.learned import learned_backward_
from .ops.noise import noise
from .ops.norm import guide_norm, guide_sumsq, noise_factors
from .ops.perturb import perturb_quantize_
from .ops.quantize import dequantize, quantize, quantize_
from .ops.straight_through import straight_through_backward_
from .ops.tail import estimate_adamw_, estimate_sgd_
from .ops.tensor_list import TensorList
from .spec.noise import direction_sign

__all__ = [
    "TensorList",
    "dequantize",
    "direction_sign",
    "estimate_adamw_",
    "estimate_gradient_",
    "estimate_sgd_",
    "guide_norm",
    "guide_sumsq",
    "hadamard",
    "hadamard_",
    "learned_backward_",
    "measure_alphas_",
    "noise",
    "noise_factors",
    "perturb_quantize_",
    "quantize",
    "quantize_",
    "straight_through_backward_",
]
