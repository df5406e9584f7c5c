"""Small PTX kernels for the tests of the executor, run on arrays of NumPy."""

import numpy as np
from ptx.decode import Kernel
from ptx.text import Module

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"


def kernel(body: str, outside: str = "", pointers: int = 2) -> Kernel:
    """With ``pointers`` parameters p0, p1, ..., loaded into %rd0, %rd1, ..."""
    parameters = ",\n".join(f".param .u64 p{i}" for i in range(pointers))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(pointers))
    text = f"{HEADER}{outside}\n.visible .entry kernel(\n{parameters}\n)\n{{\n{loads}\n{body}\nret;\n}}\n"
    return Kernel(Module(text), "kernel")


def run(one: Kernel, *arrays: np.ndarray, blocks: int = 1, threads: int = 32, order: int = 0) -> None:
    """Launch it on arrays, which are all that it may touch."""
    memory = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays)
    parameters = one.pack([a.ctypes.data for a in arrays])
    one.program.run(blocks, threads, parameters, 0, memory, order)


#: Where a thread's word lies: %rd8 = %rd0 + 8 tid, %rd9 = %rd1 + 8 tid.
PLACES = """
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd7, %r0, 8;
add.s64 %rd8, %rd0, %rd7;
add.s64 %rd9, %rd1, %rd7;
"""


def lanes(body: str, given: np.ndarray, outside: str = "", order: int = 0) -> np.ndarray:
    """Run ``body`` in each thread, which has its word of ``given`` in %rd2. Returns %rd3 of each thread."""
    one = kernel(f"{PLACES}\nld.global.b64 %rd2, [%rd8];\n{body}\nst.global.b64 [%rd9], %rd3;", outside)
    out = np.full(len(given), 0xDEAD, np.uint64)
    run(one, given.astype(np.uint64), out, threads=len(given), order=order)
    return out


def apply(opcode: str, *columns: np.ndarray) -> np.ndarray:
    """An instruction's result for each row of operands, as it lies in a register of 64 bits."""
    rows, count = len(columns[0]), len(columns)
    given = np.ascontiguousarray(np.stack(columns, 1).astype(np.uint64))
    out = np.zeros(rows, np.uint64)
    loads = "\n".join(f"ld.global.b64 %a{i}, [%rd5+{8 * i}];" for i in range(count))
    operands = ", ".join(f"%a{i}" for i in range(count))
    body = f"""
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r0, %r1, 32, %r0;
    mul.wide.u32 %rd3, %r0, {8 * count};
    add.s64 %rd5, %rd0, %rd3;
    mul.wide.u32 %rd4, %r0, 8;
    add.s64 %rd6, %rd1, %rd4;
    setp.ge.u32 %p0, %r0, {rows};
    @%p0 ret;
    {loads}
    {opcode} %result, {operands};
    st.global.b64 [%rd6], %result;
    """
    run(kernel(body), given, out, blocks=-(-rows // 32))
    return out
