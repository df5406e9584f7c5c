"""What a forward pass consumes besides weights: random generators and buffers.

Every pass of a step must see the same dropout masks and leave the same BatchNorm statistics, so
their state is saved before the gradient pass and loaded before each probe. ``.training`` is
never touched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn.quantized import QuantizedModule


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Snapshot(NamedTuple):
    """The state of generators and buffers at one point of a step."""

    cpu: Tensor  # the CPU generator's state
    cuda: dict[int, Tensor]  # the state of each device's
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]  # owner, name, the tensor, its value


class ReplayState:
    """Saves and loads PyTorch's generators and a model's buffers, in place.

    All buffers but the alphas of quantized modules, which passes only read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
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
        modules = list(self.model.modules())
        alphas = {id(m.alpha) for m in modules if isinstance(m, QuantizedModule)}
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and id(buffer) not in alphas  # a user's buffer may have that name too
        ]
        cuda = {d: torch.cuda.get_rng_state(d) for d in sorted(devices)}
        return Snapshot(torch.get_rng_state(), cuda, buffers)

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Generators and buffers as they were when the snapshot was taken."""
        torch.set_rng_state(snapshot.cpu)
        for device, state in snapshot.cuda.items():
            torch.cuda.set_rng_state(state, device)
        for module, name, buffer, value in snapshot.buffers:
            buffer.copy_(value)
            module._buffers[name] = buffer  # a forward may have assigned another tensor
