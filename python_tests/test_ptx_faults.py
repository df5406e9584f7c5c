"""Every fault that the executor of PTX must find, and what it must not know."""

import numpy as np
import pytest
from support.ptx_programs import PLACES, kernel, lanes, run

LANES = np.arange(32, dtype=np.uint64)


# ---- what it does not know


@pytest.mark.parametrize("line", [
    "add.f16 %x1, %x2, %x3;", "add.rz.f32 %f1, %f2, %f3;", "fma.rn.relu.f32 %f1, %f2, %f3, %f4;",
    "ld.global.cs.b32 %r1, [%rd0];", "atom.global.max.u32 %r1, [%rd0], 1;", "bar.sync 1;",
    "bar.red.popc.u32 %r1, 0, %p1;", "vote.sync.uni.pred %p1, %p2, -1;",
    "shfl.sync.bfly.b64 %rd1, %rd2, 1, 31, -1;",
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 %f1, %f2, %f3, %f4;",
    "cvta.shared.u64 %rd1, %rd2;", "setp.lo.u32 %p1, %r1, %r2;", "ld.global.v4.b32 {%r1, %r2}, [%rd0];",
    "redux.sync.fmin.f32 %f1, %f2, -1;",
    "ldmatrix.sync.aligned.m8n16.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r0];", "membar.gl;", "add.s32 %r1, %r2;",
])  # fmt: skip
def test_an_instruction_without_code_is_named(line):
    with pytest.raises(ValueError, match=line.split()[0].replace(".", r"\.").rstrip(";")):
        kernel(line)


def test_a_special_register_without_code_is_named():
    with pytest.raises(ValueError, match="%clock64"):
        lanes("mov.u64 %rd3, %clock64;", LANES)


# ---- what it finds

SHARED = ".shared .align 8 .b8 room[1024];\n"
TO_SHARED = "mov.b32 %r9, room;\nshl.b32 %r1, %r0, 2;\nadd.s32 %r2, %r9, %r1;\n"
LOW_HALF, SHUFFLE = "setp.lt.u32 %p1, %r0, 16;\n", "shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;\n"
FAULTS = {
    "outside of every tensor": ("ld.global.b32 %r3, [%rd0+256];", ""),
    "bytes lies outside": ("st.global.b32 [%rd9+-256], 1;", ""),
    "aligned to its 8": ("ld.global.b64 %rd5, [%rd8+4];", ""),
    "aligned to its 16": ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];", ""),
    "outside of shared": ("st.shared.b32 [1024], 1;", ""),
    "shared memory is not aligned": (TO_SHARED + "st.shared.b32 [%r2+2], 1;", SHARED),
    "that nobody wrote": (TO_SHARED + "ld.shared.b32 %r3, [%r2];", SHARED),
    "constant memory": (
        "mov.u64 %rd5, table;\nst.global.b32 [%rd5], 1;", ".const .align 4 .b32 table[1] = {3};"),
    "race in global": ("st.global.b32 [%rd1], %r0;", ""),
    "race in shared": (
        TO_SHARED + "st.shared.b32 [%r2], 1;\nbar.sync 0;\nst.shared.b32 [%r2], 2;\n"
        "xor.b32 %r2, %r2, 128;\nld.shared.b32 %r3, [%r2];", SHARED),
    "without the others": ("setp.lt.u32 %p1, %r0, 16;\n@%p1 bar.sync 0;", ""),
    "at different barriers": (
        "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $low;\nbar.sync 0;\nbra $end;\n$low:\nbar.sync 0;\n$end:", ""),
    "and 32 have ended": ("setp.lt.u32 %p1, %r0, 32;\n@%p1 ret;\nbar.sync 0;", ""),
    "for others of their warp": (
        f"{LOW_HALF}@%p1 bra $low;\nbar.warp.sync -1;\nbra $end;\n$low:\n{SHUFFLE}$end:", ""),
    "thread that has ended": (f"{LOW_HALF}@%p1 ret;\n{SHUFFLE}", ""),
    "that its mask does not name": ("shfl.sync.bfly.b32 %r3, %r0, 1, 31, 0xffff;", ""),
    "does not take part": (
        "setp.lt.u32 %p1, %r0, 48;\n@%p1 bra $end;\nshfl.sync.bfly.b32 %r3, %r0, 16, 31, 0xffff0000;\n$end:",
        ""),
}  # fmt: skip


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_found(message, order):
    body, outside = FAULTS[message]
    one = kernel(f"{PLACES}\n{body}", outside)
    given, out = np.zeros(64 + 2, np.uint64), np.zeros(64 + 2, np.uint64)
    given, out = (x[x.ctypes.data // 8 % 2 :][:64] for x in (given, out))  # aligned to 16 bytes
    if "256" in body:  # of one tensor, of 32 words
        given, out = given[:32], out[:32]
    with pytest.raises(RuntimeError, match=message):
        run(one, given, out, threads=32 if "256" in body else 64, order=order)


RACES = {
    "two blocks write": "st.global.b32 [%rd1], %r8;",
    "one block reads what another writes": "ld.global.b32 %r3, [%rd1];\nst.global.b32 [%rd1], %r8;",
    "an addition and a load": "red.global.add.u32 [%rd1], 1;\nld.global.b32 %r3, [%rd1];",
}


@pytest.mark.parametrize("name", RACES)
def test_two_blocks_that_race_are_found(name):
    body = f"mov.u32 %r8, %ctaid.x;\nadd.s32 %r8, %r8, 5;\n{RACES[name]}"
    given, out = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    with pytest.raises(RuntimeError, match="race in global memory"):
        run(kernel(body), given, out, blocks=2, threads=1)
    out[:] = 0
    run(kernel(body), given, out, blocks=1, threads=1)  # one thread alone may


def test_what_is_ordered_is_no_race():
    body = f"""{PLACES}
    {TO_SHARED}
    st.shared.b32 [%r2], %r0;
    bar.sync 0;
    xor.b32 %r3, %r2, 128;
    ld.shared.b32 %r4, [%r3];
    bar.sync 0;
    st.shared.b32 [%r3], %r4;
    bar.warp.sync -1;
    xor.b32 %r3, %r3, 4;
    ld.shared.b32 %r5, [%r3];
    cvt.u64.u32 %rd3, %r5;
    st.global.b64 [%rd9], %rd3;
    red.global.add.u64 [%rd0], 1;
    """
    given, out = np.zeros(64, np.uint64), np.zeros(64, np.uint64)
    run(kernel(body, SHARED), given, out, blocks=1, threads=64)
    assert given[0] == 64
    assert out.tolist() == [i ^ 33 for i in range(64)]
