"""DeviceState: what changes from step to step, where a captured CUDA graph can read and advance it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.noise import signed64
from ..spec.schedule import linear
from .settings import Settings


class DeviceState:
    """Seed (int64), step (int64) and 1 - beta (float64) as 0-dim tensors on a device.

    Raises:
        ValueError: some steps would be plain STE.
    """

    def __init__(self, device: torch.device, settings: Settings) -> None:
        for name, only in (("start", 0), ("every", 1)):
            if (value := getattr(settings, name)) != only:
                raise ValueError(
                    f"{name} must be {only} if capturable, got {value}: a graph has its probes or not"
                )
        self.settings = settings
        self.seed = torch.tensor(signed64(settings.seed), device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.one_minus_beta = torch.full((), settings.one_minus_beta, dtype=torch.float64, device=device)
        self.set_step(0)

    def noise(self) -> dict[str, Tensor]:
        """Return the tensors by the names that ops give them."""
        return {"one_minus_beta": self.one_minus_beta, "seed": self.seed, "step": self.step}

    def set_step(self, step: int) -> None:
        """Set the number of the coming step."""
        self.step.fill_(step)
        self.advance(0)

    def advance(self, by: int | Tensor) -> None:
        """Go on by 1, or by 0 where only the device knows that the step is lost, without a wait for it."""
        self.step.add_(by)
        s = self.settings
        if s.schedule == "linear":
            self.one_minus_beta.copy_(linear(self.step.double(), s.total_steps, s.one_minus_beta))
