"""One small module of each type that can be quantized, with an input; for the tests."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

GRID, STE = fk.Grid.half_offset(2), fk.StraightThrough("identity")


def row_mean(weight):
    return weight.abs().mean(1, keepdim=True)


def of_groups(weight):
    """Two groups a row; their largest weights are clipped."""
    return weight.abs().reshape(len(weight), 2, -1).amax(2) / 2


QUANTIZER = fk.Quantizer(GRID, fk.Scale.fixed(row_mean), STE)
#: What may quantize the inputs of a layer.
INPUTS = {
    "none": None,
    "dynamic": fk.presets.dynamic(8),
    "quest": fk.presets.quest(4, block=16),
    "learned": fk.presets.lsq(4),
}


def conv1d_of_transformers(outputs, inputs):
    return pytest.importorskip("transformers.pytorch_utils", reason="transformers is missing").Conv1D(
        outputs, inputs
    )


class Layer(NamedTuple):
    """How to make a plain module, what it takes, and which dimension of its weight counts the outputs."""

    make: Callable[[], nn.Module]
    input: Callable[[], torch.Tensor]
    outputs: int = 0


#: Each weight has rows of an even length, and is not square.
LAYERS = {
    "linear": Layer(lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6)),
    "conv1d": Layer(
        lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), lambda: torch.randn(2, 4, 7)
    ),
    "conv2d": Layer(lambda: nn.Conv2d(4, 6, (3, 2), groups=2), lambda: torch.randn(2, 4, 7, 6)),
    "conv3d": Layer(lambda: nn.Conv3d(2, 3, 2, stride=2), lambda: torch.randn(2, 2, 4, 5, 4)),
    "embedding": Layer(lambda: nn.Embedding(9, 6), lambda: torch.tensor([[0, 2, 8], [1, 1, 4]])),
    "transformers": Layer(lambda: conv1d_of_transformers(5, 6), lambda: torch.randn(3, 6), outputs=1),
}


def rows_of(weight, outputs):
    """The matrix that is quantized, in memory of its own: a row for each output."""
    return weight.detach().movedim(outputs, 0).flatten(1).clone(memory_format=torch.contiguous_format)


def weight_of(rows, like, outputs):
    """The inverse of rows_of."""
    return rows.view(like.movedim(outputs, 0).shape).movedim(0, outputs)


def made(name, quantizer=QUANTIZER, **options):
    """A layer, the same quantized, its input."""
    layer = LAYERS[name]
    plain = layer.make()
    nn.init.normal_(plain.weight)
    model = copy.deepcopy(plain)
    fk.quantize_model(model, quantizer, **options)
    return plain, model, layer.input()


def cells(rows, granularity):
    """(rows, groups, elements), or (1, 1, all)."""
    if granularity == "tensor":
        return rows.reshape(1, 1, -1)
    return rows.reshape(len(rows), 1, -1) if granularity == "row" else rows.reshape(len(rows), -1, granularity)
