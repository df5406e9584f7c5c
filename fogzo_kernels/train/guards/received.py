"""What the gradient pass got: which weights take part in the step, N, and whether the step is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...functional import guide_norm, guide_sumsq
from ...nn.view import WeightView
from ..calls import Together, add_to_gradients
from ..replay import capturing
from ..sharding import Sharding
from .lost import look


class Received(NamedTuple):
    """What a step goes on with."""

    calls: list[Together]  # of the weights that take part
    norm: Tensor | None  # N; None without probes
    lost: bool  # whether the loss, N or a gradient is not finite; False where only the device knows
    unknown: Tensor | None  # in a capture, the same as 0-dim bool on the device
    edited: bool  # whether the gradients of the last step were edited, which its device told later


def received(
    calls: Sequence[Together], weights: Sequence[WeightView], others: Sequence[Tensor], loss: Tensor,
    *, pairs: int, sharding: Sharding, agree: Callable[[Tensor], None], edited: Tensor | None,
) -> Received:  # fmt: skip
    """Make g of dL/dQ, and find what the step goes on with, on all processes of a group alike.

    A weight takes part if its gradient is there and not all 0, whoever wrote it: autograd, or
    DistributedDataParallel where another process used it. In a CUDA graph's capture all that are there do, as
    nobody can look. Else this looks once, which waits for a GPU.

    Args:
        calls: of all weights, as the gradient pass ran them.
        weights: of the model, in the order that all processes have.
        others: the model's parameters beside them.
        loss: of the gradient pass, 0-dim.
        pairs: of probes to come.
        sharding: of the model.
        agree: reduces int32 flags to the greatest of the group, in place.
        edited: 0-dim bool of the last step, or None.

    Raises:
        RuntimeError: no weight has a gradient, and probes are to come.
    """
    there, some, finite, alphas = finished(calls, loss.device)
    sharding.reduce_inputs()
    if pairs and not there:
        raise RuntimeError(
            "the gradient pass must leave a gradient for a quantized weight: is it the model of this Fogzo"
            " that the loss depends on?"
        )
    norm = _norm(there, sharding) if pairs else None
    beside = [p.grad for p in others if p.grad is not None] + [grad for _, grad in alphas]
    finite &= look(beside, loss.device, zeros=False)[1] & loss.isfinite()
    if norm is not None:
        finite &= norm.isfinite()
    if capturing():
        flag = (~finite).int()
        agree(flag)
        add_to_gradients([(w.modules[0].alpha, grad) for w, grad in alphas])
        return Received(there, norm, False, flag.bool(), False)
    no = torch.zeros_like(finite)
    found = dict(zip((w for call in there for w in call.weights), some.unbind(), strict=True))
    flags = torch.stack([*(found.get(w, no) for w in weights), ~finite, no if edited is None else edited]).int()
    agree(flags)
    *part, lost, was_edited = map(bool, flags.tolist())
    taking = {w for w, takes in zip(weights, part, strict=True) if takes}
    if not lost:
        add_to_gradients([(w.modules[0].alpha, grad) for w, grad in alphas if w in taking])
    places = [[i for i, w in enumerate(call.weights) if w in taking] for call in there]
    kept = [call.part(own) for call, own in zip(there, places, strict=True) if own]
    return Received(kept, norm, lost, None, was_edited)


def finished(
    calls: Sequence[Together], device: torch.device
) -> tuple[list[Together], Tensor, Tensor, list[tuple[WeightView, Tensor]]]:
    """Make g of dL/dQ.

    Returns:
        The calls of weights with a gradient; of each of these whether it is not all 0; whether all are finite;
        the gradients of learned alphas, which are not in ``.grad`` yet.
    """
    there = [alike for call in calls for alike in call.guided()]
    some, finite = look([grad for call in there for grad in call.grads], device)
    alphas = []
    for call in there:
        for deferred, alike in call.split(lambda w: w.deferred):
            if deferred:
                alphas += alike.finish_gradients()
    return there, some, finite, alphas


def finish_what_is_there(calls: Sequence[Together], device: torch.device) -> None:
    """After a pass that failed: g of what it ran."""
    there, some, _, alphas = finished(calls, device)
    ran = dict(zip((w for call in there for w in call.weights), some.tolist(), strict=True))
    add_to_gradients([(w.modules[0].alpha, grad) for w, grad in alphas if ran[w]])


def _norm(calls: Sequence[Together], sharding: Sharding) -> Tensor:
    """The norm over all gradients. A gradient of 0 adds nothing."""
    alone = len(calls) == 1 and not sharding.groups
    norm = guide_norm if alone else guide_sumsq
    found = [norm(c.grads, c.alphas, grid=c.kind.grid, backend=c.backend) for c in calls]
    return found[0] if alone else sharding.summed(torch.stack(found).sum()).sqrt().float()
