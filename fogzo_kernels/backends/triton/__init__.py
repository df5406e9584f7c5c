"""Triton on NVIDIA GPUs; on the CPU through Triton's interpreter (``TRITON_INTERPRET=1``).

One file an op, with its kernels and below them what launches these: once for all tensors, which a plan
(backends/gpu/plans.py) names to them.
"""

from .estimate import estimate_gradient_ as estimate_gradient_
from .hadamard import hadamard_ as hadamard_
from .launch import unavailable as unavailable
from .learned import learned_backward_ as learned_backward_
from .measure import measure_alphas_ as measure_alphas_
from .module_weight import ModuleWeight as ModuleWeight
from .noise import noise as noise
from .norm import guide_sumsq as guide_sumsq
from .perturb import perturb_quantize_ as perturb_quantize_
from .quantize import quantize_ as quantize_
from .quantize import straight_through_backward_ as straight_through_backward_
from .tail import estimate_update_ as estimate_update_
