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
    """The noise u of a parameter or a shard of it, mean 0 and variance 1 (contract section 2).

    Args:
        numel: elements of the shard.
        distribution: ``uniform``, ``rademacher``, ``triangular``, ``logistic`` or ``gaussian``.
        seed: unsigned 64 bits, or a 0-dim int64 tensor with those bits.
        step: of training, below 2^32; a number or a 0-dim int64 tensor.
        direction: below 2^16.
        tensor_id: of the parameter, below 2^32 - 1.
        layout: ``(offset, inner, stride)``: local element j is element
            ``offset + (j // inner) * stride + j % inner`` of the whole parameter; by default the whole.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Returns:
        float32 tensor of shape (numel,).

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        RuntimeError: the backend is unavailable on the device.
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
