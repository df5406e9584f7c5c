"""Close the fast path of ``nn.TransformerEncoderLayer``, which would compute with latents.

In evaluation a fused kernel takes the ``weight`` tensors of the layer's modules and never runs the modules. An
attribute of the layer closes that path alone. Another attribute keeps an encoder from making nested tensors,
which only the fast path takes.
"""

from __future__ import annotations

from torch import nn

from .replaced import holds_quantized

#: Attributes and values that close the path.
CLOSED: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
#: The attribute of a module for its former value.
KEPT = "_fogzo_fast_path"


def update(model: nn.Module) -> None:
    """Close the path of each module that holds quantized modules, and open it where it holds none any more."""
    for module in model.modules():
        for kind, (name, closed) in CLOSED.items():
            if not isinstance(module, kind):
                continue
            quantized = holds_quantized(module)
            if quantized and not hasattr(module, KEPT):
                setattr(module, KEPT, getattr(module, name))
                setattr(module, name, closed)
            elif not quantized and hasattr(module, KEPT):
                setattr(module, name, getattr(module, KEPT))
                delattr(module, KEPT)
