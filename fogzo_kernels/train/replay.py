"""What a forward pass consumes besides weights: random generators and buffers.

Every pass of a step must see the same dropout masks and leave the same BatchNorm statistics, so
their state is saved before the gradient pass and loaded before each probe. ``.training`` is
never touched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Snapshot(NamedTuple):
    cpu: Tensor
    cuda: dict[int, Tensor]
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]  # owner, name, the tensor, its value


class ReplayState:
    """Saves and loads PyTorch's generators and a model's buffers, in place.

    Args:
        skip: names of buffers that passes only read.
    """

    def __init__(self, model: nn.Module, skip: tuple[str, ...] = ()) -> None:
        self.model, self.skip = model, skip
        self.draws: bool | None = None  # whether a pass drew numbers on a GPU; None before the first

    def compare(self, before: Snapshot, after: Snapshot) -> None:
        """Note whether the pass between the two drew random numbers on a GPU."""
        if not capturing():
            self.draws = any(not torch.equal(before.cuda[d], after.cuda[d]) for d in before.cuda)

    @torch.no_grad()
    def save(self) -> Snapshot:
        """The state as it is. A CUDA graph's capture can neither read nor set the device's generators."""
        devices = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
        if capturing():
            if self.draws is not False:
                raise RuntimeError(
                    "model must not draw random numbers on the GPU in a captured step (dropout, say): every"
                    " pass of a replay would draw others"
                    if self.draws
                    else "a step must be run before one is captured in a CUDA graph"
                )
            devices = set()
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in self.skip
        ]
        cuda = {d: torch.cuda.get_rng_state(d) for d in sorted(devices)}
        return Snapshot(torch.get_rng_state(), cuda, buffers)

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        torch.set_rng_state(snapshot.cpu)
        for device, state in snapshot.cuda.items():
            torch.cuda.set_rng_state(state, device)
        for module, name, buffer, value in snapshot.buffers:
            buffer.copy_(value)
            module._buffers[name] = buffer  # a forward may have assigned another tensor
