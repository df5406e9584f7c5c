"""What the ablation trains: small quantized models of the paper's kinds, and the data that judge them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fogzo_kernels as fk

from ..data import Data, load
from . import text
from .mlp import network

BATCHES = 16  # of a text, in a judgement
ALL = 250  # images at once in a judgement
SKIP_OF_LLAMA = ("model.embed_tokens", "lm_head")
ALPHAS = {"digits": 0.25, "mnist": 0.1}  # of the MLPs' grids
Figures = dict[str, float]


@dataclass(frozen=True)
class Recipe:
    """Settings of AdamW beside its rate; ``clip`` bounds the norm of all gradients, None leaves them."""

    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warm_up: float = 0.1  # share of the steps
    clip: float | None = 1.0


@dataclass(frozen=True)
class Task:
    """A quantized model, its data and its judge.

    Attributes:
        make: a new model; its first weights are drawn from PyTorch's generator.
        batch: of a seed and a step.
        loss: of a model and a batch.
        judge: losses in nats and an accuracy in 0..1, by name. The first decides which rate is the best.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    judge: Callable[[nn.Module], Figures]
    recipe: Recipe = Recipe()


def lsq(make: Callable[[], nn.Module], skip: tuple[str, ...]) -> Callable[[], nn.Module]:
    """The maker of the same models with 2-bit weights and learned scales."""

    def made() -> nn.Module:
        model = make()
        fk.quantize_model(model, fk.presets.lsq(2), skip=list(skip))
        return model

    return made


# ---- a language model over bytes


@cache
def sources(size: int) -> text.Text:
    return text.sources(size)


def llama(
    hidden: int, layers: int, rows: int, context: int, size: int = 4_000_000, of_train: bool = False
) -> Task:
    """On so many bytes of Python's sources; ``of_train`` judges by the training text, then by the other."""

    def batch(seed: int, step: int) -> Tensor:
        return text.batch(sources(size).train, rows, context, text.generator_of(seed, step))

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        found: Tensor = model(tokens, labels=tokens).loss
        return found

    @torch.no_grad()
    def judge(model: nn.Module) -> Figures:
        found = {}
        for name in ("training", "validation") if of_train else ("validation",):
            part = sources(size).train if name == "training" else sources(size).validation
            generator = torch.Generator().manual_seed(0)
            batches = [text.batch(part, 2 * rows, context, generator) for _ in range(BATCHES)]
            found[name] = sum(float(loss(model, tokens)) for tokens in batches) / BATCHES
        return found

    return Task(lsq(lambda: text.llama(hidden, layers, context), SKIP_OF_LLAMA), batch, loss, judge)


# ---- images


@cache
def images(name: str) -> Data:
    return load(name)


def chosen(name: str, rows: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Training images of a batch and their labels."""
    data = images(name)
    found = torch.randint(len(data.train_x), (rows,), generator=text.generator_of(seed, step))
    return data.train_x[found], data.train_y[found]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def of_images(make: Callable[[], nn.Module], skip: tuple[str, ...], rows: int) -> Task:
    """A model of transformers on MNIST, judged by images that it was not trained on."""

    def logits_of(model: nn.Module, flat: Tensor) -> Tensor:
        found: Tensor = model(flat.view(-1, 1, 28, 28)).logits
        return found

    @torch.no_grad()
    def judge(model: nn.Module) -> Figures:
        data = images("mnist")
        logits = torch.cat([logits_of(model, part) for part in data.test_x.split(ALL)])
        validation = float(F.cross_entropy(logits, data.test_y))
        return {"validation": validation, "accuracy": accuracy(logits, data.test_y)}

    return Task(
        lsq(make, skip),
        lambda seed, step: chosen("mnist", rows, seed, step),
        lambda model, batch: F.cross_entropy(logits_of(model, batch[0]), batch[1]),
        judge,
    )


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


def mlp(name: str, grid: fk.Grid, kind: str, clip: bool = False, hidden: int = 10, rows: int = 128) -> Task:
    """The paper's first experiment: every weight is quantized, Adam, judged by all training images at once."""

    def make() -> nn.Module:
        data, alpha = images(name), ALPHAS[name]
        model = network([data.train_x.shape[1], hidden, data.classes], alpha)
        quantizer = fk.Quantizer(grid, fk.Scale.fixed(alpha), fk.StraightThrough(kind, clip=clip))
        fk.quantize_model(model, quantizer)
        return model

    @torch.no_grad()
    def judge(model: nn.Module) -> Figures:
        data = images(name)
        training = float(F.cross_entropy(model(data.train_x), data.train_y))
        return {"training": training, "accuracy": accuracy(model(data.test_x), data.test_y)}

    return Task(
        make,
        lambda seed, step: chosen(name, rows, seed, step),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        judge,
        Recipe(betas=(0.9, 0.999), weight_decay=0.0, warm_up=0.0, clip=None),
    )


UNIFORM, SIGN = fk.Grid.uniform(2), fk.Grid.sign()
TASKS = {
    **{
        f"{name}, {words}": mlp(name, grid, kind, clip)
        for name in ALPHAS
        for words, grid, kind, clip in (
            ("identity", UNIFORM, "identity", False),
            ("clipped", UNIFORM, "identity", True),
            ("hardtanh", SIGN, "hardtanh", False),
            ("approxsign", SIGN, "approxsign", False),
            ("tanh", SIGN, "tanh", False),
        )
    },
    "llama": llama(64, 2, 16, 64),
    "text-long": llama(32, 1, 8, 32, size=30_000, of_train=True),
    "deit": of_images(lambda: deit(64, 3), ("classifier", "deit.embeddings"), 64),
    "resnet": of_images(lambda: resnet((16, 32, 64)), ("classifier", "resnet.embedder"), 64),
}
