"""Checks of what a tensor holds and where it lies, before anything is written."""

from __future__ import annotations

import bisect
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..spec.call import Draw, Mix, Update
from ..spec.noise import MAX_ELEMENT, MAX_STEP, MAX_TENSOR_ID, Layout, check_range
from .checks import KEPT, finite, unit_interval

DELTA_RANGE = (2.0**-100, 2.0**100)

Tensors = Sequence[Tensor]
NBYTES = operator.attrgetter("nbytes")


# ---- values that can be read without waiting for a device: those on the CPU


def numbers(draw: Draw | None = None, mix: Mix | None = None, update: Update | None = None) -> None:
    """Step, one_minus_beta, lr and optimizer_step are in range, those that lie on the CPU."""
    if draw is not None and draw.step.is_cpu:
        check_range("step", int(draw.step), MAX_STEP)
    if mix is not None and mix.one_minus_beta.is_cpu:
        unit_interval("one_minus_beta", float(mix.one_minus_beta))
    if update is None:
        return
    if update.lr.is_cpu:
        finite("lr", float(update.lr))
    if update.optimizer_step.is_cpu and int(update.optimizer_step) < 1:
        raise ValueError(f"optimizer_step must be >= 1, got {int(update.optimizer_step)}")


def alpha_range(r: int) -> tuple[float, float]:
    """Smallest and largest alpha whose delta is in the contract's range (section 5)."""
    return DELTA_RANGE[0] / r, DELTA_RANGE[1] / r


def alphas(alphas: Tensors, r: int) -> None:
    """Alphas are finite and give a delta in range; one on a device is only counted by the kernels."""
    if not alphas or alphas[0].device.type != "cpu":  # they lie on one device
        return
    low, high = alpha_range(r)
    if not in_range(in_a_row(alphas), low, high):
        i = next(i for i, alpha in enumerate(alphas) if not in_range(alpha, low, high))
        least, most = map(float, torch.aminmax(alphas[i]))
        raise ValueError(f"alphas[{i}] must be finite, > 0 and in {low:g}..{high:g}, got {least:g}..{most:g}")


def in_a_row(tensors: Tensors) -> Tensor:
    """The elements of all, of one tensor or more."""
    if all(t.shape == tensors[0].shape for t in tensors):
        return torch.stack([*tensors]).view(-1)
    return torch.cat([*map(Tensor.flatten, tensors)])


def in_range(t: Tensor, low: float, high: float) -> bool:
    """Whether every value is in low..high; NaN is not."""
    if t.numel() == 0:
        return True
    least, most = map(float, torch.aminmax(t))
    return low <= least and most <= high


# ---- which noise


def numels_of(tensors: Tensors) -> tuple[int, ...]:
    return tuple(map(Tensor.numel, tensors))


@functools.lru_cache(KEPT)
def shards(tensor_ids: tuple[int, ...], layouts: tuple[Layout, ...], numels: tuple[int, ...]) -> None:
    """Tensor ids and layouts are in range, and no two tensors draw the same noise."""
    seen: dict[tuple[int, int], int] = {}
    for i, (tensor_id, where, numel) in enumerate(zip(tensor_ids, layouts, numels, strict=True)):
        check_range(f"tensor_ids[{i}]", tensor_id, MAX_TENSOR_ID)
        layout(where, numel, f"layouts[{i}]")
        other = seen.setdefault((tensor_id, where[0]), i) if numel else i
        if other != i:
            raise ValueError(
                f"tensor_ids[{i}] must differ from tensor_ids[{other}] unless the two are shards at"
                f" different offsets, got {tensor_id} at offset {where[0]} for both"
            )


def layout(value: Layout, numel: int, name: str = "layout") -> None:
    """offset >= 0, inner >= 1, stride >= inner where there is a second row, element < 2^51."""
    offset, inner, stride = value
    rows = (numel - 1) // inner if inner >= 1 and numel else 0
    if offset < 0 or inner < 1 or stride < 1 or (rows and stride < inner):
        raise ValueError(f"{name} must be (offset >= 0, inner >= 1, stride >= inner), got {tuple(value)}")
    last = offset + rows * stride + min(inner, max(numel, 1)) - 1
    if last >= MAX_ELEMENT:
        raise ValueError(f"{name} must keep element indices below 2^51, got {last}")


# ---- where they lie


def elsewhere(tensors: Tensors, out: Tensors) -> list[Tensor]:
    """The tensors, but nothing in the place of one that is its own output, which no other output may read."""
    return [
        t.new_empty(0) if t.data_ptr() == o.data_ptr() and t.nbytes == o.nbytes else t
        for t, o in zip(tensors, out, strict=True)
    ]


class Spans:
    """Memory of lists that lie as they must, to look up what else a call takes."""

    def __init__(self, tensors: Iterable[tuple[Tensor, bool]]) -> None:
        """Of each tensor, and whether it is written."""
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.written: list[bool] = []
        for begin, size, written in sorted([(t.data_ptr(), t.nbytes, written) for t, written in tensors]):
            if self.ends and begin < self.ends[-1]:  # both are only read
                self.ends[-1] = max(self.ends[-1], begin + size)
            elif size:
                self.begins.append(begin)
                self.ends.append(begin + size)
                self.written.append(written)

    def check(self, outputs: Tensors, inputs: Tensors) -> None:
        """No output may share memory with these lists, nor an input with what is written of them."""
        for tensors, output in ((outputs, True), (inputs, False)):
            for t in tensors:
                begin, end = t.data_ptr(), t.data_ptr() + t.nbytes
                i = bisect.bisect_right(self.ends, begin)
                while begin < end and i < len(self.ends) and self.begins[i] < end:
                    if output or self.written[i]:
                        raise ValueError("tensors must not share memory with lists that are written")
                    i += 1


#: Lists whose sizes are not those of the first tensors.
OTHERS = {"alphas", "alpha_grads", "counters", "norm", "losses_plus", "losses_minus"}


def overlaps(outputs: Mapping[str, Tensors], inputs: Mapping[str, Tensors], numels: tuple[int, ...]) -> None:
    """No output may share memory with another output or with an input; all lie on one device.

    ``numels``: of the tensors of every list that goes with the latents, or the first of them.
    """
    lists = [*outputs.items(), *inputs.items()]
    check_overlaps(
        len(outputs),
        tuple(name for name, _ in lists),
        tuple(tuple(map(Tensor.data_ptr, tensors)) for _, tensors in lists),
        tuple(
            (1, tuple(map(NBYTES, tensors)))
            if name in OTHERS or not tensors
            else (tensors[0].itemsize, numels[: len(tensors)])
            for name, tensors in lists
        ),
    )


@functools.lru_cache(KEPT)
def check_overlaps(
    written: int,
    names: tuple[str, ...],
    addresses: tuple[tuple[int, ...], ...],
    sizes: tuple[tuple[int, tuple[int, ...]], ...],
) -> None:
    """The first ``written`` lists are outputs. Sizes are a unit in bytes and numbers of it."""
    spans = sorted(
        (begin, begin + sizes[k][0] * size, k < written, k, i)
        for k in range(len(names))
        for i, (begin, size) in enumerate(zip(addresses[k], sizes[k][1], strict=True))
        if size
    )
    furthest: dict[bool, tuple[int, int, int]] = {}  # output or input -> its end, list and place
    for begin, end, output, k, i in spans:
        for other_output, (other_end, other_k, other_i) in furthest.items():
            if (output or other_output) and begin < other_end:
                pair = f"{names[k]}[{i}]", f"{names[other_k]}[{other_i}]"
                first, second = pair if output else reversed(pair)
                raise ValueError(f"{first} must not share memory with {second}")
        if output not in furthest or end > furthest[output][0]:
            furthest[output] = end, k, i
