"""Figures from running the GPU kernels' PTX: what is counted of kernels whose figures are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GPU_BACKENDS, MISSING
from ptx.build import executor
from support.ptx_programs import PLACES, kernel, run

from bench import cases, executed, report
from fogzo_kernels.backends.gpu import plans

ROOT = Path(__file__).parents[1]
WARP, CHUNK = 32, 8  # threads; elements that one takes at once
ELEMENTS = 2**15


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request):
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU that is here, not in the executor")
    if request.param in MISSING:
        pytest.skip(MISSING[request.param])
    return request.param


def row(op, dtypes, backend, aligned=True, scale_length=0):
    noise = "uniform" if cases.OPS[op].noise else "none"
    case = cases.Case(op, dtypes, noise, 1, ELEMENTS, scale_length=scale_length)
    return executed.measured(case, backend, aligned)


# ---- pipes


def test_every_instruction_has_a_pipe():
    known = {opcode: executed.pipe(opcode) for opcode, _ in executor().opcodes()}
    assert len(known) > 300
    expected = {
        "fma.rn.f32": "fma", "mul.f32": "fma", "cvt.f32.f16": "fma", "mul.wide.u32": "imad",
        "mad.lo.s32": "imad", "dp4a.u32.u32": "imad", "xor.b32": "alu", "setp.lt.f32": "alu",
        "min.f32": "alu", "add.s64": "alu", "selp.f64": "alu", "cvt.rn.bf16x2.f32": "alu",
        "cvt.rn.f32.u32": "alu", "lg2.approx.ftz.f32": "xu", "rcp.approx.ftz.f64": "xu",
        "cvt.rni.s32.f32": "xu", "cvt.f64.f32": "xu", "cvt.rni.f32.f32": "xu", "fma.rn.f64": "fp64",
        "setp.lt.f64": "fp64", "neg.f64": "fp64", "sqrt.rn.f32": "division", "div.s32": "division",
        "rem.u64": "division", "cvt.u64.u32": "move", "mov.b32": "move",
    }  # fmt: skip
    assert {opcode: known[opcode] for opcode in expected} == expected
    others = {
        "ld.global.v4.b32": "global", "st.global.u8": "global", "atom.global.add.u64": "global",
        "ld.shared.b64": "shared", "st.shared.v2.b64": "shared", "ld.param.b64": "move", "bra.uni": "branch",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16": "shared", "shfl.sync.bfly.b32": "shuffle",
        "redux.sync.add.s32": "shuffle", "bar.sync": "branch", "ret": "branch",
    }  # fmt: skip
    assert {opcode: executed.pipe(opcode) for opcode in others} == others


@pytest.mark.parametrize("opcode", ["wgmma.mma_async", "tex.2d", "add.f8", "ld.globally.b32"])
def test_an_unknown_instruction_is_named(opcode):
    with pytest.raises(ValueError, match=f"{opcode} is in no pipe"):
        executed.pipe(opcode)


# ---- requests of small kernels


def words():
    """64 of them, from where a sector begins."""
    room = np.zeros(68, np.uint64)
    return room[-room.ctypes.data % executed.SECTOR // 8 :][:64]


def counted(body):
    one = kernel(f"{PLACES}\n{body}")
    run(one, words(), words(), order=1)
    return [executed.Count(*x) for x in one.program.counts()]


@pytest.mark.parametrize(
    ("address", "sectors", "share"),
    [
        ("%rd8", 8, 1.0),  # 8 bytes a thread, one beside the other
        ("%rd8+8", 9, 8 / 9),  # begins within a sector
        ("%wide", 16, 0.5),  # one word left out behind each
    ],
)
def test_a_request_counts_the_sectors_that_it_touches(address, sectors, share):
    body = f"add.s64 %wide, %rd8, %rd7;\nld.global.b64 %rd2, [{address}];\nst.global.b64 [%rd9], %rd2;"
    counts = counted(body)
    expected = {"requests": 1, "sectors_per_request": sectors, "share_used": round(share, 3)}
    assert executed.accesses(counts, "ld") == expected
    assert executed.accesses(counts, "st") == {"requests": 1, "sectors_per_request": 8, "share_used": 1.0}


def test_requests_for_one_value_do_not_count():
    """Of all threads and of one; half a warp asks for elements."""
    counts = counted(
        """
        ld.global.b64 %rd2, [%rd0];
        setp.eq.u32 %p1, %r0, 7;
        @%p1 ld.global.b64 %rd2, [%rd8];
        setp.lt.u32 %p2, %r0, 16;
        @%p2 st.global.b64 [%rd9], %rd2;
        """
    )
    assert sum(x.requests for x in counts if x.opcode == "ld.global.b64") == 2
    assert executed.accesses(counts, "ld") is None
    assert executed.accesses(counts, "st") == {"requests": 1, "sectors_per_request": 4, "share_used": 1.0}


# ---- kernels


@pytest.mark.parametrize(("dtypes", "halves"), [("bf16", 1), ("fp16", 1), ("fp32", 2)])
@pytest.mark.parametrize("scale_length", [0, 128])
def test_a_perturbation_accesses_whole_sectors(gpu_backend, dtypes, halves, scale_length):
    """16 bytes a thread: whole sectors of 2-byte elements, and each half of the sectors of float32."""
    found = row("perturb", dtypes, gpu_backend, scale_length=scale_length)
    chunks = ELEMENTS // CHUNK // WARP
    bytes_per_request = 16 * WARP
    sectors = bytes_per_request // executed.SECTOR * halves
    shares = {"sectors_per_request": sectors, "share_used": 1 / halves}
    assert found["loads"] == {"requests": 2 * chunks * halves, **shares}  # latents and gradients
    assert found["stores"] == {"requests": chunks * halves, **shares}
    assert found["lanes_per_instruction"] > 31.5
    assert found["divergent_segments"] == 0
    assert found["by_pipe"]["global"] >= 3 * halves / CHUNK
    assert sum(found["by_pipe"].values()) == pytest.approx(found["instructions_per_element"], abs=0.01)


def test_a_tensor_that_is_not_aligned_touches_more_sectors(gpu_backend):
    """Each thread takes its chunk element by element, so that each request touches every sector again."""
    aligned, not_aligned = (row("perturb", "bf16", gpu_backend, here) for here in (True, False))
    for kind in ("loads", "stores"):
        assert not_aligned[kind]["requests"] == CHUNK * aligned[kind]["requests"]
        assert not_aligned[kind]["sectors_per_request"] >= aligned[kind]["sectors_per_request"]
        assert not_aligned[kind]["share_used"] == pytest.approx(1 / CHUNK, rel=0.05)
    assert not_aligned["instructions_per_element"] > aligned["instructions_per_element"]


def test_sums_over_threads_are_seen(gpu_backend):
    norm, perturb = (row(op, "bf16", gpu_backend) for op in ("norm", "perturb"))
    assert norm["stores"] is None  # one thread stores a sum
    assert norm["by_pipe"]["shuffle"] > 0
    assert "shuffle" not in perturb["by_pipe"]
    assert 30 < norm["lanes_per_instruction"] < perturb["lanes_per_instruction"]


def test_a_row_is_the_same_again_and_changes_nothing(gpu_backend):
    """Counts of earlier launches are not in it; the plans and the environment are those of before."""
    before = plans.ENOUGH, plans._plans, dict(os.environ)
    assert row("quantize", "int8", gpu_backend) == row("quantize", "int8", gpu_backend)
    assert (plans.ENOUGH, plans._plans, dict(os.environ)) == before


def test_spans_are_those_of_a_large_list(gpu_backend):
    """As many programs as spans of the longest kind: each warp loads its row of the table once."""
    case = cases.Case("perturb", "bf16", "uniform", 1, ELEMENTS)
    counts = [executed.Count(*x) for x in executed.kernel_counts(case, gpu_backend).counts()]
    assert counts[0].warps == ELEMENTS // plans.SPAN * 4  # warps of a program


# ---- the program


def test_the_program_runs_in_a_process_of_its_own(gpu_backend, tmp_path):
    """As a user runs it, with an executor of its own."""
    path = tmp_path / "folder/rows.json"
    command = [
        "-m",
        "bench.executed",
        "--backend",
        gpu_backend,
        "--only",
        "quantize",
        "fp32",
        "--elements",
        "4096",
    ]
    done = subprocess.run(
        [sys.executable, *command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(path.read_text())
    assert [(r["aligned"], r["scale_length"]) for r in found["rows"]] == [(True, 0), (False, 0), (True, 128)]
    lines = done.stdout.splitlines()
    assert lines[0] == executed.HEADINGS
    assert lines[1:] == [executed.line(r) for r in found["rows"]]
    assert found["machine"]["device"].startswith("PTX for sm_")


def test_words_that_name_nothing_are_an_error(monkeypatch):
    monkeypatch.setattr(executed, "install", dict)
    with pytest.raises(SystemExit, match="no row is named perturb fp8"):
        executed.main(["--only", "perturb", "fp8"])


COMMITTED = json.loads((ROOT / report.EXECUTED).read_text())["rows"]


def test_every_op_is_in_the_committed_file():
    keys = "op", "latent", "grad", "out", "scale_length", "backend", "aligned"
    assert [tuple(r[key] for key in keys) for r in COMMITTED] == [
        (case.op, *case.names().values(), case.scale_length, backend, aligned)
        for case, backend, aligned in executed.jobs(executed.BACKENDS, ["uniform"], executed.ELEMENTS)
    ]


def test_what_the_document_says_of_the_rows():
    """docs/performance.md, "As executed" and "Halves of sectors"."""
    assert 28 <= min(r["lanes_per_instruction"] for r in COMMITTED) < 28.5
    assert {r["backend"] for r in COMMITTED if r["divergent_segments"]} == {"cuda"}
    assert not [
        r for r in COMMITTED if r["divergent_segments"] and r["op"] in ("perturb", "perturb_both", "quantize")
    ]
    whole = [r for r in COMMITTED if executed.dtypes_of(r) == {"float32"} and r["aligned"]]
    whole = [r for r in whole if r["loads"]["share_used"] > 0.51]
    assert {(r["op"], r["backend"]) for r in whole} == {("measure", "triton")}
    odd = [r for r in COMMITTED if not r["aligned"] and r["op"] != "measure"]
    assert {round(r[kind]["share_used"], 2) for r in odd for kind in ("loads", "stores") if r[kind]} == {0.12}
