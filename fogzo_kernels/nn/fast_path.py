"""The fast path of ``nn.TransformerEncoderLayer``, which reads the weights of its layers itself.

In evaluation one fused kernel takes the layers' ``weight`` tensors and never runs the layers: with quantized
ones it would compute with the latents. The layer offers one attribute that closes that path alone; with it
the layer runs its modules, as in training.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from .quantized import QuantizedModule


def layers_of(model: nn.Module) -> list[nn.TransformerEncoderLayer]:
    return [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]


def close(model: nn.Module) -> None:
    """Let encoder layers that hold quantized modules run them."""
    for layer in layers_of(model):
        if any(isinstance(m, QuantizedModule) for m in layer.modules()):
            layer.activation_relu_or_gelu = 0


def open_(model: nn.Module) -> None:
    """As PyTorch sets it, for layers that hold no quantized module any more."""
    for layer in layers_of(model):
        if not any(isinstance(m, QuantizedModule) for m in layer.modules()):
            relu = layer.activation is F.relu or isinstance(layer.activation, nn.ReLU)
            gelu = layer.activation is F.gelu or isinstance(layer.activation, nn.GELU)
            layer.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0
