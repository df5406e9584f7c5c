"""quantize_model: turns the modules of a model into quantized ones, in place."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ..ops import checks, memory
from ..spec.dtypes import FLOATS
from ..spec.quantizer import Quantizer
from .linear import QuantLinear
from .quantized import QuantizedModule

#: Which class a plain module becomes; subclasses of it stay as they are.
QUANTIZED: dict[type[nn.Module], type[QuantizedModule]] = {nn.Linear: QuantLinear}
PLAIN = " or ".join(f"nn.{kind.__name__}" for kind in QUANTIZED)


def quantize_model(
    model: nn.Module, quantizer: Quantizer, *, skip: str | Sequence[str] = (), backend: str | None = None
) -> nn.Module:
    """Quantize the weights of every ``nn.Linear`` of ``model``, in place.

    Parameters, hooks and names stay; subclasses of ``nn.Linear`` are left alone. Tied weights are
    quantized once, and share their alpha and noise. Call it again, with other arguments, for the modules
    that an earlier call skipped.

    Args:
        model: a module that is or holds at least one ``nn.Linear``; its weights are float32, bfloat16 or
            float16.
        quantizer: grid, scale and straight-through estimator of the weights.
        skip: names of modules to leave alone, as ``model.named_modules()`` gives them, or one such name;
            ``*`` and ``?`` stand for anything. A name that matches nothing is an error.
        backend: of the modules' ops; None takes the best available at each call.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: an argument is wrong, or does not fit a weight; the model is then as it was.
    """
    checks.instance("model", model, nn.Module)
    checks.instance("quantizer", quantizer, Quantizer)
    if backend is not None:
        checks.instance("backend", backend, str)
    plain = _plain_modules(model, skip)
    present = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    owned = {m.weight for m in present}
    weights = {name: _weight_of(name, m, owned) for name, m in plain.items()}
    alphas: dict[Tensor, Tensor] = {}  # everything is checked before the first module changes
    for name, weight in weights.items():
        if weight not in alphas:
            alphas[weight] = _alpha_of(name, weight, quantizer)
    first = max((m.tensor_id for m in present), default=-1) + 1
    ids = {weight: first + i for i, weight in enumerate(alphas)}
    for name, m in plain.items():
        weight = weights[name]
        QUANTIZED[type(m)].from_plain(
            m, quantizer, alpha=alphas[weight], tensor_id=ids[weight], backend=backend
        )
    return model


def _plain_modules(model: nn.Module, skip: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules to quantize, by name."""
    found = {name: m for name, m in model.named_modules() if type(m) in QUANTIZED}
    patterns = [skip] if isinstance(skip, str) else skip
    if not isinstance(patterns, Sequence):
        raise TypeError(f"skip must be a name or a list of names, got {type(skip).__name__}")
    chosen = dict(found)
    for i, pattern in enumerate(patterns):
        checks.instance(f"skip[{i}]", pattern, str)
        matched = [name for name in found if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"skip must name {PLAIN} modules of model, got {pattern!r}")
        for name in matched:
            chosen.pop(name, None)
    if not chosen:
        raise ValueError(f"model must have an {PLAIN} to quantize, got none outside skip")
    return chosen


def _weight_of(name: str, module: nn.Module, owned: set[Tensor]) -> Tensor:
    """The weight of a module that can be quantized; ``owned`` are quantized already."""
    weight = module.weight
    taken = [x for x in QuantizedModule.ADDED if hasattr(module, x)]
    if taken:
        raise ValueError(f"{name} must not have an attribute {taken[0]!r} of its own")
    if not isinstance(weight, nn.Parameter):  # weight_norm's, say: it is made anew in each forward
        raise TypeError(f"{name}.weight must be a Parameter, got {type(weight).__name__}")
    if weight.dtype not in FLOATS:
        wanted = checks.named(FLOATS)
        raise TypeError(f"{name}.weight must be {wanted}, got {checks.named([weight.dtype])}")
    if weight in owned:  # it would draw two noises, and have two alphas
        raise ValueError(f"{name}.weight must be quantized in one call with the modules that share it")
    return weight


def _alpha_of(name: str, weight: Tensor, quantizer: Quantizer) -> Tensor:
    alpha = quantizer.scale.of(weight)
    if not checks.fits(alpha.shape, weight.shape):
        raise ValueError(
            f"alpha must have {checks.fitting(weight.shape)} {name}.weight of shape {checks.shape(weight)},"
            f" got shape {checks.shape(alpha)}"
        )
    low, high = memory.alpha_range(quantizer.grid.r)
    if not memory.in_range(alpha, low, high):
        raise ValueError(
            f"alpha must be finite, > 0 and in {low:g}..{high:g}, got {alpha.min()}..{alpha.max()} for {name}"
        )
    return alpha
