"""Every check that does not depend on the backend; each names argument, expectation and what came.

The functions ``*_arguments`` check what is known without data (shapes, dtypes, devices, lengths)
and also run while a graph is traced. :func:`values` and :func:`memory` look at data and addresses,
and run before anything is written.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .spec.noise import MAX_DIRECTION, MAX_ELEMENT, MAX_STEP, MAX_TENSOR_ID, Layout, check_number, check_range
from .spec.update import UpdateRule

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = (*FLOATS, torch.int8)
DELTA_RANGE = (2.0**-100, 2.0**100)
KEPT = 64  # lists whose checks are remembered: a training loop asks about the same ones at every step

Tensors = Sequence[Tensor]
DTYPE, DEVICE, IS_CPU, NBYTES = map(operator.attrgetter, ("dtype", "device", "is_cpu", "nbytes"))


def shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor_list(
    name: str, tensors: Tensors, dtypes: Sequence[torch.dtype], like: Tensors | None = None
) -> None:
    """A list of contiguous tensors of one dtype and device, of the shapes of ``like``."""
    if like is not None and len(tensors) != len(like):
        raise ValueError(f"{name} must have {len(like)} tensors, got {len(tensors)}")
    first = like[0] if like else tensors[0] if tensors else None
    if first is not None and uniform(tensors, dtypes, first.device, like):
        return
    for i, t in enumerate(tensors):
        what = f"{name}[{i}]"
        if t.dtype not in dtypes:
            raise TypeError(f"{what} must be {names(dtypes)}, got {names([t.dtype])}")
        if t.dtype != tensors[0].dtype:
            raise TypeError(
                f"{what} must have the dtype of {name}[0], {names([tensors[0].dtype])}, got {names([t.dtype])}"
            )
        if first is not None and t.device != first.device:
            raise ValueError(f"{what} must be on {first.device}, got {t.device}")
        if like is not None and t.shape != like[i].shape:
            raise ValueError(f"{what} must have shape {shape(like[i])}, got {shape(t)}")
        if t.layout != torch.strided or not t.is_contiguous():
            raise ValueError(f"{what} must be contiguous, got strides {t.stride()}")


def uniform(
    tensors: Tensors, dtypes: Sequence[torch.dtype], device: torch.device, like: Tensors | None
) -> bool:
    """Whether :func:`tensor_list` has nothing to say; cheap, for lists of thousands."""
    on_cpu = device.type == "cpu"
    try:
        contiguous = all(map(Tensor.is_contiguous, tensors))
    except RuntimeError:  # what is not strided has no such thing
        return False
    return (
        contiguous
        and set(map(DTYPE, tensors)) <= {d for d in dtypes if not tensors or d == tensors[0].dtype}
        and (all(map(IS_CPU, tensors)) if on_cpu else set(map(DEVICE, tensors)) <= {device})
        and (like is None or all(map(Tensor.is_same_size, tensors, like)))
    )


def alpha_list(alphas: Tensors, like: Tensors) -> None:
    """One float32 scale per tensor, row (any leading dims) or group of the last dimension."""
    if len(alphas) != len(like):
        raise ValueError(f"alphas must have {len(like)} tensors, got {len(alphas)}")
    alike = like and uniform(alphas, (torch.float32,), like[0].device, None)
    if alike and (all(n == 1 for n in map(Tensor.numel, alphas)) or all(map(divides, alphas, like))):
        return
    for i, (alpha, t) in enumerate(zip(alphas, like, strict=True)):
        if alpha.dtype != torch.float32:
            raise TypeError(f"alphas[{i}] must be float32, got {names([alpha.dtype])}")
        if alpha.device != t.device:
            raise ValueError(f"alphas[{i}] must be on {t.device}, got {alpha.device}")
        if not alpha.is_contiguous():
            raise ValueError(f"alphas[{i}] must be contiguous, got strides {alpha.stride()}")
        if not divides(alpha, t):
            raise ValueError(
                f"alphas[{i}] must have one element, one per row or one per group of the last"
                f" dimension of shape {shape(t)}, got shape {shape(alpha)}"
            )


def divides(alpha: Tensor, t: Tensor) -> bool:
    scales = alpha.numel()
    if scales == 1 or t.numel() == 0:
        return True
    if scales == 0 or t.numel() % scales:
        return False
    length = t.numel() // scales
    return t.shape[-1] % length == 0 or length in [math.prod(t.shape[k:]) for k in range(t.ndim)]


def scalar_tensor(name: str, t: Tensor, dtype: torch.dtype, device: torch.device | None) -> None:
    """A 0-dim tensor; ``device`` None allows the CPU as well as any device."""
    instance(name, t, Tensor)
    if t.dtype != dtype or t.ndim != 0:
        raise TypeError(f"{name} must be a 0-dim {names([dtype])} tensor, got {names([t.dtype])} {shape(t)}")
    if device is not None and t.device != device:
        raise ValueError(f"{name} must be on {device}, got {t.device}")


def names_of_noise(
    seed: Tensor, step: Tensor, tensor_ids: Sequence[int], layouts: Sequence[int], like: Tensors
) -> None:
    """Seed and step, and one tensor id and layout (three numbers) per tensor."""
    seed_and_step(seed, step, like[0].device if like else None)
    if len(tensor_ids) != len(like):
        raise ValueError(f"tensor_ids must have {len(like)} entries, got {len(tensor_ids)}")
    if len(layouts) != 3 * len(like):
        raise ValueError(f"layouts must have {len(like)} entries, got {len(layouts) / 3:g}")


def seed_and_step(seed: Tensor, step: Tensor, device: torch.device | None) -> None:
    for name, t in (("seed", seed), ("step", step)):
        scalar_tensor(name, t, torch.int64, None if t.device.type == "cpu" else device)


def guide_arguments(grads: Tensors, alphas: Tensors) -> torch.device:
    tensor_list("grads", grads, FLOATS)
    alpha_list(alphas, grads)
    return grads[0].device if grads else torch.device("cpu")


def perturb_arguments(
    plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors,
    norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor,
    tensor_ids: Sequence[int], layouts: Sequence[int],
) -> torch.device:  # fmt: skip
    tensor_list("latents", latents, FLOATS)
    tensor_list("grads", grads, FLOATS, latents)
    if latents and not plus and not minus:
        raise ValueError("plus and minus must not both be None")
    for name, out in (("plus", plus), ("minus", minus)):
        if out:
            tensor_list(name, out, OUTPUTS, latents)
    if plus and minus and plus[0].dtype != minus[0].dtype:
        raise TypeError(
            f"minus must have the dtype of plus, {names([plus[0].dtype])}, got {names([minus[0].dtype])}"
        )
    alpha_list(alphas, latents)
    mixing_arguments(norm, one_minus_beta, latents)
    names_of_noise(seed, step, tensor_ids, layouts, latents)
    return norm.device


def estimate_arguments(
    grads: Tensors, counters: Tensors, losses_plus: Tensor, losses_minus: Tensor,
    alphas: Tensors, norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor,
    tensor_ids: Sequence[int], layouts: Sequence[int],
) -> torch.device:  # fmt: skip
    tensor_list("grads", grads, FLOATS)
    alpha_list(alphas, grads)
    mixing_arguments(norm, one_minus_beta, grads)
    names_of_noise(seed, step, tensor_ids, layouts, grads)
    loss_arguments(losses_plus, losses_minus, norm.device, least=1)
    counter_arguments(counters, norm.device)
    return norm.device


def loss_arguments(plus: Tensor, minus: Tensor, device: torch.device, least: int) -> None:
    for name, t in (("losses_plus", plus), ("losses_minus", minus)):
        instance(name, t, Tensor)
        if t.dtype != torch.float32 or t.ndim != 1 or not t.is_contiguous():
            raise TypeError(
                f"{name} must be a contiguous float32 tensor of shape (n,), got {names([t.dtype])} {shape(t)}"
            )
        if t.device != device:
            raise ValueError(f"{name} must be on {device}, got {t.device}")
    if not least <= plus.shape[0] <= MAX_DIRECTION:
        raise ValueError(f"losses_plus must have {least}..{MAX_DIRECTION} entries, got {plus.shape[0]}")
    if minus.shape != plus.shape:
        raise ValueError(f"losses_minus must have shape {shape(plus)}, got {shape(minus)}")


def counter_arguments(counters: Tensors, device: torch.device) -> None:
    for t in counters:
        instance("counters", t, Tensor)
        if t.dtype != torch.int64 or shape(t) != (3,) or not t.is_contiguous():
            raise TypeError(
                f"counters must be an int64 tensor of shape (3,), got {names([t.dtype])} {shape(t)}"
            )
        if t.device != device:
            raise ValueError(f"counters must be on {device}, got {t.device}")


def update_arguments(
    latents: Tensors, masters: Tensors, states: Mapping[str, Tensors], quantized: Tensors,
    counters: Tensors, grads: Tensors, losses_plus: Tensor, losses_minus: Tensor, alphas: Tensors,
    norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor, tensor_ids: Sequence[int],
    layouts: Sequence[int], rule: UpdateRule, lr: Tensor, optimizer_step: Tensor,
) -> torch.device:  # fmt: skip
    """``states`` holds the rule's lists of state by their argument's name."""
    tensor_list("latents", latents, FLOATS)
    tensor_list("grads", grads, FLOATS, latents)
    if masters:
        tensor_list("masters", masters, (torch.float32,), latents)
        if latents and latents[0].dtype == torch.float32:
            raise TypeError("latents must be bfloat16 or float16 where masters are given, got float32")
    for i, (name, tensors) in enumerate(states.items()):
        if i < rule.states:
            tensor_list(name, tensors, (torch.float32,), latents)
        elif tensors:
            raise ValueError(f"{name} must be None without momentum, got {len(tensors)} tensors")
    if len(alphas) > len(latents):
        raise ValueError(f"alphas must have at most {len(latents)} tensors, got {len(alphas)}")
    quantizing = latents[: len(alphas)]
    if quantized:
        tensor_list("quantized", quantized, OUTPUTS, quantizing)
    alpha_list(alphas, quantizing)
    mixing_arguments(norm, one_minus_beta, latents)
    names_of_noise(seed, step, tensor_ids, layouts, quantizing)
    loss_arguments(losses_plus, losses_minus, norm.device, least=0)
    counter_arguments(counters, norm.device)
    for name, t, dtype in (
        ("lr", lr, torch.float64),
        ("optimizer_step", optimizer_step, torch.int64),
    ):
        scalar_tensor(name, t, dtype, None if t.device.type == "cpu" else norm.device)
    return norm.device


def mixing_arguments(norm: Tensor, one_minus_beta: Tensor, like: Tensors) -> None:
    scalar_tensor("norm", norm, torch.float32, like[0].device if like else None)
    on_host = one_minus_beta.device.type == "cpu"
    scalar_tensor("one_minus_beta", one_minus_beta, torch.float64, None if on_host else norm.device)


def quantize_arguments(out: Tensors | None, latents: Tensors, alphas: Tensors) -> torch.device:
    tensor_list("latents", latents, FLOATS)
    if out is not None:
        tensor_list("out", out, OUTPUTS, latents)
    alpha_list(alphas, latents)
    return latents[0].device if latents else torch.device("cpu")


def straight_through_arguments(grads: Tensors, latents: Tensors, alphas: Tensors) -> torch.device:
    tensor_list("latents", latents, FLOATS)
    tensor_list("grads", grads, FLOATS, latents)
    alpha_list(alphas, latents)
    return latents[0].device if latents else torch.device("cpu")


# ---- what needs data or addresses


def values(alphas: Tensors, r: int, step: Tensor | None = None, one_minus_beta: Tensor | None = None) -> None:
    """Values that can be read without a device sync: those on the CPU."""
    low, high = DELTA_RANGE[0] / r, DELTA_RANGE[1] / r
    if alphas and alphas[0].device.type == "cpu":  # they lie on one device
        flat = set(map(Tensor.dim, alphas)) == {1}
        found = torch.cat(list(alphas if flat else map(Tensor.flatten, alphas)))
        if found.numel() and not in_range(found, low, high):
            i = next(i for i, alpha in enumerate(alphas) if alpha.numel() and not in_range(alpha, low, high))
            least, most = map(float, torch.aminmax(alphas[i]))
            raise ValueError(
                f"alphas[{i}] must be finite, > 0 and in {low:g}..{high:g}, got {least:g}..{most:g}"
            )
    if step is not None and step.device.type == "cpu":
        check_range("step", int(step), MAX_STEP)
    if one_minus_beta is not None and one_minus_beta.device.type == "cpu":
        unit_interval("one_minus_beta", float(one_minus_beta))


def in_range(t: Tensor, low: float, high: float) -> bool:
    least, most = map(float, torch.aminmax(t))
    return low <= least and most <= high  # NaN fails too


def update_values(lr: Tensor, optimizer_step: Tensor) -> None:
    """Likewise: those on the CPU."""
    if lr.device.type == "cpu":
        learning_rate(float(lr))
    if optimizer_step.device.type == "cpu" and int(optimizer_step) < 1:
        raise ValueError(f"optimizer_step must be >= 1, got {int(optimizer_step)}")


def learning_rate(value: float) -> None:
    check_number("lr", value)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"lr must be finite and >= 0, got {value}")


def unit_interval(name: str, value: float) -> None:
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in 0..1, got {value}")


def epsilon_scale(value: float) -> None:
    check_number("epsilon_scale", value)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"epsilon_scale must be finite and >= 0, got {value}")


def numels_of(tensors: Tensors) -> tuple[int, ...]:
    return tuple(map(Tensor.numel, tensors))


def shards(tensor_ids: Sequence[int], layouts: Sequence[Layout], numels: tuple[int, ...]) -> None:
    """Tensor ids and layouts are in range, and no two tensors draw the same noise."""
    check_shards(tuple(tensor_ids), tuple(layouts), numels)


@functools.lru_cache(KEPT)
def check_shards(tensor_ids: tuple[int, ...], layouts: tuple[Layout, ...], numels: tuple[int, ...]) -> None:
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


#: Lists whose sizes are not those of the first tensors.
OTHERS = {"alphas", "counters", "norm", "losses_plus", "losses_minus"}


def memory(outputs: Mapping[str, Tensors], inputs: Mapping[str, Tensors], numels: tuple[int, ...]) -> None:
    """No output may share memory with another output or with an input; all lie on one device.

    ``numels``: of the tensors of every list that goes with the latents, or the first of them.
    """
    lists = [*outputs.items(), *inputs.items()]
    check_memory(
        len(outputs),
        tuple(name for name, _ in lists),
        tuple(tuple(map(Tensor.data_ptr, tensors)) for _, tensors in lists),
        tuple(
            (1, tuple(map(NBYTES, tensors))) if name in OTHERS or not tensors else (tensors[0].itemsize, numels)
            for name, tensors in lists
        ),
    )


@functools.lru_cache(KEPT)
def check_memory(
    written: int, names: tuple[str, ...], addresses: tuple[tuple[int, ...], ...],
    sizes: tuple[tuple[int, tuple[int, ...]], ...],
) -> None:  # fmt: skip
    """The first ``written`` lists are outputs. Sizes are a unit in bytes and numbers of it."""
    spans = sorted(
        (begin, begin + sizes[k][0] * size, k < written, k, i)
        for k in range(len(names))
        for i, (begin, size) in enumerate(zip(addresses[k], sizes[k][1], strict=False))
        if size
    )
    furthest: dict[bool, tuple[int, int, int]] = {}  # output or input -> its end, list and place
    for begin, end, output, k, i in spans:
        for other_output, (other_end, other_k, other_i) in furthest.items():
            if (output or other_output) and begin < other_end:
                pair = f"{names[k]}[{i}]", f"{names[other_k]}[{other_i}]"
                one, two = pair if output else reversed(pair)
                raise ValueError(f"{one} must not share memory with {two}")
        if output not in furthest or end > furthest[output][0]:
            furthest[output] = end, k, i
