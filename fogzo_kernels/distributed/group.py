"""Peers: what processes that train one model exchange in a step, and whether they train the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.quantized import QuantizedWeight
from ..nn.view import WeightView, is_fsdp, local
from ..spec.noise import signed64
from .sharding import CutWeight

Weights = Sequence[WeightView]
REDUCTIONS = ("mean", "sum", None)
EVERY = 100  # steps from one comparison to the next, as each waits for the device
#: What all processes must have in common, in the order in which it is compared.
FACTS = ("seed", "number of steps taken", "settings", "quantized weights", "values of the weights")
STEPS = FACTS.index("number of steps taken")


class Peers:
    """Reduces and compares what the processes have that train a model with this one.

    Args:
        model: the module that a DistributedDataParallel or ``fully_shard`` was given, or one that holds it.
        weights: its quantized weights.
        process_group: the processes, or None for the processes of the model's mesh or DistributedDataParallel.
        reduction: of losses and gradients: ``"mean"``, ``"sum"``, or None where this process trains alone.

    Raises:
        ValueError: ``reduction`` is another, or a group is missing or has no use. Some weights are sharded and
            others are not, or over other processes. A learned alpha is sharded.
    """

    def __init__(
        self, model: nn.Module, weights: Weights, process_group: dist.ProcessGroup | None, reduction: str | None
    ) -> None:
        self.process_group, self.reduction = process_group, reduction
        parts = [w for w in weights if not w.placement.is_whole]
        self.sharded = bool(parts)  # whether this process has a part of the weights only
        self._mesh_groups = _mesh_groups(parts, weights) if parts else []
        self._placement = weights[0].placement
        modules = list(model.modules())
        self._fsdp = [m for m in modules if is_fsdp(m)] if parts else []
        self._replicas = [m for m in modules if isinstance(m, DistributedDataParallel)]
        own = [m for w in parts for m in w.modules]
        self._inputs = [m.input_alpha for m in own if "input_alpha" in m._parameters]
        self.due = True  # whether the coming step compares what processes have in common
        self._facts: Tensor | None = None  # of this process, from the last comparison
        if reduction not in REDUCTIONS:
            raise ValueError(f"loss_reduction must be 'mean', 'sum' or None, got {reduction!r}")
        if reduction is None and process_group is not None:
            raise ValueError("process_group must be None with loss_reduction=None, got a group")
        if reduction is None and parts:
            raise ValueError("loss_reduction must be 'mean' or 'sum' for a sharded model, got None")
        _ = self.groups

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Returns the groups over which losses are reduced; none where this process trains alone.

        Raises:
            ValueError: there are several processes, and nothing says which of them train this model.
        """
        if self.reduction is None or not (dist.is_available() and dist.is_initialized()):
            return []
        if self.process_group is not None:
            return [self.process_group]
        if self.sharded:
            return self._mesh_groups
        if self._replicas:
            return [self._replicas[0].process_group]
        if dist.get_world_size() == 1:
            return []
        raise ValueError(
            f"process_group must be given: {dist.get_world_size()} processes run, and the model is neither"
            " DistributedDataParallel nor sharded. Name the processes that train this model together"
            " (torch.distributed.group.WORLD for all), or give loss_reduction=None if this one trains it alone"
        )

    # ---- reductions

    def reduce(self, losses: Tensor) -> None:
        """Reduce the losses of a step in place. Processes that have parts of a weight have one batch."""
        mean = self.reduction == "mean" or isinstance(self._placement, CutWeight)
        _all_reduce(losses, self.groups, mean)

    def agree(self, flags: Tensor) -> None:
        """Replace each flag, int32, by the greatest that a process has."""
        for group in self.groups:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)

    def sum(self, squares: Tensor) -> Tensor:
        """Add, in place, what processes have summed over their parts of the weights."""
        part = self._placement.part
        return squares if part is None else part.sum(squares)

    @torch.no_grad()
    def reduce_inputs(self) -> None:
        """Reduce the gradients of learned scales of inputs, which FSDP does not see."""
        grads = [alpha.grad for alpha in self._inputs if alpha.grad is not None]
        if grads:
            flat = torch.stack(grads)
            _all_reduce(flat, self._mesh_groups, self.reduction == "mean")
            torch._foreach_copy_(grads, list(flat.unbind()))

    # ---- passes

    def between_passes(self, failed: bool = False) -> None:
        """Free what a pass gathered: the next has other values, and sees the buffers of the first process."""
        for replica in self._replicas:  # which leaves them alone after a forward without gradients
            replica.require_forward_param_sync = True
        for module in self._fsdp if failed else ():
            if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):  # newer ones
                module.reset_iter_state()
        for module in self._fsdp:
            module.reshard()

    def no_sync(self) -> AbstractContextManager[None]:
        """Returns a context in which a forward with autograd prepares no exchange of gradients."""
        return self._replicas[0].no_sync() if self._replicas else nullcontext()

    # ---- whether all train the same

    @torch.no_grad()
    def check(self, seed: int, settings: object, steps: int, weights: Weights) -> None:
        """Compare what processes must have in common; all of a group call it at each step.

        It waits for the device in the first step of an estimator, in the first after it has loaded a state, and
        in every hundredth.

        Raises:
            RuntimeError: something differs.
        """
        groups = self.groups
        if not groups:
            return
        look = self.due or steps % EVERY == 0
        self.due = False
        if look or self._facts is None:
            self._facts = _facts(seed, settings, weights)
        mine = self._facts = self._facts.to(weights[0].parameter.device)  # to copy them there anew would wait
        mine[STEPS].fill_(steps)
        extremes = torch.cat([mine, ~mine])  # the greatest of ~x is that of the least x
        for group in groups:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        if not look:
            return
        most, least = extremes[: len(FACTS)].tolist(), (~extremes[len(FACTS) :]).tolist()
        for name, high, low in zip(FACTS, most, least, strict=True):
            if high != low:
                shown = f": {low} to {high}" if name in FACTS[:2] else ""
                raise RuntimeError(
                    f"all processes of a group must have the same {name}, and some differ{shown}. This one has"
                    f" {settings}, {steps} steps taken and {len(weights)} quantized weights"
                )


@torch.no_grad()
def sum_of_parts(weights: Weights, own: list[Tensor]) -> list[Tensor]:
    """Returns the gradients of whole alphas: sums of the gradients that processes have from their parts."""
    parts = [part for w in weights if (part := w.placement.part) is not None]
    if not parts:
        return own
    every = [torch.zeros_like(w.modules[0].alpha) for w in weights]
    for part, grad, own_grad in zip(parts, every, own, strict=True):
        part.own(grad).copy_(own_grad)
    flat = parts[0].sum(torch.cat([grad.view(-1) for grad in every]))
    flats = flat.split([grad.numel() for grad in every])
    return [summed.view_as(grad) for summed, grad in zip(flats, every, strict=True)]


def _all_reduce(tensor: Tensor, groups: Sequence[dist.ProcessGroup], mean: bool) -> None:
    for group in groups:
        dist.all_reduce(tensor, group=group)
        if mean:
            tensor /= dist.get_world_size(group)


def _mesh_groups(parts: Weights, weights: Weights) -> list[dist.ProcessGroup]:
    """Returns a group for each dimension of the mesh of ``parts``; raises unless all weights lie on it."""
    first = parts[0]
    other = next((w.name for w in weights if type(w.placement) is not type(first.placement)), None)
    if other is not None:
        how = "parallelize_module" if isinstance(first.placement, CutWeight) else "fully_shard"
        raise ValueError(
            f"model must have all its quantized weights under {how}, got {first.name} that is and {other} that"
            " is not"
        )
    mesh, *others = [w.parameter.device_mesh for w in parts]  # type: ignore[attr-defined]
    for w, other_mesh in zip(parts[1:], others, strict=True):
        if other_mesh != mesh:
            raise ValueError(
                f"model must be sharded over one mesh, got {mesh} for {first.name} and {other_mesh} for"
                f" {w.name}"
            )
    for w in parts:
        for m in w.modules:
            _check_module(w.name.removesuffix(m.PARAMETER), m)
    return [mesh.get_group(i) for i in range(mesh.ndim)]


def _check_module(prefix: str, module: QuantizedWeight) -> None:
    """Raise unless a module has its alphas in every process, and multiplies values."""
    for name in ("alpha", "input_alpha"):
        alpha = getattr(module, name, module.alpha)
        if local(alpha) is not alpha:
            raise ValueError(
                f"{prefix}{name} must be whole in every process, got a shard: give fully_shard"
                " ignored_params=fk.learned_alphas(model), or call quantize_model after it"
            )
    if getattr(module, "product", None) is not None:
        raise ValueError(
            f"{prefix[:-1]} must not multiply codes under fully_shard: call set_compute_(model, None)"
        )


def _facts(seed: int, settings: object, weights: Weights) -> Tensor:
    """Returns what FACTS names of this process, int64, on the weights' device; the number of steps is 0.

    All processes have the same values of alphas and of weights that are whole.
    """
    kinds = [(w.name, w.tensor_id, w.parameter.shape, w.parameter.dtype, w.quantizer) for w in weights]
    hashes = [hashlib.sha256(repr(x).encode()).digest()[:8] for x in (settings, kinds)]
    digests = [int.from_bytes(data, "little", signed=True) for data in hashes]
    facts = torch.tensor([signed64(seed), 0, *digests, 0], device=weights[0].parameter.device)
    for w in weights:
        for t in [w.modules[0].alpha.detach()] + [w.latent] * w.placement.is_whole:
            facts[-1] += t.contiguous().view(getattr(torch, f"int{8 * t.itemsize}")).sum(dtype=torch.int64)
    return facts
