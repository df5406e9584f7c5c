"""Models under ``fully_shard``, whose weights a step has the rows of that this process holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed.tensor_parallel import Part
from ..nn.module import QuantizedModule
from ..nn.view import FSDPModule, WeightView, local


class Sharding:
    """What the processes of a sharded model do together in a step; nothing where the model is not sharded.

    Args:
        model: the root that ``fully_shard`` was given.
        weights: its quantized weights.
        reduction: of losses and gradients, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: some weights are sharded and others are not, or over other processes, or a learned alpha is.
    """

    def __init__(self, model: nn.Module, weights: Sequence[WeightView], reduction: str | None) -> None:
        sharded = [w for w in weights if not w.placement.is_whole]
        self._shard: Any = sharded[0].placement if sharded else None
        self._fsdp = (
            [m for m in model.modules() if isinstance(m, FSDPModule)] if sharded else []
        )  # none under tensor parallelism
        self._replicas = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self._mean, self._inputs = reduction == "mean", list[Tensor]()
        self.parallel = any(isinstance(w.placement, Part) for w in sharded)
        self._mesh: Any = None
        if not sharded:
            return
        other = next((w.name for w in weights if type(w.placement) is not type(self._shard)), None)
        if other is not None:
            how = "parallelize_module" if self.parallel else "fully_shard"
            raise ValueError(
                f"model must have all its quantized weights under {how}, got {sharded[0].name} that is"
                f" and {other} that is not"
            )
        meshes = [(w.name, w.parameter.device_mesh) for w in sharded]  # type: ignore[attr-defined]
        self._mesh = meshes[0][1]
        for name, mesh in meshes:
            if mesh != self._mesh:
                raise ValueError(
                    f"model must be sharded over one mesh, got {self._mesh} for {meshes[0][0]} and {mesh} for"
                    f" {name}"
                )
        for w in sharded:
            for m in w.modules:
                _check_module(w.name, m)
        self._inputs = [m.input_alpha for w in sharded for m in w.modules if "input_alpha" in m._parameters]

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The processes that train the model, one group for each dimension of its mesh."""
        return [] if self._mesh is None else [self._mesh.get_group(i) for i in range(self._mesh.ndim)]

    def between_passes(self, failed: bool = False) -> None:
        """Free what a pass gathered: the next has other values, and sees the buffers of the first process."""
        for replica in self._replicas:  # which leaves them alone after a forward without gradients
            replica.require_forward_param_sync = True
        for module in self._fsdp if failed else ():
            if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):  # newer ones
                module.reset_iter_state()
        for module in self._fsdp:
            module.reshard()

    def summed(self, squares: Tensor) -> Tensor:
        """A sum over the rows of this process becomes that over all of them, in place."""
        if self._shard is not None:
            dist.all_reduce(squares, group=self._shard.group)
        return squares

    @torch.no_grad()
    def reduce_inputs(self) -> None:
        """Reduce the gradients of learned scales of inputs, which FSDP does not see."""
        grads = [alpha.grad for alpha in self._inputs if alpha.grad is not None]
        if not grads:
            return
        flat = torch.stack(grads)
        for group in self.groups:
            dist.all_reduce(flat, group=group)
            if self._mean:
                flat /= dist.get_world_size(group)
        torch._foreach_copy_(grads, list(flat.unbind()))


def _check_module(name: str, module: QuantizedModule) -> None:
    """Raise unless a sharded weight's module has its alphas in every process, and multiplies values."""
    prefix = name.removesuffix("weight")
    for alpha in ("alpha", "input_alpha"):
        if local(getattr(module, alpha, module.alpha)) is not getattr(module, alpha, module.alpha):
            raise ValueError(
                f"{prefix}{alpha} must be whole in every process, got a shard: give fully_shard"
                " ignored_params=fk.learned_alphas(model), or call quantize_model after it"
            )
    if getattr(module, "product", None) is not None:
        raise ValueError(f"{prefix[:-1]} must not multiply codes under fully_shard: set_compute_(model, None)")


@torch.no_grad()
def over_shards(weights: Sequence[WeightView], found: list[Tensor]) -> list[Tensor]:
    """Gradients of alphas, of which a process has found what its rows add: summed over processes, and whole."""
    sharded = [w for w in weights if not w.placement.is_whole]
    if not sharded:
        return found
    every = [torch.zeros_like(w.modules[0].alpha) for w in sharded]
    for w, one, own in zip(sharded, every, found, strict=True):
        w.placement.put(one, own)
    flat, group = torch.cat([one.view(-1) for one in every]), sharded[0].placement.group  # type: ignore[attr-defined]
    dist.all_reduce(flat, group=group)
    parts = flat.split([one.numel() for one in every])
    return [part.view_as(one) for part, one in zip(parts, every, strict=True)]
