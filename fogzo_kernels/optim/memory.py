"""How parameters lie in memory, and master copies that follow them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..nn.view import local

#: How an op takes a parameter, and what has its shape: a view.
View = Callable[[Tensor], Tensor]

BITS = torch.int16  # of bfloat16 and float16; a CPU compares them a hundred times as fast as such numbers


@torch.no_grad()
def follow(master: Tensor, latent: Tensor) -> None:
    """Let a master copy become the latent where that is not the master rounded, with no wait for a GPU."""
    rounded, now = master.to(latent.dtype).view(BITS), latent.view(BITS)
    if latent.device.type != "cpu" or not torch.equal(rounded, now):
        master.copy_(torch.where(rounded == now, master, latent.float()))


def lies_so(tensor: Tensor, seen: View) -> bool:
    """Whether what an op writes through a view lands in the tensor: a view of other memory is a copy."""
    view = seen(tensor)
    return view.is_contiguous() and view.data_ptr() == local(tensor).data_ptr()


def in_memory(p: Tensor) -> View:
    """How to see tensors that lie in memory as ``p`` does, in the order of memory."""
    if p.is_contiguous():
        return local
    strides = p.stride()
    order = sorted(range(p.ndim), key=lambda d: -strides[d])
    if not p.permute(order).is_contiguous():
        raise ValueError(
            f"params must be dense in memory, got one of shape {tuple(p.shape)} with strides {strides}"
        )
    return lambda t: t.permute(order)
