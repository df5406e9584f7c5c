"""The functional API, the stable base of other front ends (docs/contract.md).

The ops take lists of tensors, a whole model in one call; a bare tensor is a list of one. Tensors are
contiguous. Latents, gradients and outputs are float32, bfloat16 or float16, one dtype per list; int8 outputs
hold codes. An alpha is float32 with one element, with one per row, or with one per group of the last dimension:
for a tensor of shape (32, 1024) the shapes are (1,), (32, 1) and (32, groups) (contract, section 4).

``seed``, ``step``, ``one_minus_beta``, ``lr`` and ``optimizer_step`` are numbers or 0-dim tensors, on the CPU
or on the device. These are int64 (``seed`` with the bits of an unsigned number) or, for ``one_minus_beta`` and
``lr``, float64.

Wrong arguments raise TypeError or ValueError, and a backend that cannot run raises RuntimeError, before the op
writes anything.
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
