"""Find the trainable quantized weights of a model, check them, and tell whether they have changed."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import TensorList
from ..ops import checks
from ..ops.listop import PLAIN
from ..ops.native import ABSENT, ANY, Objects, state_of
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


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Returns the parameters of these modules, each once."""
    every = [p for m in modules if m._parameters for p in m._parameters.values() if p is not None]
    return list({id(p): p for p in every}.values())


def gpus_of(tensors: Iterable[Tensor]) -> list[int]:
    """Returns the numbers of the GPUs that tensors lie on."""
    return sorted({t.device.index for t in tensors if t.is_cuda}) if torch.cuda.is_available() else []


class Buffers:
    """Finds the buffers of modules that forwards may write: all but those that quantized modules add."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [*modules]
        self._known: Objects | None = None
        self._names: list[tuple[nn.Module, str]] = []

    def names(self) -> list[tuple[nn.Module, str]]:
        """Returns modules and names of buffers, as the modules have them now."""
        if self._known is None or not self._known.holds():
            named = [(m, m._buffers, [name for name, _ in m._buffers.items()]) for m in self._modules]
            sizes = [x for _, buffers, names in named for x in (buffers, len(names))]
            entries = [x for _, buffers, names in named for name in names for x in (buffers, name, ANY)]
            dicts = all(isinstance(buffers, dict) for _, buffers, _ in named)  # not so in TorchScript
            self._known = Objects(tuple(entries), tuple(sizes), (), ()) if dicts else None
            self._names = [
                (m, name)
                for m, _, names in named
                for name in names
                if not (isinstance(m, QuantizedWeight) and name in QuantizedWeight.ADDED)
            ]
        return self._names


class Facts:
    """What a model holds as a step begins: modules, parameters, weights, alphas and hooks.

    Made once, it tells the coming steps natively whether all of it still holds.

    Attributes:
        modules: all of the model.
        parameters: all of the model, each once.
        buffers: of the modules.
    """

    def __init__(self, modules: list[nn.Module], weights: list[WeightView]) -> None:
        self.modules, self.parameters, self.buffers = modules, parameters_of(modules), Buffers(modules)
        self._changes = changes.count
        self._objects: Objects | None = None
        if any(w.placement is not LOCAL for w in weights):  # parts of weights move in each pass
            return
        own = [m for w in weights for m in w.modules]
        latents: list[Any] = [m.registered for m in own]
        tensors: list[Any] = latents + [m.alpha for m in own]
        self._objects = _objects_of(modules, latents, tensors)
        known = set(map(id, tensors))
        others = [p for p in self.parameters if id(p) not in known]
        self._tensors = TensorList([*tensors, *[p for p in others if type(p) in PLAIN]])
        self._others = [p for p in others if type(p) not in PLAIN]
        self._states = self._now()

    def _now(self) -> Any:
        """What tensors say of their memory, shapes, dtypes and devices."""
        others = [p.device for p in self._others]
        return state_of(self._tensors), others

    def hold(self) -> bool:
        """Whether everything is as it was."""
        objects = self._objects
        alike = objects is not None and self._changes == changes.count and objects.holds()
        return alike and self._states == self._now()

    @functools.cached_property
    def gpus(self) -> list[int]:
        """Returns the numbers of the GPUs that parameters lie on."""
        return gpus_of(self.parameters)


def _objects_of(modules: list[nn.Module], latents: list[Tensor], tensors: list[Tensor]) -> Objects | None:
    """Facts of modules, and of hooks and flags of weights and alphas; None where modules keep no dicts."""
    entries: list[Any] = []
    sizes: list[Any] = []
    every = [m.registered for m in modules if isinstance(m, QuantizedWeight)] + tensors  # frozen ones, too
    flags = {id(t): t for t in every if t is not None}.values()
    attributes: list[Any] = [x for t in flags for x in (t, "requires_grad", t.requires_grad)]
    for m in modules:
        state = m.__dict__
        for name in ("_modules", "_parameters", "_buffers", REPLACED, "placement"):
            entries += state, name, state.get(name, ABSENT)
        for held in (m._modules, m._parameters):
            if not isinstance(held, dict):  # of TorchScript
                return None
            sizes += held, len(held)
            for name, value in held.items():
                entries += held, name, value
        for name in ("alpha", "alpha_least"):
            if name in m._buffers:
                entries += m._buffers, name, m._buffers[name]
    for t in latents:
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks = getattr(t, name)
            attributes += t, name, hooks
            if hooks is not None:
                sizes += hooks, len(hooks)
    types = [x for m in modules for x in (m, type(m))]
    return Objects(tuple(entries), tuple(sizes), tuple(attributes), tuple(types))


def _is_as_it_was(module: nn.Module, w: WeightView) -> bool:
    weight = w.parameter
    is_there = isinstance(module, QuantizedWeight) and module.registered is weight
    return is_there and weight.requires_grad and fits(module, weight, module.alpha) and module.in_rows(weight)  # type: ignore


def check_unchanged(model: nn.Module, weights: list[WeightView], before: Facts | None = None) -> Facts:
    """Raise unless the model has the same trainable quantized weights as it had, in the same modules.

    What is new among them would be trained straight-through, unnoticed.

    Args:
        before: what the last call returned. It is returned again while everything is as it was.
    """
    if before is not None and before.hold():
        return before
    modules = modules_of(model)
    if any([REPLACED in m.__dict__ for m in modules]):  # noqa: C419  a generator takes twice as long
        check_replaced(model.named_modules())
    quantized = [m for m in modules if isinstance(m, QuantizedWeight)]
    here = [m.registered for m in quantized]
    trainable = sum([weight is None or weight.requires_grad for weight in here])
    own = [m for w in weights for m in w.modules]
    known = trainable == len(own) and set(own) <= set(quantized)
    if not (known and all(_is_as_it_was(m, w) for w in weights for m in w.modules)):
        _raise_if_changed(model, weights)
    return Facts(modules, weights)


def _raise_if_changed(model: nn.Module, weights: list[WeightView]) -> None:
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
