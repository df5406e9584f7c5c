"""The fast path of ``nn.TransformerEncoderLayer``, which reads the weights of its layers itself.

In evaluation one fused kernel takes the layers' ``weight`` tensors and never runs the layers: with quantized
ones it would compute with the latents. An attribute of the layer closes that path alone; with it the layer
runs its modules, as in training. Another keeps an encoder from giving its layers nested tensors, which only the
fast path takes.
"""

from __future__ import annotations

from torch import nn

from .module import QuantizedModule

#: What closes the path, and with which value.
CLOSED: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
#: Where a module keeps the value that it had before.
KEPT = "_fogzo_fast_path"


def update(model: nn.Module) -> None:
    """Close the path where quantized modules are, and open it again where they were and are no more."""
    for module in model.modules():
        for kind, (name, closed) in CLOSED.items():
            if not isinstance(module, kind):
                continue
            quantized = any(isinstance(m, QuantizedModule) for m in module.modules())
            if quantized and not hasattr(module, KEPT):
                setattr(module, KEPT, getattr(module, name))
                setattr(module, name, closed)
            elif not quantized and hasattr(module, KEPT):
                setattr(module, name, getattr(module, KEPT))
                delattr(module, KEPT)
