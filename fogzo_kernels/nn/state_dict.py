"""Save and load quantized modules: their quantizers stand in a state dict as JSON in a tensor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import checks
from ..spec.quantizer import Quantizer
from .inputs import InputQuantizer
from .weight import WeightQuantizer

EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


class SavedModule(nn.Module):
    """The part of a quantized module that saves and loads it."""

    PARAMETER: str
    alpha: Tensor
    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer | None
    activation: Any
    calibrate_: Callable[[], None]
    lay_out: Callable[[], None]

    def own_tensors(self) -> list[str]:
        """The names of the tensors that the plain module does not have."""
        inputs = self.activation is not None and self.activation.learned
        own = ["alpha", "alpha_least"] if self.weight_quantizer.quantizer.learned else ["alpha"]
        return own + ["input_alpha", "input_alpha_least"] * inputs

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A shared alpha has memory of its own there: formats that take each memory once hold it twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_quantizer.shares and not keep_vars:
            destination[prefix + "alpha"] = destination[prefix + "alpha"].clone()

    def weight_key(self, prefix: str) -> str:
        """The weight's key in a state dict, where the module's own keys begin so."""
        return prefix + self.PARAMETER

    def has_weight(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a state dict that is being loaded has the weight."""
        return prefix + self.PARAMETER in state_dict

    def get_extra_state(self) -> Tensor:
        """The quantizers, as a uint8 tensor, so that formats of tensors alone can hold it."""
        how = self.weight_quantizer.quantizer.to_dict()
        how["activation"] = self.activation and self.activation.to_dict()
        text = json.dumps(how, sort_keys=True)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a state dict's quantizer is that of this module.

        Raises:
            ValueError: its grid is another one, or it cannot be read.
        """
        saved, own = self._accepted(state), self.weight_quantizer.quantizer
        if saved.straight_through != own.straight_through:
            warnings.warn(
                f"training goes on with {own.straight_through}, but the loaded state was trained with"
                f" {saved.straight_through}",
                stacklevel=2,
            )

    def _accepted(self, state: object) -> Quantizer:
        """The quantizer in a state dict's entry; raise unless codes mean the same with it."""
        if not isinstance(state, Tensor) or state.dtype != torch.uint8:
            what = checks.named([state.dtype]) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"the quantizer's state must be a uint8 tensor, got {what}")
        text = bytes(state.flatten().tolist())
        try:
            how = json.loads(text)
            saved, activation = Quantizer.from_dict(how), how.get("activation")
            activation = None if activation is None else Quantizer.from_dict(activation)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"the quantizer's state must be JSON, got {text!r}") from error
        own = self.weight_quantizer.quantizer
        for mine, other in ((own.grid, saved.grid), (own.transform, saved.transform)):
            if other != mine:
                raise ValueError(f"the quantizer must have {mine or 'no transform'}, got a state with {other}")
        if type(saved.scale) is not type(own.scale):  # a measured alpha may be older than the weight beside it
            raise ValueError(f"the quantizer must have {own.scale}, got a state with {saved.scale}")
        if (activation and activation.to_dict()) != (self.activation and self.activation.to_dict()):
            raise ValueError(f"activation must be {self.activation}, got a state with {activation}")
        return saved

    def _load_from_state_dict(self, *args: Any) -> None:
        state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs = args
        own, extra, name = self.own_tensors(), prefix + EXTRA_STATE, prefix.removesuffix(".") or "model"
        added, came = [*(prefix + x for x in own), extra], self.has_weight(state_dict, prefix)
        try:
            for x in own:
                if prefix + x in state_dict:
                    _check_alpha(x, getattr(self, x), state_dict[prefix + x])
            if extra in state_dict:
                self._accepted(state_dict[extra])
        except ValueError as error:  # PyTorch raises the errors of all modules at the end
            error_msgs.append(f"{name}: {error}")
            return
        plain = not any(key in state_dict for key in added)
        if self.input_quantizer is not None and prefix + "input_alpha" in state_dict:
            self.input_quantizer.note(state_dict[prefix + "input_alpha"])
        missing: list[str] = []
        failed = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected_keys, error_msgs
        )
        self.weight_quantizer.stale = self.weight_quantizer.stale and not came
        missing_keys += [key for key in missing if not (plain and key in added)]
        self.lay_out()
        if plain and came and len(error_msgs) == failed:
            try:
                self._take_plain_weight()
            except (TypeError, ValueError, RuntimeError) as error:
                error_msgs.append(f"{name}: {error}")

    def _take_plain_weight(self) -> None:
        """Make alpha of a weight that came from a checkpoint of the plain model, which has no alpha."""
        if self.weight_quantizer.quantizer.scale.from_weight:
            self.calibrate_()
        else:
            warnings.warn(
                "the loaded weights come from a model that was not quantized, and the fixed alpha stays as it"
                " was: check that it fits them. (A scale that is a function is called again.)",
                stacklevel=2,
            )


def _check_alpha(name: str, own: Tensor, saved: object) -> None:
    """Raise unless an entry of a state dict can be an alpha."""
    if not isinstance(saved, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(saved).__name__}")
    if saved.dtype != torch.float32:
        wrong = checks.named([saved.dtype])
        raise ValueError(f"{name} must be float32, got {wrong}: was the state dict cast?")
    if saved.shape != own.shape:
        raise ValueError(f"{name} must have shape {tuple(own.shape)}, got {tuple(saved.shape)}")
