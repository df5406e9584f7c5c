"""Export a trained model of transformers, as ``save_pretrained`` wrote it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from ..integrations import transformers  # noqa: F401  lets from_pretrained read quantized models
from ..nn.pretrained import quantized_in
from . import compressed_tensors, freeze_scales_, gguf, safetensors
from .llama import BLOCKS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fogzo_kernels.export", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the model")
    parser.add_argument("--format", required=True, choices=("gguf", "compressed-tensors", "safetensors"))
    parser.add_argument("--out", type=Path, required=True, help="file, of compressed-tensors a folder")
    parser.add_argument("--block", choices=list(BLOCKS), help="of GGUF, for all quantized weights")
    args = parser.parse_args(argv)
    if not (args.run / "config.json").exists():
        raise SystemExit(f"RUN must have a config.json, as save_pretrained leaves it, got {args.run}")
    with tqdm(total=3, unit="stage", desc="reading", disable=None) as bar:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(args.run).eval()
        before = sum(t.numel() * t.element_size() for t in model.parameters())
        bar.update()
        bar.set_description("freezing scales")
        changed = freeze(model, args.format)
        bar.update()
        bar.set_description("writing")
        if args.format == "gguf":
            config: Any = model.config
            gguf(model, args.out, block=args.block, tokenizer="bytes" if config.vocab_size == 256 else "none")
        elif args.format == "compressed-tensors":
            compressed_tensors(model, args.out)
        else:
            safetensors(model, args.out)
        bar.update()
    files = args.out.rglob("*") if args.out.is_dir() else [args.out]
    after = sum(file.stat().st_size for file in files if file.is_file())
    print(f"{args.out}: {after / 2**20:.2f} MiB; the model in memory has {before / 2**20:.2f} MiB")
    if changed:
        print(f"{changed:.3%} of the codes changed where scales were rounded to the format's dtype")
    return 0


def freeze(model: nn.Module, form: str) -> float:
    """Freezes scales in the format's dtype; returns the share of codes that changed."""
    if form == "safetensors":
        return 0.0
    modules = quantized_in(model, "export").values()
    before = [m.codes() for m in modules]
    freeze_scales_(model, torch.float16 if form == "gguf" else next(iter(modules)).latent.dtype)
    changed = sum(int((m.codes() != codes).sum()) for m, codes in zip(modules, before, strict=True))
    return changed / sum(codes.numel() for codes in before)


if __name__ == "__main__":
    raise SystemExit(main())
