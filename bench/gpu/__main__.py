"""python -m bench.gpu"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import bench.gpu

from ..lost import told
from .session import FILES, ROOT, Session
from .stages import STAGES, NoGpuError
from .summary import summary

BUDGET = 540.0
NO_GPU = (
    "make gpu must have a CUDA GPU that PyTorch can use, found none;"
    " python -m bench.gpu --dry-run goes through all of it on the CPU"
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=bench.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--results", type=Path, help="folder, by default bench/results/gpu; of a dry run, a new one")
    add(
        "--budget",
        type=float,
        default=os.environ.get("BUDGET") or BUDGET,
        help="seconds in all, by default the variable BUDGET, or 540",
    )
    add("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    add("--dry-run", action="store_true", help="every stage on the CPU, on small operands")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    folder = args.results
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="fogzo-gpu-")) if args.dry_run else ROOT / "bench/results/gpu"
    results = folder.resolve()
    results.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        (results / file).unlink(missing_ok=True)
    session = Session(results, args.budget, summary, args.dry_run)
    # a signal that this process ignores, as in the background of a shell, every child would ignore, too
    handlers = {
        signal.SIGTERM: lambda *_: sys.exit(128 + signal.SIGTERM),
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        go(session, args.stages)
    except NoGpuError:
        for file in FILES:
            (results / file).unlink(missing_ok=True)
        with suppress(OSError):  # it held something else
            results.rmdir()
        print(NO_GPU, file=sys.stderr)
        return 2
    finally:
        session.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"wrote {results}/summary.md", flush=True)
    return int(any(outcome.state == "failed" for outcome in session.outcomes))


def go(session: Session, names: Sequence[str]) -> None:
    """Stage by stage; an error of this program ends one stage, too, and not the next."""
    for name in names:
        session.under_way = name
        session.write()
        stage = STAGES[name]
        try:
            stage.work(session, min(stage.seconds * session.budget / BUDGET, session.left() - 2))
        except NoGpuError:
            raise
        except Exception as error:
            session.note(name, "failed", note=told(error))
    session.under_way = ""
    session.write()


if __name__ == "__main__":
    sys.exit(main())
