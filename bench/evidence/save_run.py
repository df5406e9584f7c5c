"""Save the model of a run of the trainer by ``save_pretrained``, for ``python -m fogzo_kernels.export``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import fogzo_kernels.integrations.transformers  # noqa: F401  lets from_pretrained read quantized models
from bench.evidence import processes, record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.save_run", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, as train_lm leaves it")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    args = parser.parse_args(argv)
    read(args.run).save_pretrained(args.out)
    return 0


def read(run: Path) -> Any:
    """The model of the last checkpoint, of one process or many.

    Raises:
        SystemExit: there is none.
    """
    shared = run / processes.CHECKPOINT
    loaded = record.load(run, torch.device("cpu"))
    if loaded is not None:
        state = loaded["model"]
    elif shared.exists():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "state.pt")
            dcp_to_torch_save(shared, path)
            state = torch.load(path, map_location="cpu", weights_only=False)["model"]
    else:
        raise SystemExit(f"RUN must have a checkpoint, as train_lm leaves it, got {run}")
    config = AutoConfig.from_pretrained(run)
    with torch.device("meta"):
        kind: Any = type(AutoModelForCausalLM.from_config(config))
    model: nn.Module = kind.from_pretrained(None, config=config, state_dict=state)
    return model.eval()


if __name__ == "__main__":
    raise SystemExit(main())
