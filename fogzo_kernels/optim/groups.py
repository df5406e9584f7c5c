"""parameter_groups: which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.quantized import QuantizedWeight
from ..ops import checks


def learned_alphas(model: nn.Module) -> set[nn.Parameter]:
    """The learned scales of a quantized model, of weights and inputs.

    FSDP2 is to leave them whole in every process: ``fully_shard(..., ignored_params=learned_alphas(model))``,
    where the model is quantized before.

    Raises:
        TypeError: ``model`` is not a module.
    """
    checks.instance("model", model, nn.Module)
    modules = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    scales = [t for m in modules for t in (m.alpha, getattr(m, "input_alpha", None))]
    return {t for t in scales if isinstance(t, nn.Parameter)}


def parameter_groups(
    model: nn.Module, *, weight_decay: float, alpha_lr: float | None = None
) -> list[dict[str, Any]]:
    """The parameters of a model in groups, for any optimizer: decaying ones, others, and learned alphas.

    Learned alphas, of weights and inputs, do not decay, which would shrink the range of what is quantized; nor
    do biases and norms, which have one dimension or none. Adam and its like change a parameter by about the
    learning rate, whatever its gradient, and an alpha is small: a tenth of the weights' rate suits it.

    Args:
        model: its trainable parameters are taken, each once.
        weight_decay: of the first group, finite and >= 0; the others have 0.
        alpha_lr: learning rate of the alphas, finite and >= 0; None: the optimizer's own.

    Returns:
        Groups as ``torch.optim`` takes them, alphas last; one that would be empty is left out.

    Raises:
        TypeError, ValueError: an argument is wrong.
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
