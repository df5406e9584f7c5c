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


class Squares(nn.Bilinear):
    """A subclass that gives both inputs of its plain class the one that it takes."""

    def forward(self, x):
        return super().forward(x, x)


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
    "transposed_conv1d": Layer(lambda: nn.ConvTranspose1d(4, 6, 3), lambda: torch.randn(2, 4, 7), outputs=1),
    "transposed_conv2d": Layer(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2), lambda: torch.randn(2, 4, 5, 4), outputs=1
    ),
    "transposed_conv3d": Layer(
        lambda: nn.ConvTranspose3d(2, 3, 2, padding=1), lambda: torch.randn(2, 2, 4, 5, 4), outputs=1
    ),
    "bilinear": Layer(lambda: Squares(6, 6, 5), lambda: torch.randn(3, 6)),
    "embedding": Layer(lambda: nn.Embedding(9, 6), lambda: torch.tensor([[0, 2, 8], [1, 1, 4]])),
    "embedding_bag": Layer(lambda: nn.EmbeddingBag(9, 6), lambda: torch.tensor([[0, 2, 8], [1, 1, 4]])),
    "transformers": Layer(lambda: conv1d_of_transformers(5, 6), lambda: torch.randn(3, 6), outputs=1),
}

#: Those whose input can be quantized: others get indices, or two inputs.
WITH_INPUTS = [name for name in LAYERS if name not in ("bilinear", "embedding", "embedding_bag")]


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
