"""Tied weights: a weight that is used both quantized and plain would be trained on half of its uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..spec.quantizer import Quantizer
from .held import CHILD, HeldWeight
from .module import QuantizedModule
from .quantized import QuantizedWeight
from .view import local

#: A module and the name of a parameter of it.
Owner = tuple[nn.Module, str]


def owners_of(model: nn.Module) -> dict[Tensor, dict[str, Owner]]:
    """Returns every parameter of a model with all modules that have it, by the parameter's names."""
    owners: dict[Tensor, dict[str, Owner]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, {})[f"{path}.{name}".lstrip(".")] = (module, name)
    return owners


def check_shared(model: nn.Module, chosen: Mapping[Owner, Quantizer]) -> None:
    """Raise unless all modules that share a weight of ``chosen`` will run with the same Q(weight)."""
    memory: dict[tuple[object, int], str] = {}
    for weight, places in owners_of(model).items():
        mine = {where: chosen[owner] for where, owner in places.items() if owner in chosen}
        if not mine:
            continue
        first, quantizer = next(iter(mine.items()))
        for where, owner in places.items():
            if quantized_at(owner) is not None:
                raise ValueError(
                    f"{first} must be quantized in one call with the modules that share it, got {where}"
                    " quantized before: dequantize_model(model, latents=True), then quantize both"
                )
            if where not in mine:
                raise ValueError(_both(first, where))
            if mine[where] != quantizer:
                raise ValueError(f"{first} and {where} are one parameter: rules must give both one quantizer")
        if local(weight).numel() and not weight.is_meta:
            key = (weight.device, local(weight).data_ptr())
            if key in memory:
                raise ValueError(
                    f"{memory[key]} and {first} must not be two parameters with one memory: to tie them, let"
                    " both modules have the same Parameter"
                )
            memory[key] = first


def check_raw_uses(model: nn.Module) -> None:
    """Raise if a quantized weight is a parameter of a plain module, too."""
    for places in owners_of(model).values():
        quantized = list(_quantized(places))
        raw = [where for where in places if where not in quantized]
        if quantized and raw:
            raise ValueError(_both(quantized[0], raw[0]))


def link(model: nn.Module) -> None:
    """Let modules that share a weight share a learned alpha too, and keep their other alphas equal.

    A state dict may have a shared weight once; :func:`follow` then gives all its modules the alpha that came.
    """
    shared = [tied for places in owners_of(model).values() if len(tied := _quantized(places)) > 1]
    for tied in shared:
        learned = [m for m in tied.values() if m.quantizer.learned]
        for module in learned[1:]:
            module.alpha, module.alpha_least = learned[0].alpha, learned[0].alpha_least.clone()
            module.weight_quantizer.shares = True
    if shared:
        model.register_load_state_dict_post_hook(follow)


def follow(model: nn.Module, incompatible: Any) -> None:
    """Give each module whose weight came under another module's name the alpha of that module."""
    missing = [f".{key}" for key in incompatible.missing_keys]  # of a whole that the model may be a part of
    for places in owners_of(model).values():
        tied = _quantized(places)
        absent = [where for where in tied if any(key.endswith(f".{where}") for key in missing)]
        present = [where for where in tied if where not in absent]
        for where in absent if present else []:
            if not isinstance(tied[where].alpha, nn.Parameter):  # tied modules share a learned alpha
                tied[where].alpha = tied[present[0]].alpha.clone()


def _quantized(places: Mapping[str, Owner]) -> dict[str, QuantizedWeight]:
    """Returns the quantized places of a weight."""
    found = {where: quantized_at(owner) for where, owner in places.items()}
    return {where: m for where, m in found.items() if m is not None}


def quantized_at(owner: Owner) -> QuantizedWeight | None:
    """Returns what quantizes a parameter of a module, or None."""
    module, name = owner
    if isinstance(module, QuantizedModule):
        return module if name == module.PARAMETER else None
    name += CHILD
    held = module._modules[name] if name in module._modules else None  # noqa: SIM401  TorchScript has no get()
    return held if isinstance(held, HeldWeight) else None


def _both(quantized: str, raw: str) -> str:
    rules = [(where.rpartition(".")[0], None) for where in (quantized, raw)]
    return (
        f"{quantized} and {raw} are one parameter, and only {quantized} would be quantized: probes would not"
        f" perturb {raw}, and its gradient would be lost. Quantize both, leave both alone (rules={rules}), or"
        " untie them"
    )
