"""Find the trainable quantized weights of a model, check them, and tell whether they have changed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.held import generations, native
from ..functional import TensorList
from ..ops import checks
from ..spec.scale import LearnedScale, MeasuredScale
from .quantized import QuantizedWeight
from .replaced import REPLACED, check_replaced
from .tied import check_raw_uses
from .view import LOCAL, WeightView
from .weight import changes, check, fits, warn_of_new_weights


def quantized_weights(model: nn.Module) -> list[WeightView]:
    """Returns every trainable quantized weight once; raises unless one estimator can train all of them."""
    checks.instance("model", model, nn.Module)
    check_replaced(model.named_modules())
    weights = collected(model)
    if not weights:
        frozen = [name for name, m in model.named_modules() if isinstance(m, QuantizedWeight)]
        got = "none: call quantize_model first"
        if frozen:
            got = (
                f"{len(frozen)} quantized modules ({frozen[0]!r} first) whose weights are all frozen: call"
                " requires_grad_() on those to train"
            )
        raise ValueError(f"model must have trainable quantized weights, got {got}")
    check_raw_uses(model)
    ids: dict[int, WeightView] = {}
    for w in weights:
        _check_alike(w)
        other = ids.setdefault(w.tensor_id, w)
        if other is not w:
            raise ValueError(
                f"model must have a tensor_id of its own for each weight, got {w.tensor_id} for {other.name}"
                f" and {w.name}: weights that were tied when they were quantized must stay so"
            )
    devices = {w.parameter.device for w in weights}
    if len(devices) > 1:
        raise ValueError(f"model must have its quantized weights on one device, got {devices}")
    warn_of_new_weights((w.name, w.modules[0]) for w in weights)
    epsilons = {w.quantizer.epsilon for w in weights}
    if len(epsilons) > 1:
        raise ValueError(
            "model must have one eps in units of delta for all quantized weights, so that one finite"
            f" difference serves them all, got {sorted(epsilons)}: give all of them one straight_through"
        )
    return weights


def collected(model: nn.Module) -> list[WeightView]:
    """Returns the trainable weights of quantized modules as they are now."""
    views: dict[Tensor, WeightView] = {}
    for path, m in model.named_modules():
        if not isinstance(m, QuantizedWeight):
            continue
        name = m.weight_key(f"{path}.").lstrip(".")
        weight = m.registered
        if weight is None:
            raise ValueError(
                f"{name} must be a Parameter of its quantized module, got one that is made anew in each forward"
                " (a parametrization, weight_norm, spectral_norm, prune, say): no probe would perturb it"
            )
        if not weight.requires_grad:
            continue
        check(m, name)
        if not m.in_rows(weight):
            raise ValueError(
                f"{name} must lie in memory row by row, got strides {weight.stride()}: set the memory format"
                " before quantize_model"
            )
        if weight in views:
            views[weight].modules.append(m)
        else:
            views[weight] = WeightView(name, m)
    return list(views.values())


def _check_alike(w: WeightView) -> None:
    """Raise unless modules that share a weight, and so run with one probe, have one Q(weight) too."""
    first = w.modules[0]
    for m in w.modules[1:]:
        same = m.quantizer == first.quantizer and m.tensor_id == first.tensor_id
        scale = m.quantizer.scale  # each step measures a measured alpha anew; a learned alpha is one parameter
        learned, measured = isinstance(scale, LearnedScale), isinstance(scale, MeasuredScale)
        alike = measured or (m.alpha is first.alpha if learned else torch.equal(m.alpha, first.alpha))
        if not (same and alike):
            raise ValueError(
                f"{w.name} must have one quantizer, alpha and tensor_id in all modules that share it, got"
                f" {first} and {m}: tie weights before quantize_model, and calibrate_ the whole model"
            )


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Returns what ``model.modules()`` gives, in less time, as it makes no names."""
    modules, seen = [model], {model}
    for module in modules:  # grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    return modules


class Facts:
    """What the modules hold of their weights now: equal to an older one while nothing has moved.

    Args:
        latents: the weights of the modules, one for each.
        known: older facts.

    Attributes:
        tensors: weights and alphas of the modules.
    """

    def __init__(self, modules: list[QuantizedWeight], latents: list[Any], known: Facts | None) -> None:
        kinds = [m._parameters if "alpha" in m._parameters else m._buffers for m in modules]
        alphas: Any = [kind["alpha"] for kind in kinds]
        tensors = latents + alphas
        same = known is not None and all(map(operator.is_, known.tensors, tensors))
        self.tensors: TensorList = known.tensors if known is not None and same else TensorList(tensors)
        states: Any = generations([self.tensors]) if self.tensors.plain and native() else None
        if states is None:
            states = [[*map(fact, tensors)] for fact in FACTS]
        watched = [bool(p._backward_hooks) or len(p._post_accumulate_grad_hooks or ()) for p in latents]
        self.seen = states, [*map(REQUIRES_GRAD, tensors)], watched, changes.count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Facts) and self.tensors is other.tensors and self.seen == other.seen

    __hash__ = None  # type: ignore[assignment]


REQUIRES_GRAD = operator.attrgetter("requires_grad")
#: Facts of a tensor, where no native code tells of changes.
FACTS: Any = Tensor.data_ptr, Tensor.is_contiguous, *map(operator.attrgetter, ("shape", "dtype"))


def _is_as_it_was(module: nn.Module, w: WeightView) -> bool:
    weight = w.parameter
    is_there = isinstance(module, QuantizedWeight) and module.registered is weight
    return is_there and weight.requires_grad and fits(module, weight, module.alpha) and module.in_rows(weight)  # type: ignore


def check_unchanged(
    model: nn.Module, modules: Sequence[nn.Module], weights: list[WeightView], before: Facts | None = None
) -> Facts | None:
    """Raise unless the model has the same trainable quantized weights as it had, in the same modules.

    What is new among them would be trained straight-through, unnoticed.

    Args:
        modules: all of the model.
        before: what the last call returned. Weights that are as they were then are looked at no further.

    Returns:
        The facts of the weights; None where there are parts of weights, which move in each pass.
    """
    if any([REPLACED in m.__dict__ for m in modules]):  # noqa: C419  a generator takes twice as long
        check_replaced(model.named_modules())
    quantized = [m for m in modules if isinstance(m, QuantizedWeight)]
    here = [m.registered for m in quantized]
    trainable = sum([weight is None or weight.requires_grad for weight in here])
    own = [m for w in weights for m in w.modules]
    if trainable == len(own) and set(own) <= set(quantized):
        whole = all([w.placement is LOCAL for w in weights])  # noqa: C419
        latents = [m.registered for m in own]
        same = all(map(operator.is_, latents, [w.parameter for w in weights for _ in w.modules]))
        facts = Facts(own, latents, before) if whole and same else None
        if facts is not None and facts == before:
            return facts
        if all(_is_as_it_was(m, w) for w in weights for m in w.modules):
            return facts
    now = {w.parameter: w for w in collected(model)}
    known = {w.parameter: w for w in weights}
    changed = [w.name for p, w in known.items() if p not in now] + [
        w.name for p, w in now.items() if p not in known or w.modules != known[p].modules
    ]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise RuntimeError(
            f"the quantized weights changed after Fogzo(model): {changed[0]}{more}. A weight was replaced,"
            " frozen or unfrozen, tied or untied, or another module was quantized. To go on, make a new Fogzo"
            " with the same options, and call new.load_state_dict(old.state_dict(),"
            " may_differ=['one_minus_beta']). A fused optimizer takes it by optimizer.fogzo = new, and a"
            " weight that it lacks by add_param_group"
        )
    return None
