"""Small models and layers of every type that can be quantized; for the tests of checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fogzo_kernels as fk

from .layers import Squares

IDENTITY = fk.StraightThrough("identity")


def row_mean(w):
    return 1.5 * w.abs().mean(1, keepdim=True)


def row_max(w):
    """Fits 4 bits."""
    return w.abs().amax(1, keepdim=True) / 7


def group_max(w):
    return w.abs().unflatten(1, (-1, 2)).amax(2) / 7


def quantizer(bits=2, alpha=row_mean, straight_through=IDENTITY):
    return fk.Quantizer(fk.Grid.uniform(bits), fk.Scale.fixed(alpha), straight_through)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def quantized(model, *args, **kwargs):
    fk.quantize_model(model, quantizer(*args, **kwargs))
    return model


class Tied(nn.Module):
    """An embedding whose weight is that of the head, too."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.body = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(F.relu(self.body(self.embedding(x))))


def conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    return pytorch_utils.Conv1D(12, 8)


#: Every type of module that has one weight and can be quantized, with an input.
LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), lambda: torch.randn(2, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 2), lambda: torch.randn(2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (1, 3), groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "channels_last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
                      lambda: torch.randn(2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: torch.randn(2, 4, 3, 3, 3)),
    "transposed_conv1d": (lambda: nn.ConvTranspose1d(4, 6, 2), lambda: torch.randn(2, 4, 5)),
    "transposed_conv2d": (lambda: nn.ConvTranspose2d(4, 6, (1, 3)), lambda: torch.randn(2, 4, 5, 5)),
    "transposed_conv3d": (lambda: nn.ConvTranspose3d(4, 6, 2), lambda: torch.randn(2, 4, 3, 3, 3)),
    "bilinear": (lambda: Squares(4, 4, 6), lambda: torch.randn(2, 4)),
    "embedding": (lambda: nn.Embedding(6, 8), lambda: torch.arange(6)),
    "embedding_bag": (lambda: nn.EmbeddingBag(6, 8), lambda: torch.arange(6).reshape(3, 2)),
    "Conv1D of transformers": (conv1d, lambda: torch.randn(2, 8)),
}  # fmt: skip


def layer_of(name):
    """A function that makes such a layer, with fresh weights, and an input; skip where there is none."""
    make_layer, x = LAYERS[name]
    make_layer()
    return make_layer, x()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [k for k in expected if found[k].dtype != expected[k].dtype] == []
    assert [k for k in expected if not torch.equal(found[k], expected[k])] == []


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}
