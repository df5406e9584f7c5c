"""The common sets of dtypes (docs/contract.md, section 4)."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # of latents, gradients and values
OUTPUTS = (*FLOATS, torch.int8)  # int8 holds codes
