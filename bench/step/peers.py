"""What people train quantized linear layers with instead: torchao's QAT, and LSQ by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # weights of a row that share a scale, in torchao's QAT
QMIN, QMAX = -2, 1  # of LSQ by hand: codes of 2 bits


def chosen(model: nn.Module, skip: list[str]) -> dict[str, nn.Linear]:
    """The linear layers by name, but the skipped.

    Raises:
        ValueError: there are none, or convolutions, which this package would quantize too.
    """
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in skip}
    if convolutions or not linear:
        raise ValueError("model must have linear layers and no convolutions, for this method")
    return linear


# ---- torchao


def prepare_torchao(model: nn.Module, skip: list[str], *, inputs: bool = False, compiled: bool = False) -> None:
    """Replace linear layers by torchao's QAT layers.

    Args:
        model: changed in place.
        skip: names of layers that stay.
        inputs: whether each token is quantized to 8 bits, too.
        compiled: whether torch.compile makes code of each of these layers.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig

    names = chosen(model, skip)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=GROUP)
    tokens = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if inputs else None
    config = QATConfig(activation_config=tokens, weight_config=weight, step="prepare")
    quantize_(model, config, filter_fn=lambda _, name: name in names)
    made = [m for m in model.modules() if isinstance(m, FakeQuantizedLinear)]
    if len(made) != len(names):
        raise RuntimeError(f"torchao must prepare {len(names)} layers, got {len(made)}")
    if compiled:
        for module in made:
            module.compile(dynamic=False)


# ---- LSQ


def round_pass(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    return (x - x * factor).detach() + x * factor


class LsqLinear(nn.Module):
    """A linear layer with a learned step size for its weight, as LSQ's paper (arXiv 1902.08153) writes it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.alpha = nn.Parameter(2 * linear.weight.detach().abs().mean() / math.sqrt(QMAX))
        self.factor = 1 / math.sqrt(linear.weight.numel() * QMAX)

    def quantized(self) -> Tensor:
        alpha = scale_gradient(self.alpha, self.factor)
        return round_pass((self.weight / alpha).clamp(QMIN, QMAX)) * alpha

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized(), self.bias)


def prepare_lsq(model: nn.Module, skip: list[str]) -> None:
    """Replace linear layers by LSQ layers, in place."""
    for name, linear in chosen(model, skip).items():
        model.set_submodule(name, LsqLinear(linear))
