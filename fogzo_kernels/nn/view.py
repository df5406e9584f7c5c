"""The quantized weights of a model, as the estimator and the optimizers see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops import checks
from ..spec.quantizer import Quantizer
from ..spec.scale import LearnedScale, MeasuredScale
from .module import QuantizedModule
from .pass_weight import Held
from .replaced import REPLACED, check_replaced
from .stale import check, fits, warn_of_new_weights
from .tied import check_raw_uses, owners_of


class QuantizedWeight:
    """A quantized parameter, the modules that share it, and the memory of its quantized values.

    Ops take it, its gradient and what belongs to its elements as rows, views of the memory that is there.
    Its memory holds rows of what a pass runs with: Q(parameter) or a probe.
    """

    def __init__(self, name: str, module: QuantizedModule) -> None:
        self.name = name  # of the first module that has it
        self.parameter, self.tensor_id = module.weight, module.tensor_id
        self.modules = [module]
        self._memory: Tensor | None = None
        self.deferred = False  # whether .grad gets dL/dQ in the gradient pass

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as ops take it, a view where it lies in memory as rows."""
        return self.modules[0].rows(tensor)

    @property
    def latent(self) -> Tensor:
        """The parameter's rows."""
        rows = self.rows(self.parameter)
        return rows if rows is self.parameter else rows.detach()

    @property
    def alike(self) -> list[Tensor]:
        """What all processes that train it have the same values of."""
        return [self.latent, self.alpha]

    @property
    def layout(self) -> tuple[int, int, int] | None:
        """Where the rows lie in the parameter, if they are not all of it."""
        return None

    @property
    def still_row(self) -> int | None:
        """A row that no gradient ever reaches, as of an embedding's padding: it gets no estimate either."""
        found = {m.still_row for m in self.modules}
        return found.pop() if len(found) == 1 else None

    def guide(self) -> Tensor | None:
        """The rows of ``.grad``, or None; what is written to them is written to ``.grad``."""
        grad = self.parameter.grad
        if grad is None:
            return None
        module = self.modules[0]
        if not module.in_rows(grad):
            self.parameter.grad = grad = module.shaped(module.rows(grad).contiguous())
        return module.rows(grad)

    @property
    def alpha(self) -> Tensor:
        """The scale of its grid, float32, as it is in this step."""
        return self.modules[0].alpha.detach()

    @property
    def quantizer(self) -> Quantizer:
        """How it is quantized."""
        return self.modules[0].quantizer

    def memory(self) -> Tensor:
        """Rows for Q(parameter), made anew where the parameter has changed its shape, dtype or device."""
        p, found = self.latent, self._memory
        if found is None or (found.shape, found.dtype, found.device) != (p.shape, p.dtype, p.device):
            self._memory = found = torch.empty_like(p)
        return found

    @property
    def takes_codes(self) -> bool:
        """Whether all its modules multiply codes, so that a probe is written as such."""
        return all(getattr(m, "product", None) is not None for m in self.modules)

    def code_memory(self) -> Tensor:
        """Rows for a probe's int8 codes, in a part of the same memory."""
        found = self.memory()
        return found.view(-1).view(torch.int8)[: found.numel()].view(found.shape)

    # ---- what its modules run with

    @property
    def unwatched(self) -> bool:
        """Whether nobody but the estimator sees a gradient when it arrives: else it must be g, not dL/dQ."""
        p = self.parameter
        return not p._backward_hooks and len(p._post_accumulate_grad_hooks or ()) <= 1

    def use(self, rows: Tensor, probe: bool, deferred: bool = False) -> None:
        """Its modules run with these rows until :meth:`release`: a probe, with no gradient, or Q(parameter).

        ``deferred``: the parameter receives dL/dQ, of which the pass makes g at its end.
        """
        self.deferred = deferred
        self._hold(Held(self.parameter, rows, probe, deferred))

    def release(self) -> None:
        """Its modules quantize for themselves again."""
        self._hold(None)

    def _hold(self, held: Held | None) -> None:
        for module in self.modules:
            module.__dict__["held"] = held  # setattr of nn.Module looks for parameters, which takes time


def quantized_weights(model: nn.Module, of: Callable[..., QuantizedWeight]) -> list[QuantizedWeight]:
    """Every trainable quantized weight once, however many modules share it.

    Args:
        model: its modules are looked at.
        of: makes a weight of its name and first module.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is none; a place of the model uses one as it is; modules that share one differ; tensor
            ids are not distinct; weights lie on several devices, or their eps in units of delta differ.
        RuntimeError: a plain module took the place of a quantized one, or an alpha was made for another weight.
    """
    checks.instance("model", model, nn.Module)
    check_replaced(model.named_modules())
    weights = collected(model, of)
    if not weights:
        raise ValueError(_none_of(model))
    for places in owners_of(model).values():
        check_raw_uses(places)
    ids: dict[int, QuantizedWeight] = {}
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
            f" difference serves them all, got {sorted(epsilons)}"
        )
    return weights


def collected(model: nn.Module, of: Callable[..., QuantizedWeight] = QuantizedWeight) -> list[QuantizedWeight]:
    """The trainable weights of quantized modules as they are now.

    Raises:
        ValueError: a module's weight is no parameter, or does not lie in memory as rows.
    """
    found: dict[Tensor, QuantizedWeight] = {}
    for path, m in model.named_modules():
        if not isinstance(m, QuantizedModule):
            continue
        name = f"{path}.weight" if path else "weight"
        weight = m._parameters.get("weight")
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
        if weight in found:
            found[weight].modules.append(m)
        else:
            found[weight] = of(name, m)
    return list(found.values())


def _none_of(model: nn.Module) -> str:
    frozen = [name for name, m in model.named_modules() if isinstance(m, QuantizedModule)]
    if not frozen:
        return "model must have trainable quantized weights, got none: call quantize_model first"
    return (
        f"model must have trainable quantized weights, got {len(frozen)} quantized modules ({frozen[0]!r}"
        " first) whose weights are all frozen: call requires_grad_() on those to train"
    )


def _check_alike(w: QuantizedWeight) -> None:
    """Modules that share a weight run with one probe, and must have one Q(weight) too."""
    first = w.modules[0]
    for m in w.modules[1:]:
        same = m.quantizer == first.quantizer and m.tensor_id == first.tensor_id
        if isinstance(m.quantizer.scale, LearnedScale):
            alike = m.alpha is first.alpha  # or they would be trained apart
        else:
            measured = isinstance(m.quantizer.scale, MeasuredScale)  # anew in each step
            alike = measured or torch.equal(m.alpha, first.alpha)
        if not (same and alike):
            raise ValueError(
                f"{w.name} must have one quantizer, alpha and tensor_id in all modules that share it, got"
                f" {first} and {m}: tie weights before quantize_model, and calibrate_ the whole model"
            )


def modules_of(model: nn.Module) -> list[nn.Module]:
    """As ``model.modules()``, without the names, which take most of the time that a step would give to it."""
    found, seen = [model], {model}
    for module in found:  # grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _is_as_it_was(module: nn.Module, w: QuantizedWeight) -> bool:
    weight = w.parameter
    is_there = isinstance(module, QuantizedModule) and module._parameters.get("weight") is weight
    return is_there and weight.requires_grad and fits(module) and module.in_rows(weight)  # type: ignore


def check_unchanged(model: nn.Module, modules: Sequence[nn.Module], weights: list[QuantizedWeight]) -> None:
    """Raise unless the model has the same trainable quantized weights as it had, in the same modules.

    What is new among them would be trained straight-through, unnoticed. ``modules``: all of the model.
    """
    trainable = 0
    if any(REPLACED in m.__dict__ for m in modules):
        check_replaced(model.named_modules())
    for m in modules:
        if isinstance(m, QuantizedModule):
            weight = m._parameters.get("weight")
            trainable += weight is None or weight.requires_grad
    same = (_is_as_it_was(m, w) for w in weights for m in w.modules)
    if all(same) and trainable == sum(len(w.modules) for w in weights):
        return
    now = {w.parameter: w for w in collected(model)}
    known = {w.parameter: w for w in weights}
    changed = [w.name for p, w in known.items() if p not in now] + [
        w.name for p, w in now.items() if p not in known or w.modules != known[p].modules
    ]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise RuntimeError(
            f"model must have the quantized weights that Fogzo was made with, got a change in"
            f" {changed[0]}{more}: a weight was replaced, frozen or unfrozen, tied or untied, or another module"
            " quantized. To go on with the model as it is, make a new Fogzo with the same options, call"
            " new.load_state_dict(old.state_dict(), may_differ=['one_minus_beta']), as kappa makes another one"
            " of other weights, and set optimizer.fogzo = new for a fused optimizer; an optimizer that lacks a"
            " weight takes it by add_param_group"
        )
