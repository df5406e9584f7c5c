"""ProbeMemory: tensors for the second probe of a direction, whose memory is freed after each probe."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import TensorList

ALIGNED = 64  # bytes, as allocators align


class ProbeMemory:
    """Tensors like others, which have memory only while a probe needs it.

    The tensors stay, so ops keep their tables of them. All tensors share one storage. If somebody else holds a
    tensor after the probe, all keep their memory, and the next probe gets new tensors.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._like = like
        self._tensors: TensorList | None = None
        self._storage: torch.UntypedStorage | None = None
        self._size = 0
        self._holders = 0, 0

    def take(self) -> TensorList:
        """Returns the tensors, with memory."""
        if self._tensors is None or self._storage is None:
            sizes = [-(-t.nbytes // ALIGNED) * ALIGNED for t in self._like]
            self._size = sum(sizes)
            self._storage = storage = torch.UntypedStorage(self._size, device=self._like[0].device)
            tensors, offset = [], 0
            for t, size in zip(self._like, sizes, strict=True):
                empty = torch.empty(0, dtype=t.dtype, device=t.device)
                tensors.append(empty.set_(storage, offset // t.itemsize, t.shape, t.stride()))
                offset += size
            self._tensors = TensorList(tensors)
        else:
            self._storage.resize_(self._size)
        return self._tensors

    def _held(self) -> tuple[int, int]:
        """Returns how many hold the tensors, and their storage."""
        assert self._tensors is not None
        assert self._storage is not None
        uses: int = torch._C._storage_Use_Count(self._storage._cdata)
        return sum(map(sys.getrefcount, self._tensors)), uses

    def begin(self) -> None:
        """Note who holds the tensors as the probe begins."""
        if self._tensors is not None:
            self._holders = self._held()

    def free(self) -> None:
        """Free the memory after the probe."""
        if self._tensors is None or self._storage is None:
            return
        if self._held() == self._holders:
            self._storage.resize_(0)
        else:
            self._tensors = self._storage = None
