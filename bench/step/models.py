"""Models of the benchmark: plain ones; quantized is what is linear or a convolution, but the ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evidence import text

SHAPES = ("mlp", "llama", "resnet")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Batches = Sequence[tuple[Tensor, Tensor]]
LossOf = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is trained, and how a step is cut."""

    model: str
    hidden: int  # width; of llama a multiple of 64
    layers: int
    rows: int  # of a step
    context: int  # tokens of a row, of llama
    micro_batches: int
    directions: int
    dtype: str
    device: str
    backend: str | None  # of the ops
    activation_bits: int  # of the inputs of quantized layers; 0: as they are
    compute: str | None  # of linear layers: int8 products, or those of values
    compiled: bool  # the model, by torch.compile


@dataclass
class Task:
    """A model to copy, and its work."""

    model: nn.Module
    loss_of: LossOf
    batches: Batches  # the micro-batches of a step
    skip: list[str]  # names of what is not quantized


def task_of(setting: Setting) -> Task:
    """A new model, the same for each call, and random data."""
    torch.manual_seed(0)
    hidden, layers, rows = setting.hidden, setting.layers, setting.rows
    labels, loss_of = torch.randint(10, (rows,)), of_labels
    if setting.model == "llama":
        labels = inputs = torch.randint(text.BYTES, (rows, setting.context))
        model, loss_of = text.llama(hidden, layers, setting.context), of_tokens
        skip = ["model.embed_tokens", "lm_head"]
    elif setting.model == "mlp":
        inner = (layer for _ in range(layers) for layer in (nn.Linear(hidden, hidden), nn.ReLU()))
        model = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), *inner, nn.Linear(hidden, 10))
        inputs, skip = torch.randn(rows, 64), ["0", str(len(model) - 1)]
    else:
        model, loss_of, skip = resnet(hidden, layers), of_logits, ["resnet.embedder", "classifier"]
        inputs = torch.randn(rows, 3, 32, 32)
    dtype = DTYPES[setting.dtype]
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    pairs = zip(pieces(inputs, setting), pieces(labels, setting), strict=True)
    return Task(model.to(setting.device, dtype), loss_of, list(pairs), skip)


def resnet(hidden: int, layers: int) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    widths = [hidden // 4, hidden // 2, hidden]
    config = ResNetConfig(
        embedding_size=widths[0], hidden_sizes=widths, depths=[layers] * 3, layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


def pieces(whole: Tensor, setting: Setting) -> tuple[Tensor, ...]:
    """The micro-batches."""
    count = setting.micro_batches
    if setting.rows % count:
        raise SystemExit(f"--rows must be a multiple of --micro-batches {count}, got {setting.rows}")
    return whole.to(setting.device).chunk(count)


def of_tokens(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = model(x, labels=y).loss
    return loss


def of_labels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float(), y)


def of_logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).logits.float(), y)
