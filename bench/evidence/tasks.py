"""What the study of quality trains: small models of the paper's kinds, from configs, and their data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Data, load
from . import text

BATCHES = 16  # of validation
ALL = 250  # images at once in validation


@dataclass(frozen=True)
class Task:
    """A model, its data and how it is judged.

    Attributes:
        make: a new model; its first weights are drawn from PyTorch's generator.
        skip: names of what is not quantized.
        loss: of a step: a function of model, seed and step.
        judge: validation loss in nats, and accuracy in 0..1 or None.
    """

    make: Callable[[], nn.Module]
    skip: tuple[str, ...]
    loss: Callable[[nn.Module, int, int], Tensor]
    judge: Callable[[nn.Module], tuple[float, float | None]]


# ---- a language model over bytes


@cache
def sources() -> text.Text:
    return text.sources(4_000_000)


def llama(hidden: int, layers: int, rows: int, context: int) -> Task:
    def loss(model: nn.Module, seed: int, step: int) -> Tensor:
        tokens = text.batch(sources().train, rows, context, text.generator_of(seed, step))
        found: Tensor = model(tokens, labels=tokens).loss
        return found

    @torch.no_grad()
    def judge(model: nn.Module) -> tuple[float, None]:
        generator, total = torch.Generator().manual_seed(0), 0.0
        for _ in range(BATCHES):
            tokens = text.batch(sources().validation, 2 * rows, context, generator)
            total += float(model(tokens, labels=tokens).loss)
        return total / BATCHES, None

    skip = ("model.embed_tokens", "lm_head")
    return Task(lambda: text.llama(hidden, layers, context), skip, loss, judge)


# ---- images


@cache
def images() -> Data:
    return load("mnist")


def pixels(flat: Tensor) -> Tensor:
    return flat.view(-1, 1, 28, 28)


def of_images(make: Callable[[], nn.Module], skip: tuple[str, ...], rows: int) -> Task:
    def loss(model: nn.Module, seed: int, step: int) -> Tensor:
        data = images()
        chosen = torch.randint(len(data.train_x), (rows,), generator=text.generator_of(seed, step))
        return F.cross_entropy(model(pixels(data.train_x[chosen])).logits, data.train_y[chosen])

    @torch.no_grad()
    def judge(model: nn.Module) -> tuple[float, float]:
        data = images()
        logits = torch.cat([model(pixels(part)).logits for part in data.test_x.split(ALL)])
        right = (logits.argmax(1) == data.test_y).float().mean()
        return float(F.cross_entropy(logits, data.test_y)), float(right)

    return Task(make, skip, loss, judge)


def deit(hidden: int, layers: int) -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(
        DeiTConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(hidden // 32, 1),
            intermediate_size=2 * hidden,
            image_size=28,
            patch_size=7,
            num_channels=1,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def resnet(widths: tuple[int, ...]) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=widths[0],
            hidden_sizes=list(widths),
            depths=[1] * len(widths),
            layer_type="basic",
            num_labels=10,
        )
    )


TASKS = {
    "llama": llama(64, 2, 16, 64),
    "llama-1m": llama(192, 3, 16, 64),
    "deit": of_images(lambda: deit(64, 3), ("classifier", "deit.embeddings"), 64),
    "resnet": of_images(lambda: resnet((16, 32, 64)), ("classifier", "resnet.embedder"), 64),
}
