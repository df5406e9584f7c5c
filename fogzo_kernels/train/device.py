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
        ValueError: some steps would be plain STE, and a graph has its probes or not.
    """

    def __init__(self, device: torch.device, settings: Settings) -> None:
        if settings.start:
            raise ValueError(
                f"start must be 0 if capturable, got {settings.start}: a graph has its probes or not"
            )
        if settings.every > 1:
            raise ValueError(
                f"every must be 1 if capturable, got {settings.every}: a graph has its probes or not"
            )
        self.settings = settings
        self.seed = torch.tensor(signed64(settings.seed), device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.one_minus_beta = torch.full((), settings.one_minus_beta, dtype=torch.float64, device=device)
        self.set_step(0)

    def set_step(self, step: int) -> None:
        self.step.fill_(step)
        self._schedule()

    def advance(self, by: int | Tensor = 1) -> None:
        """On to the next step, or by 0 where only the device knows that one is lost; nothing waits for it."""
        self.step.add_(by)
        self._schedule()

    def _schedule(self) -> None:
        s = self.settings
        if s.schedule == "linear":
            self.one_minus_beta.copy_(linear(self.step.double(), s.total_steps, s.one_minus_beta))
