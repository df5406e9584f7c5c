"""gguf: a quantized LLaMA as llama.cpp loads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.packing import pack
from ..nn.held import HeldWeight
from ..nn.pretrained import quantized_in
from ..nn.quantized import QuantizedWeight
from ..spec.grid import Grid
from .files import whole
from .integers import check_exact, check_fits, integers_of, range_of, reason_against_held

TOKENIZERS = ("none", "bytes")
F32 = 0  # the file type of a file with several types of matrices


def gguf(
    model: nn.Module, file: str | os.PathLike[str], *, block: str | None = None, tokenizer: str = "none"
) -> None:
    """Write a quantized LLaMA as GGUF, with all other tensors in float32.

    The file keeps the model's values, bit for bit, if the scales are float16 numbers (:func:`freeze_scales_`).
    llama.cpp rounds the inputs of a product to 8 bits, so its logits are near the model's, not equal.

    Args:
        model: a ``LlamaForCausalLM`` of ``transformers`` that :func:`fogzo_kernels.quantize_model` quantized.
        file: path of the file. It is complete or absent; an old file is replaced.
        block: ``"Q1_0"``, ``"Q2_0"``, ``"TQ2_0"``, ``"Q2_K"``, ``"Q4_0"`` or ``"Q8_0"`` for all quantized
            weights. None: for each weight the first of these that holds its grid and divides its groups.
        tokenizer: ``"none"``, or ``"bytes"`` for a vocabulary of 256 bytes.

    Raises:
        TypeError, ValueError: the format cannot hold the model. The message names the module and the reason;
            nothing is written then.
        OSError: the file cannot be written; an old file stays.
        ModuleNotFoundError: ``gguf`` is not installed.

    Example:
        >>> import transformers
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
        >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.0625), skip=torch.nn.Embedding)
        >>> fk.export.gguf(model, "model.gguf")
    """
    import gguf as library

    modules = quantized_in(model, "export")
    config: Any = getattr(model, "config", None)
    for name, m in modules.items():
        check_fits(name, "GGUF", {reason_against_held(m): isinstance(m, HeldWeight)})
    check_model(model, config, block, tokenizer)
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    chosen = {name: block_for(name, m, block) for name, m in modules.items()}
    types = {b.file_type for b in chosen.values()}
    with whole(file) as place:
        writer: Any = library.GGUFWriter(str(place), "llama")
        describe(writer, config, tokenizer, types.pop() if len(types) == 1 else F32, library)
        for key, t in model.state_dict().items():
            name, _, last = key.rpartition(".")
            if last not in ("weight", "bias") or (tied and name == "lm_head"):
                continue
            target = f"{names.get_name(name)}.{last}"
            order = order_of(name, t.shape[0], config)
            if last == "bias" or name not in modules:
                writer.add_tensor(target, t.detach().float().cpu()[order].numpy())
                continue
            rows = encoded(modules[name], chosen[name], order).view(torch.int8).numpy()
            # as int8 the shape is taken as it is given: the library does not know the newest types
            writer.add_tensor(target, rows, tuple(t.shape), chosen[name].number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_model(model: nn.Module, config: Any, block: str | None, tokenizer: str) -> None:
    """Raise unless it is a LLaMA that the format can describe."""
    if getattr(config, "model_type", None) != "llama" or not hasattr(model, "lm_head"):
        raise TypeError(f"model must be a LlamaForCausalLM of transformers, got {type(model).__name__}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"model must have plain rotary positions for GGUF, got {rope}")
    if block is not None and block not in BLOCKS:
        raise ValueError(f"block must be None or one of {', '.join(BLOCKS)}, got {block!r}")
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {tokenizer!r}")
    if tokenizer == "bytes" and config.vocab_size != 256:
        raise ValueError(f"tokenizer must be 'none' unless there are 256 tokens, got {config.vocab_size}")


# ---- blocks: some numbers of a row and one float16 scale d, in the bits of ggml's ggml-quants.c


class Block(NamedTuple):
    """Writes a type of block: ``size`` numbers of ``low..high``."""

    number: int  # of the type in a file
    size: int
    low: int
    high: int
    odd: bool  # whether it holds odd numbers only
    #: Makes bytes, (blocks, bytes), of numbers, int16, (blocks, size), and the bytes of d, (blocks, 2).
    write: Callable[[Tensor, Tensor], list[Tensor]]
    file_type: int  # of a file whose weights all have this type (llama.cpp's ``llama_ftype``)
    mirrored: bool = False  # whether a scale below 0 may stand for -high..-low

    def holds(self, grid: Grid) -> bool:
        """Whether it holds all numbers of a grid."""
        low, high = range_of(grid)
        fits = self.low <= low and high <= self.high
        mirrored = self.mirrored and self.low <= -high and -low <= self.high
        return (fits or mirrored) and (bool(grid.offset) or not self.odd)

    def encode(self, numbers: Tensor, scale: Tensor) -> Tensor:
        """Makes bytes, (rows, bytes), of int16 numbers, (rows, columns), and a float32 scale for each group."""
        rows, columns = numbers.shape
        if numbers.numel() and (numbers.min() < self.low or numbers.max() > self.high):
            numbers, scale = -numbers, -scale
        each = scale.repeat_interleave(columns // scale.shape[1], dim=1)[:, :: self.size]
        d = each.to(torch.float16).reshape(-1, 1).view(torch.uint8)
        return torch.cat(self.write(numbers.reshape(-1, self.size), d), dim=1).view(rows, -1)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.to(torch.uint8)


def _q2_k(numbers: Tensor, d: Tensor) -> list[Tensor]:
    """Values are d (2 q - 3): all sixteen sub-blocks have scale 2 and minimum 3, both in units of d."""
    scales = torch.full((len(numbers), 16), 3 << 4 | 2, dtype=torch.uint8)
    return [scales, pack(_bytes((numbers + 3) // 2), 2, apart=32), d, d]


#: By name, the smallest first. Values are d times the numbers.
BLOCKS = {
    "Q1_0": Block(41, 128, -1, 1, True, lambda n, d: [d, pack(_bytes(n > 0), 1)], 40),
    "Q2_0": Block(42, 64, -1, 2, False, lambda n, d: [d, pack(_bytes(n + 1), 2)], 41, mirrored=True),
    "TQ2_0": Block(35, 256, -1, 2, False, lambda n, d: [pack(_bytes(n + 1), 2, 32), d], 37, mirrored=True),
    "Q2_K": Block(10, 256, -3, 3, True, _q2_k, 10),
    "Q4_0": Block(2, 32, -8, 7, False, lambda n, d: [d, pack(_bytes(n + 8), 4, 16)], 2, mirrored=True),
    "Q8_0": Block(8, 32, -128, 127, False, lambda n, d: [d, n.to(torch.int8).view(torch.uint8)], 7),
}


def block_for(name: str, module: QuantizedWeight, asked: str | None) -> Block:
    """Chooses the block that a weight is written in, or raises if none holds it."""
    grid, transform = module.quantizer.grid, module.quantizer.transform
    if transform is not None or module.activation is not None:
        what = transform or "a quantized input"
        raise ValueError(f"{name} must have neither transform nor quantized inputs for GGUF, got {what}")
    numbers, scale = integers_of(module)
    check_exact(name, scale, torch.float16)
    group = numbers.shape[1] // scale.shape[1]
    fitting = [key for key, block in BLOCKS.items() if block.holds(grid) and group % block.size == 0]
    if not fitting or (asked is not None and asked not in fitting):
        sizes = ", ".join(f"{key} of {block.size}" for key, block in BLOCKS.items())
        raise ValueError(
            f"{name} must fit a block of GGUF{'' if asked is None else ' ' + asked}, got {grid} with groups of"
            f" {group}: blocks that hold the grid must divide a group ({sizes}), got"
            f" {', '.join(fitting) or 'none'} that would"
        )
    return BLOCKS[asked or fitting[0]]


def encoded(module: QuantizedWeight, block: Block, order: Tensor) -> Tensor:
    """Makes rows of blocks, in the order of the file."""
    numbers, scale = integers_of(module)
    return block.encode(numbers[order], scale.expand(len(order), -1)[order])


def order_of(name: str, rows: int, config: Any) -> Tensor:
    """Orders rows as llama.cpp wants them: of q and k, transformers' halves of a head become pairs."""
    order = torch.arange(rows)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.rpartition(".")[2])
    return order if count is None else order.view(count, 2, -1).transpose(1, 2).flatten()


def describe(writer: Any, config: Any, tokenizer: str, file_type: int, library: Any) -> None:
    """Write what stands in the file beside its tensors."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_file_type(file_type)
    if tokenizer == "none":
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<0x{i:02X}>".encode() for i in range(256)])  # a token's number is its byte
    writer.add_token_scores([0.0] * 256)
    writer.add_token_types([library.TokenType.BYTE] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
