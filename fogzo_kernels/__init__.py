"""FOGZO kernels: train low-bit networks with first-order-guided zeroth-order gradients.

Yang & Aamodt, "Improving the Straight-Through Estimator with Zeroth-Order Information", NeurIPS
2025, arXiv 2510.23926.
"""

from . import functional
from .backends import available_backends
from .functional import *  # noqa: F403  the public ops: functional.__all__
from .nn.convert import quantize_model
from .nn.linear import QuantLinear
from .optim.adamw import AdamW
from .optim.sgd import SGD
from .spec.grid import Grid
from .spec.quantizer import Quantizer
from .spec.scale import Scale
from .spec.straight_through import StraightThrough
from .train.estimator import Fogzo

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "AdamW",
    "Fogzo",
    "Grid",
    "QuantLinear",
    "Quantizer",
    "Scale",
    "StraightThrough",
    "available_backends",
    "quantize_model",
]
__all__ += functional.__all__
