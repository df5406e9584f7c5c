"""The dtypes that tensors may have: of latents and gradients, and of outputs, which may also be codes."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = (*FLOATS, torch.int8)
