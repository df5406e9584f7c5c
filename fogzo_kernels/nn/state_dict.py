"""How a quantized module's quantizers stand in a state dict: as JSON in a tensor."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import checks
from ..spec.quantizer import Quantizer

if TYPE_CHECKING:
    from .module import QuantizedModule

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


def check_alpha(name: str, own: Tensor, found: object) -> None:
    """Raise unless an entry of a state dict can be an alpha."""
    if not isinstance(found, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(found).__name__}")
    if found.dtype != torch.float32:
        wrong = checks.named([found.dtype])
        raise ValueError(f"{name} must be float32, got {wrong}: was the state dict cast?")
    if found.shape != own.shape:
        raise ValueError(f"{name} must have shape {tuple(own.shape)}, got {tuple(found.shape)}")


def loaded_plain(module: QuantizedModule) -> None:
    """The weight came from a checkpoint of the plain model, which has no alpha."""
    if module.quantizer.scale.from_weight:
        module.calibrate_()
    else:
        warnings.warn(
            "alpha is fixed and stays as it was, though the weights came from a checkpoint of a model that"
            " was not quantized: does it fit them? (A scale that is a function would be called again.)",
            stacklevel=2,
        )
