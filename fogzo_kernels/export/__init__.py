"""Files of quantized models for other libraries. Each function uses the library that owns its format."""

from .ao import torchao
from .compressed import compressed_tensors
from .integers import freeze_scales_
from .llama import gguf
from .plain import load, safetensors

__all__ = ["compressed_tensors", "freeze_scales_", "gguf", "load", "safetensors", "torchao"]
