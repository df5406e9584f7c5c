"""Processes that train one model together: whose losses are one loss, and whether all train the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.view import WeightView
from ..spec.noise import signed64
from ..train.guards.lost import BITS
from ..train.replay import capturing
from ..train.settings import Settings

REDUCTIONS = ("mean", "sum", None)
EVERY = 100  # steps from one look at what the others have to the next: reading it waits for the device
#: What all processes must have in common, in the order in which it is compared.
FACTS = ("seed", "number of steps taken", "settings", "quantized weights", "values of the weights")
STEPS = FACTS.index("number of steps taken")


class Peers:
    """The processes that share a model, as ``torch.distributed`` has them.

    Args:
        model: whose DistributedDataParallel, if it is or has one, names the group.
        process_group: says which it is otherwise, or None.
        reduction: of losses over it: ``"mean"``, ``"sum"``, or None where this process trains alone.
        groups: of a sharded model, one for each dimension of its mesh.
        alike: whether these have one batch, and so one loss, as under tensor parallelism.

    Raises:
        ValueError: ``reduction`` is another, a group has no use, or it is not known.
    """

    def __init__(
        self, model: nn.Module, process_group: dist.ProcessGroup | None, reduction: str | None,
        groups: Sequence[dist.ProcessGroup], alike: bool,
    ) -> None:  # fmt: skip
        if reduction not in REDUCTIONS:
            raise ValueError(f"loss_reduction must be 'mean', 'sum' or None, got {reduction!r}")
        if reduction is None and process_group is not None:
            raise ValueError("process_group must be None with loss_reduction=None, got a group")
        if reduction is None and groups:
            raise ValueError("loss_reduction must be 'mean' or 'sum' for a sharded model, got None")
        parallel = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self.process_group, self.reduction = process_group, reduction
        self._alike = alike
        self._parallel, self._sharded_over = parallel[0] if parallel else None, list(groups)
        self.due = True  # whether the coming step looks at what the others have
        self._facts: Tensor | None = None  # of this process, from its last look
        _ = self.groups

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Those over all of which losses are one; none for this process alone.

        Raises:
            ValueError: there are several processes, and nothing says which of them train this model.
        """
        if self.reduction is None or not (dist.is_available() and dist.is_initialized()):
            return []
        if self.process_group is not None:
            return [self.process_group]
        if self._sharded_over:
            return self._sharded_over
        if self._parallel is not None:
            return [self._parallel.process_group]
        if dist.get_world_size() == 1:
            return []
        raise ValueError(
            f"process_group must be given with {dist.get_world_size()} processes and a model that is neither"
            " DistributedDataParallel nor sharded: those that train this model, whose losses are one"
            " (torch.distributed.group.WORLD for all); or loss_reduction=None if this process trains it alone"
        )

    def reduce(self, losses: Tensor) -> None:
        """Losses of a step become those of the group, in place."""
        for group in self.groups:
            dist.all_reduce(losses, group=group)
            if self.reduction == "mean" or self._alike:
                losses /= dist.get_world_size(group)

    def agree(self, flags: Tensor) -> None:
        """Of each flag, int32, the greatest of the group, in place."""
        for group in self.groups:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)

    @torch.no_grad()
    def check(self, settings: Settings, steps: int, weights: Sequence[WeightView]) -> None:
        """Compare what processes must have in common; all of a group call it at each step.

        Raises:
            RuntimeError: something differs. It is looked at in the first step of an estimator, in the first
                after it has loaded a state, and in every hundredth.
        """
        groups = self.groups
        if not groups or capturing():
            return
        look = self.due or steps % EVERY == 0
        self.due = False
        device = weights[0].parameter.device
        # kept on the device between looks: to copy them there waits for it
        known = None if look else self._facts
        mine = self._facts = facts_of(settings, weights) if known is None else known.to(device)
        mine[STEPS].fill_(steps)
        found = torch.cat([mine, ~mine])  # the greatest of ~x is that of the least x
        for group in groups:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        if not look:
            return
        most, least = found[: len(FACTS)].tolist(), (~found[len(FACTS) :]).tolist()
        for name, high, low in zip(FACTS, most, least, strict=True):
            if high != low:
                shown = f": {low} to {high}" if name in FACTS[:2] else ""
                raise RuntimeError(
                    f"all processes of a group must have one {name}, got others on some{shown}. This one has"
                    f" {settings}, {steps} steps taken and {len(weights)} quantized weights"
                )


def facts_of(settings: Settings, weights: Sequence[WeightView]) -> Tensor:
    """What FACTS names of this process, int64, on the weights' device; the number of steps is 0."""
    kinds = [(w.name, w.tensor_id, w.parameter.shape, w.parameter.dtype, w.quantizer) for w in weights]
    known = signed64(settings.seed), 0, digest(repr(settings)), digest(repr(kinds)), 0
    facts = torch.tensor(known, device=weights[0].parameter.device)
    for w in weights:
        for t in w.replicated:
            facts[-1] += t.contiguous().view(BITS[t.element_size()]).sum(dtype=torch.int64)
    return facts


def digest(text: str) -> int:
    """Signed 64 bits of a hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
