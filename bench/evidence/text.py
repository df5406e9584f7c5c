"""A byte-level language model and its text: LLaMA from a config, by default on Python's own sources."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

BYTES = 256  # the vocabulary
VALIDATION_SHARE = 0.1


class Text(NamedTuple):
    """Bytes, uint8; the last tenth of each file is for validation."""

    train: Tensor
    validation: Tensor


def sources(size: int) -> Text:
    """The modules of the standard library that stand alone in its folder, in the order of their names.

    Args:
        size: bytes at most, of whole files.
    """
    pieces, total = [], 0
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        data = path.read_bytes()
        if total + len(data) <= size:
            pieces.append(data)
            total += len(data)
    if not total:
        raise ValueError(f"size must hold one of Python's sources, got {size} bytes")
    return parted(pieces)


def files(paths: Sequence[Path], size: int) -> Text:
    """Any files, read as bytes.

    Args:
        paths: of them, in their order.
        size: bytes at most, of which the last file may be cut.

    Raises:
        OSError: one cannot be read.
    """
    pieces, left = [], size
    for path in paths:
        with path.open("rb") as file:
            pieces.append(file.read(left))
        left -= len(pieces[-1])
    return parted(pieces)


def parted(pieces: Sequence[bytes]) -> Text:
    """The first nine tenths of each to train on, the rest for validation."""
    cuts = [int(len(data) * (1 - VALIDATION_SHARE)) for data in pieces]
    train = b"".join(data[:cut] for data, cut in zip(pieces, cuts, strict=True))
    validation = b"".join(data[cut:] for data, cut in zip(pieces, cuts, strict=True))
    parts = (bytearray(part) for part in (train, validation))
    none = torch.empty(0, dtype=torch.uint8)  # PyTorch makes no tensor of an empty buffer
    return Text(*(torch.frombuffer(part, dtype=torch.uint8) if part else none for part in parts))


def batch(text: Tensor, rows: int, context: int, generator: torch.Generator) -> Tensor:
    """``rows`` pieces of ``context`` bytes from anywhere, int64."""
    starts = torch.randint(len(text) - context, (rows, 1), generator=generator)
    return text[starts + torch.arange(context)].long()


def generator_of(seed: int, step: int) -> torch.Generator:
    """Of a batch: a function of both. A CPU's generator takes the lowest 32 bits of its seed alone."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)


def llama(hidden: int, layers: int, context: int) -> nn.Module:
    """LlamaForCausalLM over bytes; heads of 64, or one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(hidden // 64, 1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=BYTES,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )
