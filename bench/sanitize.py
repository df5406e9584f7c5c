"""Run the calls of ``bench.calls`` for a memory checker to watch.

    compute-sanitizer --tool memcheck python -m bench.sanitize --subset

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1, or PyTorch's cache hides what lies beyond an operand.
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch

from .calls import calls
from .comparison import Place


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--subset", action="store_true", help="some 30 kernels, at least one of each op")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th of the calls")
    args = parser.parse_args(argv)
    place, count = Place(torch.device(args.device), args.backend), 0
    for call in islice(calls(args.subset), 0, None, args.every):
        call.results(place)
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)  # an error shows at its call
        count += 1
        print(call.name, flush=True)
    print(f"{count} calls finished")


if __name__ == "__main__":
    main()
