"""Bad calls of the native CPU ops: what is wrong with their lists, and why an op refuses a call."""

import math

import pytest
import torch
from torch import Tensor

from .fuzz_spoil import cut, freed, misaligned
from .samples import SHAPES, native
from .spoiled import item, one, transposed_memory


def listed(value):
    return value if isinstance(value, list) else [value]


def tensors(args):
    """Those that hold all their elements."""
    found = [x for value in args.values() for x in listed(value) if isinstance(x, Tensor)]
    return [t for t in found if t.layout == torch.strided and not t.is_meta and not short(t)]


def short(t):
    return t.untyped_storage().nbytes() < (t.storage_offset() + t.numel()) * t.element_size()


def both(*changes):
    def change(args):
        for one_change in changes:
            args = args | one_change(args)
        return args

    return change


def inside(name, shape, of):
    """Argument ``name`` becomes a view of the second tensor of list ``of``, which holds ones."""

    def change(args):
        own = [args[of][0], torch.ones(SHAPES[1])]
        view = own[1].flatten()[: math.prod(shape)].view(shape)
        return {of: own, name: [args[name][0], view] if isinstance(args[name], list) else view}

    return change


def of_list(name, ops, first=False, before=lambda args: {}):
    """What is wrong with a list, whatever it holds; ``first``: others go with it."""
    rows = [
        (item(name, 0, Tensor.double), "dtype"),
        (item(name, 1, Tensor.half), "dtype"),
        (item(name, 1, transposed_memory), "memory"),
        (item(name, 1, lambda t: t.to("meta")), "memory"),
        (item(name, 1, Tensor.to_sparse), "memory"),
        (item(name, 1, Tensor.to_mkldnn), "memory"),
        (item(name, 1, lambda t: freed(t.clone())), "memory"),
        (item(name, 1, lambda t: cut(t.clone())), "memory"),
        (item(name, 1, misaligned), "memory"),
    ]
    if not first:
        rows += [
            (one(name, lambda v: v[:1]), "length"),
            (one(name, lambda v: [*v, v[-1]]), "length"),
            (item(name, 1, lambda t: t.t().contiguous()), "shape"),
            (item(name, 0, lambda t: t[:2].clone()), "shape"),
        ]
    return [(ops, both(before, change), reason) for change, reason in rows]


def refusal(op, args):
    """Why the op refuses the call; nothing is written. A name that is unknown is the reason itself."""
    kept = tensors(args)
    before = [t.clone() for t in kept]
    with pytest.raises((RuntimeError, ValueError), match=r"^refused: |must (be one of|name) ") as error:
        getattr(native, op)(*args.values())
    for t, old in zip(kept, before, strict=True):
        torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True)
    return str(error.value).removeprefix("refused: ").split(" must ")[0]
