"""How a quantized module's quantizers stand in a state dict: as JSON in a tensor."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from ..ops import checks
from ..spec.quantizer import Quantizer

EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def quantizers_as_state(weight: Quantizer, activation: Quantizer | None) -> Tensor:
    """A uint8 tensor, so that formats of tensors alone can hold it."""
    text = json.dumps(weight.to_dict() | {"activation": activation and activation.to_dict()}, sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def saved_quantizers(state: object) -> tuple[Quantizer, Quantizer | None]:
    """The quantizers of weight and activation in an entry of a state dict.

    Raises:
        ValueError: it cannot be read.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        what = checks.named([state.dtype]) if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"the quantizer's state must be a uint8 tensor, got {what}")
    text = bytes(state.flatten().tolist())
    try:
        found = json.loads(text)
        saved = Quantizer.from_dict(found)
        activation = found.get("activation")
        return saved, None if activation is None else Quantizer.from_dict(activation)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the quantizer's state must be JSON, got {text!r}") from error
