"""Export a trained model of transformers: a folder of ``save_pretrained``, or a run of the trainer."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import compressed_tensors, freeze_scales_, gguf, safetensors
from .blocks import BLOCKS
from .integers import quantized_in

FORMATS = ("gguf", "compressed-tensors", "safetensors")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fogzo_kernels.export", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the model")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", type=Path, required=True, help="file, of compressed-tensors a folder")
    parser.add_argument("--block", choices=list(BLOCKS), help="of GGUF, for all quantized weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tqdm(total=4, unit="stage", desc="reading", disable=None) as bar:
        model = read(args.run)
        before = sum(t.numel() * t.element_size() for t in model.parameters())
        bar.update()
        bar.set_description("freezing scales")
        changed = frozen(model, args.format)
        bar.update()
        bar.set_description("writing")
        write(model, args)
        bar.update()
        bar.set_description("done")
        after = size_of(args.out)
        bar.update()
    print(f"{args.out}: {after / 2**20:.2f} MiB; the model in memory has {before / 2**20:.2f} MiB")
    if changed:
        print(f"{changed:.3%} of the codes changed where scales were rounded to the format's dtype")
    return 0


def read(run: Path) -> nn.Module:
    """The quantized model of a folder.

    Raises:
        SystemExit: there is none.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..integrations import transformers  # noqa: F401  lets from_pretrained read quantized models

    if not (run / "config.json").exists():
        raise SystemExit(f"RUN must have a config.json, as save_pretrained and train_lm leave it, got {run}")
    state = state_of(run)
    if state is None:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(run)
    else:
        config = AutoConfig.from_pretrained(run)
        with torch.device("meta"):
            kind: Any = type(AutoModelForCausalLM.from_config(config))
        model = kind.from_pretrained(None, config=config, state_dict=state)
    return model.eval()


def state_of(run: Path) -> dict[str, Any] | None:
    """The weights of a trainer's last checkpoint, of one process or many; None where there is none."""
    single, shared = run / "checkpoint.pt", run / "checkpoint"
    if single.exists():
        found: dict[str, Any] = torch.load(single, map_location="cpu", weights_only=True)["model"]
        return found
    if not shared.exists():
        return None
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "state.pt")
        dcp_to_torch_save(shared, path)
        found = torch.load(path, map_location="cpu", weights_only=False)["model"]
    return found


def frozen(model: nn.Module, form: str) -> float:
    """Freeze scales in the format's dtype: the share of codes that changed."""
    if form == "safetensors":
        return 0.0
    modules = quantized_in(model).values()
    before = [m.codes() for m in modules]
    freeze_scales_(model, torch.float16 if form == "gguf" else next(iter(modules)).weight.dtype)
    changed = sum(int((m.codes() != codes).sum()) for m, codes in zip(modules, before, strict=True))
    return changed / sum(codes.numel() for codes in before)


def write(model: nn.Module, args: argparse.Namespace) -> None:
    if args.format == "gguf":
        config: Any = model.config
        gguf(model, args.out, block=args.block, tokenizer="bytes" if config.vocab_size == 256 else "none")
    elif args.format == "compressed-tensors":
        compressed_tensors(model, args.out)
    else:
        safetensors(model, args.out)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    raise SystemExit(main())
