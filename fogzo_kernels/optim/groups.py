"""parameter_groups: which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.quantized import QuantizedModule
from ..ops import checks


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of a model in two groups, for any optimizer: those that decay, and those that do not.

    Learned alphas do not, as a decay would shrink the range of the quantized weights; nor do biases and norms,
    which have one dimension or none.

    Args:
        model: its trainable parameters are taken, each once.
        weight_decay: of the first group, finite and >= 0; the second has 0.

    Returns:
        Groups as ``torch.optim`` takes them; one that would be empty is left out.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    checks.instance("model", model, nn.Module)
    checks.finite("weight_decay", weight_decay)
    alphas = {id(m.alpha) for m in model.modules() if isinstance(m, QuantizedModule)}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            (decaying if p.ndim > 1 and id(p) not in alphas else others).append(p)
    groups = [
        {"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}
    ]  # fmt: skip
    return [group for group in groups if group["params"]]
