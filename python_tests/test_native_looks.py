"""Native ops that only look at tensors, or count steps, by themselves: random calls, and bad ones refused."""

import math

import pytest
import torch
from support.fuzz_spoil import cut, freed, misaligned
from support.native_calls import refusal
from support.spoiled import item, one, put, transposed_memory

from fogzo_kernels.backends import cpu

native = cpu.native
INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
MASKS = {torch.float32: 2**32 - 1, torch.bfloat16: 2**16 - 1, torch.float16: 2**16 - 1}
SIZES = [(), (0,), (1,), (7, 3), (64,), (33_000,), (2, 40_001)]


def placed(values, shift):
    """A copy that begins ``shift`` elements behind aligned memory and ends before a NaN."""
    memory = torch.full((shift + values.numel() + 1,), math.nan, dtype=values.dtype)
    memory[shift:-1] = values.flatten()
    return memory[shift:-1].view(values.shape)


def random_list(generator, dtype):
    """Tensors of odd sizes and places: some all 0, some with an element that is not finite."""
    found = []
    for i, size in enumerate(SIZES * 2):
        values = torch.randn(size, generator=generator) * (i % 3 > 0)
        if i % 5 == 4 and values.numel():
            values.view(-1)[i % values.numel()] = (math.nan, math.inf, -math.inf)[i % 3]
        found.append(placed(values.to(dtype), i % 4))
    return found


@pytest.mark.parametrize("dtype", [*INTS, torch.float64], ids=str)
def test_inspect_tells_the_bits_of_each_tensor_apart(dtype, generator):
    tensors = random_list(generator, dtype)
    out = torch.full((3, len(tensors)), -1)
    native.inspect(out, tensors)
    for t, (total, some, finite) in zip(tensors, out.t().tolist(), strict=True):
        bits = t.view(INTS.get(dtype, torch.int64)).to(torch.int64)
        wanted = bits if dtype == torch.float64 else bits & MASKS[dtype]
        assert total == wanted.sum().item()
        assert bool(some) == bool(t.nan_to_num(1.0).any())
        assert bool(finite) == bool(t.isfinite().all())


def test_outside_counts_elements_that_are_not_in_their_range(generator):
    tensors = random_list(generator, torch.float32)
    least = [placed(torch.randn(t.shape, generator=generator) - 1, 1) for t in tensors]
    wanted = sum(int((~((t >= low) & (t <= 0.75))).sum()) for t, low in zip(tensors, least, strict=True))
    assert native.outside(tensors, least, 0.75) == wanted
    assert wanted > 0


def test_add_one_counts_every_tensor_once():
    counts = [torch.tensor(i) for i in (0, -1, 2**62)]
    native.add_one(counts)
    assert [c.item() for c in counts] == [1, 0, 2**62 + 1]


def call_of(op):
    """A valid call."""
    tensors = [torch.ones(3), torch.full((4, 8), 2.0)]
    calls = {
        "inspect": {"out": torch.full((3, 2), -1), "tensors": tensors},
        "outside": {"tensors": tensors, "least": [torch.zeros_like(t) for t in tensors], "most": 1.5},
        "add_one": {"counts": [torch.tensor(1), torch.tensor(2)]},
    }
    return calls[op]


MEMORY = [lambda t: freed(t.clone()), lambda t: cut(t.clone()), misaligned, transposed_memory,
          lambda t: t.to("meta"), torch.Tensor.to_sparse]  # fmt: skip
LISTS = [("inspect", "tensors"), ("outside", "tensors"), ("outside", "least")]
BAD = [
    *((op, item(name, 1, change), "memory") for op, name in LISTS for change in MEMORY),
    *((op, item(name, 1, lambda t: t.to(torch.int8)), "dtype") for op, name in LISTS),
    *(("outside", item(name, 1, torch.Tensor.double), "dtype") for name in ("tensors", "least")),
    ("outside", one("least", lambda v: v[:1]), "length"),
    ("outside", item("least", 1, lambda t: t.t().contiguous()), "shape"),
    *(("inspect", put(out=torch.zeros(s, dtype=torch.int64)), "shape") for s in ((3, 3), (2, 2), (6,))),
    ("inspect", put(out=torch.zeros(3, 2)), "dtype"),
    ("add_one", item("counts", 1, torch.Tensor.float), "dtype"),
    ("add_one", item("counts", 1, lambda t: t.view(1)), "shape"),
    ("add_one", item("counts", 1, lambda t: t.to("meta")), "memory"),
]


@pytest.mark.parametrize(("op", "change", "reason"), BAD)
def test_bad_input_is_refused_and_nothing_is_written(op, change, reason):
    native_call = call_of(op)
    assert refusal(op, native_call | change(native_call)) == reason
