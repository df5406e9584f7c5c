"""noise: u of a parameter or a shard of it, a pure function of names (docs/contract.md, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import check_name, select
from ..spec.call import Draw
from ..spec.noise import DISTRIBUTIONS, MAX_DIRECTION, MAX_ELEMENT, MAX_TENSOR_ID, Layout, check_range
from . import arguments, checks, memory
from .listop import Call, Schema


def noise(
    numel: int,
    distribution: str,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    direction: int = 0,
    tensor_id: int = 0,
    layout: Layout | None = None,
    device: str | torch.device = "cpu",
    backend: str | None = None,
) -> Tensor:
    """Return the noise u of a parameter or of a shard, with mean 0 and variance 1.

    Each element is a pure function of ``seed``, ``step``, ``direction``, ``tensor_id`` and its place in the
    parameter, drawn by Philox4x32-10 (contract, section 2). Backend, number of threads and cut into shards do
    not change it, up to the rounding of the inexact distributions.

    Args:
        numel: number of elements to return.
        distribution: ``"uniform"``, ``"rademacher"``, ``"triangular"``, ``"logistic"`` or ``"gaussian"``.
        seed: seed of the noise: an int in 0..2^64 - 1, or a 0-dim int64 tensor with those bits.
        step: number of the training step, 0..2^32 - 1: an int or a 0-dim int64 tensor.
        direction: number of the direction, 0..2^16 - 1.
        tensor_id: number of the parameter, 0..2^32 - 2.
        layout: for a shard, ``(offset, inner, stride)``: local element j is element ``offset + (j // inner) *
            stride + j % inner`` of the parameter. None: the parameter is whole.
        device: where the result lies.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Returns:
        A float32 tensor of shape (numel,).

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> whole = fk.functional.noise(6, "rademacher", seed=7)
        >>> part = fk.functional.noise(2, "rademacher", seed=7, layout=(4, 2, 2))
        >>> torch.equal(whole[4:], part)
        True
    """
    numel = check_range("numel", numel, MAX_ELEMENT)
    check_distribution(distribution)
    direction = check_range("direction", direction, MAX_DIRECTION)
    tensor_id = check_range("tensor_id", tensor_id, MAX_TENSOR_ID)
    check_name(backend)
    where = (0, max(numel, 1), max(numel, 1)) if layout is None else arguments.layout("layout", layout)
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    names = arguments.scalar("seed", seed), arguments.scalar("step", step), direction, tensor_id
    u: Tensor = op(numel, distribution, *names, list(where), device, backend)
    return u


def check_distribution(name: str) -> None:
    if name not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {name!r}")


def run(call: Call) -> Tensor:
    numel, direction, device = call["numel"], call["direction"], call["device"]
    draw = draw_of(call)
    memory.numbers(draw)
    check_range("direction", direction, MAX_DIRECTION)
    check_range("tensor_id", call["tensor_id"], MAX_TENSOR_ID)
    memory.layout(draw.layouts[0], numel)
    return select(call["backend"], device).noise(numel, draw, direction, device)


def fake(call: Call) -> Tensor:
    draw_of(call)
    return torch.empty(call["numel"], dtype=torch.float32, device=call["device"])


def draw_of(call: Call) -> Draw:
    check_distribution(call["distribution"])
    layout = [tuple(call["layout"])]
    draw = Draw(call["distribution"], call["seed"], call["step"], [call["tensor_id"]], layout)
    checks.host_or(call["device"], seed=draw.seed, step=draw.step)
    return draw


op = Schema(
    "noise(SymInt numel, str distribution, Tensor seed, Tensor step, SymInt direction,"
    " SymInt tensor_id, SymInt[] layout, Device device, str? backend) -> Tensor"
).register(run, fake)
