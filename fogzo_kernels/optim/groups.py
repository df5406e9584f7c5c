"""parameter_groups: which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.quantized import QuantizedWeight
from ..ops import checks


def learned_alphas(model: nn.Module) -> set[nn.Parameter]:
    """Return the learned scales of a quantized model, of weights and of inputs.

    Under FSDP2 every process needs them whole: quantize the model, then call ``fully_shard(model,
    ignored_params=fk.learned_alphas(model))``.

    Args:
        model: a module.

    Returns:
        A set of parameters, empty if no scale is learned.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2))
        >>> fk.learned_alphas(model) == {model.alpha}
        True
    """
    checks.instance("model", model, nn.Module)
    modules = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    scales = [t for m in modules for t in (m.alpha, getattr(m, "input_alpha", None))]
    return {t for t in scales if isinstance(t, nn.Parameter)}


def parameter_groups(
    model: nn.Module, *, weight_decay: float, alpha_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return the trainable parameters of a model in three groups, which decay or do not.

    The groups are weights, which decay; biases and norms; and learned alphas.

    Alphas do not decay, because decay would shrink the range of the quantized weights. Biases and norms, which
    have at most one dimension, do not decay either. Adam changes a parameter by about the learning rate
    whatever its gradient, and an alpha is small: give it a tenth of the weights' rate.

    Args:
        model: a module; each trainable parameter is taken once.
        weight_decay: decay of the first group, finite and >= 0. The other groups have 0.
        alpha_lr: learning rate of the alphas, finite and >= 0. None: the optimizer's own.

    Returns:
        A list of groups as ``torch.optim`` takes them, alphas last. Empty groups are left out.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2))
        >>> groups = fk.parameter_groups(model, weight_decay=0.1, alpha_lr=1e-4)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.1), (1, 0.0), (1, 0.0)]
    """
    checks.instance("model", model, nn.Module)
    checks.finite("weight_decay", weight_decay)
    rate = {}
    if alpha_lr is not None:
        checks.finite("alpha_lr", alpha_lr)
        rate["lr"] = alpha_lr
    learned = learned_alphas(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trainable if p not in learned]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trainable if p in learned], "weight_decay": 0.0, **rate},
    ]
    return [group for group in groups if group["params"]]
