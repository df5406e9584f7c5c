"""Checks of what a tensor holds and where it lies, before anything is written."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..spec.call import Draw, Mix, Update
from ..spec.noise import MAX_ELEMENT, MAX_STEP, MAX_TENSOR_ID, Layout, check_range
from .checks import finite, unit_interval

DELTA_RANGE = (2.0**-100, 2.0**100)
FLOAT32_MAX = torch.finfo(torch.float32).max

Tensors = Sequence[Tensor]
NBYTES = operator.attrgetter("nbytes")


# ---- values that can be read without waiting for a device: those on the CPU


def numbers(draw: Draw | None = None, mix: Mix | None = None, update: Update | None = None) -> None:
    """Step, one_minus_beta, noise_factors, lr and optimizer_step are in range, those that lie on the CPU."""
    if draw is not None and draw.step.is_cpu:
        check_range("step", int(draw.step), MAX_STEP)
    if mix is not None and mix.one_minus_beta.is_cpu:
        unit_interval("one_minus_beta", float(mix.one_minus_beta))
    factors = None if mix is None else mix.factors
    if factors is not None and factors.is_cpu and not in_range(factors, 0.0, FLOAT32_MAX):
        least, most = map(float, torch.aminmax(factors))
        raise ValueError(f"noise_factors must be finite and >= 0, got {least:g}..{most:g}")
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


def shards(tensor_ids: Sequence[int], layouts: Sequence[Layout], numels: Iterable[int]) -> None:
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
    """Where lists lie, so that each call looks up only tensors that are in no list."""

    def __init__(self, outputs: Mapping[str, Tensors], inputs: Mapping[str, Tensors]) -> None:
        """No output may share memory with another output or with an input; all lie on one device."""
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.written: list[bool] = []
        spans = [
            (begin, begin + size, lists is outputs, (name, i))
            for lists in (outputs, inputs)
            for name, tensors in lists.items()
            for i, (begin, size) in enumerate(
                zip(map(Tensor.data_ptr, tensors), map(NBYTES, tensors), strict=True)
            )
            if size
        ]
        furthest = {True: (0, ("", 0)), False: (0, ("", 0))}  # of outputs and of inputs: end and place
        for begin, end, output, place in sorted(spans, key=operator.itemgetter(0, 1)):
            meets_output = begin < furthest[True][0]
            if meets_output or (output and begin < furthest[False][0]):
                other = furthest[meets_output][1]
                (name, i), (other_name, j) = (place, other) if output else (other, place)
                raise ValueError(f"{name}[{i}] must not share memory with {other_name}[{j}]")
            if end > furthest[output][0]:
                furthest[output] = end, place
            if self.ends and begin < self.ends[-1]:  # both are only read
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.begins.append(begin)
                self.ends.append(end)
                self.written.append(output)

    def check(self, t: Tensor, output: bool) -> None:
        """An output may share memory with none of the lists, an input with none that is written."""
        begin, end = t.data_ptr(), t.data_ptr() + t.nbytes
        i = bisect.bisect_right(self.ends, begin)
        while begin < end and i < len(self.ends) and self.begins[i] < end:
            if output or self.written[i]:
                raise ValueError("tensors must not share memory with what is written")
            i += 1
