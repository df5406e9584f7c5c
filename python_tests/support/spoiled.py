"""Changes that make a valid call bad, and the check that a bad call raises and writes nothing."""

import pytest
import torch

import fogzo_kernels as fk

from .samples import prepared, tensors


def raises_and_writes_nothing(op, args, exception, message):
    """With plain lists, and with prepared ones where they can be made of what is wrong."""
    before = [t.clone() for t in tensors(args)]
    with pytest.raises(exception, match=message):
        getattr(fk, op)(**args)
    with pytest.raises(exception, match=message):
        getattr(fk, op)(**prepared(args))
    for t, old in zip(tensors(args), before, strict=True):
        torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True)


def put(**values):
    return lambda args: values


def item(name, i, change):
    return lambda args: {name: [change(t) if j == i else t for j, t in enumerate(args[name])]}


def one(name, change):
    return lambda args: {name: change(args[name])}


def transposed_memory(t):
    return t.t().contiguous().t()


def joined(a, b):
    """Two arguments whose second tensors lie in one piece of memory, overlapping by one row."""

    def change(args):
        memory = torch.ones(7, 8)
        if a == b:  # within one list: the second tensor begins where the first still goes on
            return {a: [memory.flatten()[:3], memory.flatten()[2:34].view(4, 8)]}
        return {a: [args[a][0], memory[:4]], b: [args[b][0], memory[3:]]}

    return change
