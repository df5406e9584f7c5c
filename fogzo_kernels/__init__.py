"""FOGZO kernels: train low-bit networks with first-order-guided zeroth-order gradients.

Yang & Aamodt, "Improving the Straight-Through Estimator with Zeroth-Order Information", NeurIPS
2025, arXiv 2510.23926.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from . import functional
from .backends import available_backends
from .functional import *  # noqa: F403  the public ops: functional.__all__
from .nn.convert import calibrate_, calibrate_inputs_, dequantize_model, quantize_model
from .nn.dims import declare_weights
from .nn.linear import QuantLinear, set_compute_
from .nn.registry import QuantConv1d, QuantConv2d, QuantConv3d, QuantEmbedding
from .nn.report import Report
from .optim.groups import learned_alphas, parameter_groups
from .optim.optimizers import SGD, AdamW
from .spec import presets
from .spec.grid import Grid
from .spec.hadamard import Hadamard
from .spec.quantizer import Quantizer
from .spec.scale import Scale
from .spec.straight_through import StraightThrough
from .train.attached import Attached
from .train.fogzo import Fogzo
from .train.passes import Pass

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "AdamW",
    "Attached",
    "Fogzo",
    "Grid",
    "Hadamard",
    "Pass",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantEmbedding",
    "QuantLinear",
    "Quantizer",
    "Report",
    "Scale",
    "StraightThrough",
    "available_backends",
    "calibrate_",
    "calibrate_inputs_",
    "declare_weights",
    "dequantize_model",
    "learned_alphas",
    "parameter_groups",
    "presets",
    "quantize_model",
    "set_compute_",
]
__all__ += functional.__all__


if TYPE_CHECKING:
    from . import export as export
else:

    def __getattr__(name: str) -> Any:
        """``export`` takes libraries that training does not need: it is imported when it is asked for."""
        if name == "export":
            return importlib.import_module(".export", __name__)
        here = sys.modules[__name__]  # by which Python finds a name that is close
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=here)
