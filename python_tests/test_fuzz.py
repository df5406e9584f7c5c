"""The native CPU ops under random and bad calls (fuzzing.py), in a process whose crash can be told of."""

import os
import signal
from pathlib import Path

import pytest
from support.processes import run_code

import fogzo_kernels as fk
from fogzo_kernels import _C

EXAMPLES = os.environ.get("FOGZO_FUZZ_EXAMPLES", "120")


def fuzz(log, *arguments, code="from support import fuzzing; fuzzing.main()"):
    """Exit status and output of a process of its own; it imports the package that this one does."""
    paths = [str(Path(fk.__file__).parents[1]), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    return run_code(code, log.parent, "--log", str(log), *arguments)


def reason(status, output, log):
    """Why the process failed, with the call during which it did."""
    ended = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    call = f"{ended}, in the call that python -m support.fuzzing --case repeats:"
    return f"{call}\n{log.read_text()}\n{output[-6000:]}"


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_native_ops_are_right_or_raise(isa, tmp_path):
    if isa not in _C.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    log = tmp_path / "case.json"
    status, output = fuzz(log, "--isa", isa, "--examples", EXAMPLES)
    assert status == 0, reason(status, output, log)
    assert f"\n1 x {EXAMPLES} valid and {EXAMPLES} bad calls" in output


# ---- what the harness must see, planted in the place of a native op

PLANT = """
import torch
from support import fuzzing
class Native:
    def __getattr__(self, op):
        real = getattr(torch.ops.fogzo_cpu, op)
        def call(*args):
            {body}
        call.default = real.default
        return call
fuzzing.native = Native()
fuzzing.main()
"""
PLANTED = {
    "a crash": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, in the call that "),
    "a wrong result": (
        """
            real(*args)
            if op == "noise":
                args[0].neg_()""", "AssertionError: out[0]: "),
    "a write past the end": (
        """
            real(*args)
            if op == "noise":
                storage = args[0].untyped_storage()
                if len(storage) > (args[0].storage_offset() + args[0].numel()) * 4:
                    storage[len(storage) - 1] = 0""", "bytes after buffer 0 were written"),
    "a write to an input": (
        """
            real(*args)
            if op == "guide_sumsq":
                [g.zero_() for g in args[1]]""", "was written"),
    "a valid call refused": ("raise ValueError(op)", "a valid call raised "),
    "a bad call taken": (
        """
            try:
                real(*args)
            except Exception:
                pass""", " was taken"),
    "a write before a refusal": (
        """
            try:
                real(*args)
            except Exception:
                out = args[0]  # where its memory may be written: not that of a storage which is spoiled
                if op == "guide_sumsq" and out.layout == torch.strided and (
                    out.untyped_storage().nbytes() >= (out.storage_offset() + out.numel()) * out.itemsize
                ):
                    out.zero_()
                raise""", "buffer 0 was written"),
}  # fmt: skip


@pytest.mark.parametrize("defect", PLANTED)
def test_the_harness_sees_planted_defects(defect, tmp_path):
    body, message = PLANTED[defect]
    log = tmp_path / "case.json"
    status, output = fuzz(log, "--isa", "portable", "--examples", "100", code=PLANT.format(body=body))
    assert status != 0
    assert message in reason(status, output, log)
    assert '"op": ' in reason(status, output, log)
