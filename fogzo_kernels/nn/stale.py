"""Weights that are not the ones that an alpha was made for, and what to do then."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import transforms
from ..spec.scale import FixedScale, LearnedScale, Scale, not_saved
from .scales import HELD, alpha_of
from .view import LOCAL, DTensor, local

if TYPE_CHECKING:
    from .module import QuantizedModule

FAR = 4.0  # times or a part of what a scale would give, on average: not a first alpha of these weights


def is_replaced(module: QuantizedModule, old: Tensor | None, new: object) -> bool:
    """Whether a module that got another weight has other values now, which its alpha was not made for.

    Not so with what brings its alphas along or moves values: a DTensor, a weight without values.
    """
    if old is None or not isinstance(new, Tensor) or new is old or module.placement is not LOCAL:
        return False
    if isinstance(old, DTensor) or isinstance(new, DTensor) or old.is_meta or new.is_meta:
        return False
    same = old.shape == new.shape and torch.equal(old.detach().to(new), new.detach())
    return not same


def named(module: QuantizedModule) -> str:
    """Its weight, as messages call it."""
    return f"{module.path}.weight" if module.path else "weight"


def fits(module: QuantizedModule) -> bool:
    """Whether alpha was made for the weight that is there, and for as many rows."""
    alpha = module.alpha
    return not module.stale and (alpha.numel() == 1 or alpha.shape[0] == module.weight.shape[module.OUTPUTS])


def check(module: QuantizedModule, name: str | None = None) -> None:
    """Raise unless alpha fits the weight.

    Raises:
        RuntimeError: another weight was put in its place, or it has another number of rows, or it is batched.
    """
    name = named(module) if name is None else name
    if transforms.active() and (transforms.is_batched(module.weight) or transforms.is_batched(module.alpha)):
        raise RuntimeError(
            f"{name} must not be batched by vmap, as functional_call with stacked parameters has it: call the"
            " model once for each set of parameters"
        )
    if fits(module):
        return
    if module.stale:
        raise RuntimeError(
            f"{name} must be the weight that its alpha was made for, got one that was put in its place: call"
            " fogzo_kernels.dequantize_model(model) before another layer (BatchNorm, say) is fused into it;"
            " where it is a new weight, call calibrate_() of its module"
        )
    rows = module.weight.shape[module.OUTPUTS]
    raise RuntimeError(
        f"{name} must have the {module.alpha.shape[0]} rows that its alpha was made for, got {rows}: call"
        " calibrate_() of its module after it was resized, as by resize_token_embeddings"
    )


@torch.no_grad()
def warn_of_new_weights(modules: Iterable[tuple[str, QuantizedModule]]) -> None:
    """Once for all whose first alpha is far from what their scale would make of the weights that are there."""
    far = [name for name, m in modules if _is_far(name, m)]
    if far:
        more = f" and {len(far) - 1} more" if far[1:] else ""
        warnings.warn(
            f"the alpha of {far[0]}{more} is far from what its scale makes of the weights that are there: were"
            " they initialized or loaded after quantize_model? Then call fogzo_kernels.calibrate_(model)",
            stacklevel=4,
        )


def _is_far(name: str, module: QuantizedModule) -> bool:
    scale, alpha = module.quantizer.scale, module.alpha
    if alpha.is_meta or any(local(t) is not t for t in (alpha, module.weight)) or not fits(module):
        return False
    first: Scale
    if isinstance(scale, LearnedScale):
        first = scale.first(module.quantizer.grid)
        begins = torch.equal(alpha * HELD, module.alpha_least)  # it was not trained yet
    else:
        first, begins = scale, isinstance(scale, FixedScale)
    kept = getattr(first, "alpha", None) is not not_saved
    if not (begins and kept and first.from_weight):
        return False
    try:
        now = alpha_of(name, module.weight, module.OUTPUTS, module.quantizer)
    except ValueError:  # weights that are not finite, say, of which a step speaks
        return False
    return float((now / alpha).log().abs().mean()) > math.log(FAR)
