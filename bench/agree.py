"""Compare every op of a backend with the reference on the CPU, on small operands, and say which op differs.

    python -m bench.agree --backend triton --processes 12

The calls run in processes of their own: one that a bad kernel ends is started again behind that call, so that
the others are still compared. On a GPU this also compiles what later stages of ``make gpu`` need.
"""

from __future__ import annotations

import argparse
import faulthandler
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch

from .comparison import REFERENCE, Place, differences
from .lost import LOST, alive, told

PATIENCE = 40  # seconds on a GPU for a call before it counts as one that hangs


# ---- one process


def compared(check, place: Place) -> list[str]:
    """What differs between a place and the reference in a call."""
    found = check.results(place)
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)  # an error shows at its call
    return differences(found, check.results(REFERENCE))


def run_share(args: argparse.Namespace) -> int:
    """Compare every ``of``-th call; a line before each says which, and one after it what differs."""
    from .calls import calls  # which imports the package: an error there is this process's

    torch.set_num_threads(1)
    place = Place(torch.device(args.device), args.backend)
    mine = list(calls(args.subset))[:: args.every][args.share :: args.of]
    for i in range(args.start, len(mine)):
        print(f"begin {i} {mine[i].name}", flush=True)
        if place.device.type == "cuda":
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            lines = compared(mine[i], place)
        except Exception as error:
            print(f"failed: {mine[i].name}: {told(error)}", flush=True)
            if not alive(place.device):
                return LOST
        else:
            print("\n  ".join([f"{'differs' if lines else 'agrees'}: {mine[i].name}", *lines]), flush=True)
        finally:
            faulthandler.cancel_dump_traceback_later()
    return 0


# ---- the processes


def supervised(args: argparse.Namespace, share: int) -> Counter[str]:
    """How many calls of a share agree, differ and failed: in processes, as many as it takes."""
    start, count = 0, Counter[str]()
    while True:
        command = [sys.executable, "-m", *args.through, "bench.agree", "--backend", args.backend, "--device",
                   args.device, "--share", str(share), "--of", str(args.processes), "--start", str(start),
                   "--every", str(args.every), *["--subset"] * args.subset]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        under_way, next_one = "", start
        assert process.stdout is not None
        for line in process.stdout:
            kind, _, rest = line.partition(" ")
            if kind == "begin":
                number, _, under_way = rest.strip().partition(" ")
                next_one = int(number) + 1
            if kind in ("agrees:", "differs:", "failed:"):
                count[kind] += 1
                under_way = ""
            if kind not in ("begin", "agrees:"):
                print(line, end="", flush=True)
        code = process.wait()
        if code and (under_way or next_one == start):  # the package cannot be imported, say
            print(f"failed: {under_way or f'share {share}'}: its process ended with status {code}", flush=True)
            count["failed:"] += 1
        if code == 0 or next_one == start:
            return count
        start = next_one


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where a call differs or failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.agree", description=__doc__)
    add = parser.add_argument
    add("--backend", default="triton")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--subset", action="store_true", help="some 30 kernels, at least one of each op")
    add("--every", type=int, default=1, metavar="N", help="only every N-th of the calls")
    add("--processes", type=int, default=1)
    add("--share", type=int, help="run only this share of the calls, in this process")
    add("--of", type=int, default=1, help="shares")
    add("--start", type=int, default=0, help="at this call of the share")
    add("--through", nargs="*", default=[], help="modules that run this one in each process")
    args = parser.parse_args(argv)
    if args.share is not None:
        return run_share(args)
    with ThreadPoolExecutor(args.processes) as pool:
        found = sum(pool.map(lambda share: supervised(args, share), range(args.processes)), Counter[str]())
    agree, differ, failed = (found[kind] for kind in ("agrees:", "differs:", "failed:"))
    print(f"{agree} calls agree with the reference, {differ} differ, {failed} failed", flush=True)
    return int(differ + failed > 0 or agree == 0)


if __name__ == "__main__":
    sys.exit(main())
