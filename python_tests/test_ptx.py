"""The executor of PTX: memory, warps, control. test_ptx_opcodes.py has the arithmetic."""

import numpy as np
import pytest
from ptx.build import executor
from ptx.decode import Kernel
from ptx.fusing import fuse
from ptx.text import Module
from support.ptx_programs import HEADER, PLACES, kernel, lanes, run

LANES = np.arange(32, dtype=np.uint64)
WORDS = LANES * 0x0101010101010101 + 0x8070605040302010


def low(x, bits=32):
    return x & np.uint64((1 << bits) - 1)


# ---- memory


@pytest.mark.parametrize("kind", ["b8", "u8", "s8", "b16", "s16", "b32", "u32", "s32", "f32", "b64", "f64"])
def test_load_and_store_of_a_type(kind):
    size = int(kind[1:]) // 8
    given = np.random.default_rng(1).integers(0, 256, 32 * 8, np.uint8)
    given[7::8] |= 0x80
    body = f"{PLACES}\nld.global.{kind} %x0, [%rd8+{8 - size}];\nst.global.b64 [%rd9], %x0;"
    out = np.zeros(32, np.uint64)
    run(kernel(body), given, out)
    expected = [
        int.from_bytes(given[8 * i + 8 - size : 8 * i + 8], "little", signed=kind[0] == "s") for i in range(32)
    ]
    assert out.tolist() == [x % 2**64 for x in expected]
    narrow = np.full(32 * 8, 99, np.uint8)
    run(kernel(f"{PLACES}\nld.global.b64 %x0, [%rd8];\nst.global.{kind} [%rd9], %x0;"), given, narrow)
    assert (narrow.reshape(32, 8)[:, :size] == given.reshape(32, 8)[:, :size]).all()
    assert (narrow.reshape(32, 8)[:, size:] == 99).all()


@pytest.mark.parametrize(
    ("count", "kind"), [(2, "b8"), (4, "b16"), (2, "f32"), (4, "u32"), (2, "b64"), (8, "b32")]
)
def test_vector_loads_and_stores_keep_their_order(count, kind):
    size = int(kind[1:]) // 8
    names = ", ".join(f"%x{i}" for i in range(count))
    reversed_names = ", ".join(f"%x{i}" for i in reversed(range(count)))
    body = f"""
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd7, %r0, {count * size};
    add.s64 %rd8, %rd0, %rd7;
    add.s64 %rd9, %rd1, %rd7;
    ld.global.v{count}.{kind} {{{names}}}, [%rd8];
    st.global.v{count}.{kind} [%rd9], {{{reversed_names}}};
    """
    store = np.zeros(32 * count * size + 32, np.uint8)  # aligned to the vector
    given = store[-store.ctypes.data % 32 :][: 32 * count * size]
    given[:] = np.random.default_rng(2).integers(0, 256, given.size)
    room = np.zeros(given.size + 32, np.uint8)
    out = room[-room.ctypes.data % 32 :][: given.size]
    run(kernel(body), given, out)
    assert (out.reshape(32, count, size) == given.reshape(32, count, size)[:, ::-1]).all()


def test_static_and_dynamic_shared_memory_lie_apart():
    outside = ".shared .align 8 .b8 first[256];\n.extern .shared .align 16 .b8 rest[];"
    body = f"""{PLACES}
    ld.global.b64 %rd2, [%rd8];
    mov.b32 %r1, first;
    mov.b32 %r2, rest;
    shl.b32 %r3, %r0, 3;
    add.s32 %r4, %r1, %r3;
    add.s32 %r5, %r2, %r3;
    st.shared.b64 [%r4], %rd2;
    st.shared.b64 [%r5], %rd9;
    bar.sync 0;
    xor.b32 %r3, %r3, 8;
    add.s32 %r4, %r1, %r3;
    ld.shared.b64 %rd3, [%r4];
    st.global.b64 [%rd9], %rd3;
    """
    one, out = kernel(body, outside), np.zeros(32, np.uint64)
    given = WORDS.copy()
    memory = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in (given, out))
    one.program.run(1, 32, one.pack([given.ctypes.data, out.ctypes.data]), 256, memory, 0)
    assert (out == given[LANES.astype(int) ^ 1]).all()


def test_constants_and_local_memory_keep_their_values():
    outside = ".const .align 8 .b32 table[4] = {10, 20, 0xFFFFFFFF, 40};"
    body = """
    .local .align 8 .b8 depot[16];
    mov.u64 %rd4, depot;
    st.local.u64 [%rd4+8], %rd2;
    and.b64 %rd5, %rd2, 3;
    shl.b64 %rd5, %rd5, 2;
    mov.u64 %rd6, table;
    add.s64 %rd6, %rd6, %rd5;
    ld.const.u32 %rd10, [%rd6];
    ld.local.u64 %rd11, [%rd4+8];
    add.s64 %rd3, %rd10, %rd11;
    """
    expected = [x + [10, 20, 0xFFFFFFFF, 40][x % 4] for x in range(32)]
    assert lanes(body, LANES, outside).tolist() == expected


def test_parameters_lie_at_their_alignment():
    text = f"""{HEADER}
    .visible .entry k(.param .u32 a, .param .f64 b, .param .align 4 .b8 c[6], .param .u64 out)
    {{ ld.param.u32 %r0, [a]; ld.param.f64 %fd0, [b]; ld.param.u16 %rs0, [c+4]; ld.param.u64 %rd0, [out];
    st.global.u32 [%rd0], %r0; st.global.f64 [%rd0+8], %fd0; st.global.u16 [%rd0+16], %rs0; ret; }}"""
    one, out = Kernel(Module(text), "k"), np.zeros(3, np.uint64)
    data = one.pack([7, 2.5, 0xABCD << 32, out.ctypes.data])
    one.program.run(1, 1, data, 0, [(out.ctypes.data, out.ctypes.data + 24)], 0)
    assert out.tolist() == [7, int(np.float64(2.5).view(np.uint64)), 0xABCD]


def test_additions_in_memory_lose_none():
    body = f"""{PLACES}
    atom.global.gpu.relaxed.add.u64 %rd3, [%rd0], 3;
    red.global.add.u32 [%rd0+8], 2;
    st.global.b64 [%rd9], %rd3;
    """
    given, out = np.array([5, 7], np.uint64), np.zeros(32, np.uint64)
    run(kernel(body), given, out)
    assert given.tolist() == [5 + 96, 7 + 64]
    assert sorted(out.tolist()) == [5 + 3 * i for i in range(32)]


# ---- warps


@pytest.mark.parametrize("segment", [32, 16, 8])
@pytest.mark.parametrize("way", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("distance", [0, 1, 3, 8, 31])
def test_a_shuffle_reads_the_lane_that_the_manual_says(way, distance, segment):
    bounds = (32 - segment) << 8 | (0 if way == "up" else 31)
    found = lanes(
        f"shfl.sync.{way}.b32 %r5|%p1, %rd2, {distance}, {bounds}, 0xffffffff;\n"
        "selp.b32 %r6, 1, 0, %p1;\nmov.b64 %rd3, {%r5, %r6};",
        LANES + 100,
    )
    for lane, x in enumerate(found.tolist()):
        first, last = lane // segment * segment, lane // segment * segment + segment - 1
        source = {
            "up": lane - distance,
            "down": lane + distance,
            "bfly": lane ^ distance,
            "idx": first | (distance & (segment - 1)),
        }[way]
        inside = source >= first if way == "up" else source <= last
        assert (x & 0xFFFFFFFF, x >> 32) == (100 + (source if inside else lane), int(inside)), lane


@pytest.mark.parametrize(
    "how", ["add.s32", "add.u32", "max.s32", "min.s32", "max.u32", "min.u32", "or.b32", "and.b32", "xor.b32"]
)
def test_a_reduction_of_a_warp_gives_every_lane_the_result(how):
    given = low(np.random.default_rng(3).integers(0, 2**64, 32, np.uint64))
    as_type = given.astype(np.uint32).view(np.int32 if how.endswith("s32") else np.uint32).astype(object)
    functions = {"add": sum, "max": max, "min": min, "or": np.bitwise_or.reduce, "and": np.bitwise_and.reduce,
                 "xor": np.bitwise_xor.reduce}  # fmt: skip
    expected = int(functions[how.split(".")[0]](as_type.tolist())) % 2**32
    assert (lanes(f"redux.sync.{how} %rd3, %rd2, 0xffffffff;", given) == expected).all()


def test_a_vote_counts_every_lane():
    body = "setp.gt.u64 %p1, %rd2, 20;\n"
    assert (lanes(body + "vote.sync.ballot.b32 %rd3, %p1, 0xffffffff;", LANES) == 0xFFE00000).all()
    for how, limit, expected in (("any", 30, 1), ("any", 31, 0), ("all", 0, 0)):
        found = lanes(
            f"setp.gt.u64 %p1, %rd2, {limit};\nvote.sync.{how}.pred %p2, %p1, -1;\nselp.b64 %rd3, 1, 0, %p2;",
            LANES,
        )
        assert (found == expected).all()
    found = lanes(
        "setp.ge.u64 %p1, %rd2, 0;\nvote.sync.all.pred %p2, %p1, -1;\nselp.b64 %rd3, 1, 0, %p2;", LANES
    )
    assert (found == 1).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_stored_and_loaded_as_the_manual_says(transposed):
    """stmatrix puts where the manual says, ldmatrix takes it back from there."""
    trans = ".trans" if transposed else ""
    outside = ".shared .align 16 .b8 room[512];"
    body = f"""
    cvt.u32.u64 %r1, %rd2;
    add.s32 %r2, %r1, 0x10000;
    mov.b32 %r9, room;
    mov.u32 %r3, %tid.x;
    shl.b32 %r4, %r3, 4;
    add.s32 %r4, %r4, %r9;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r4], {{%r1, %r2, %r1, %r2}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r5, %r6}}, [%r4];
    bar.warp.sync -1;
    shl.b32 %r7, %r3, 2;
    add.s32 %r7, %r7, %r9;
    ld.shared.b32 %r8, [%r7];
    setp.ne.b32 %p1, %r5, %r1;
    setp.ne.or.b32 %p1, %r6, %r2, %p1;
    @%p1 mov.b32 %r8, -1;
    cvt.u64.u32 %rd3, %r8;
    """
    found = low(lanes(body, LANES * 2 + 0x5000000, outside))  # a lane has halves 2 l and 0x500
    expected = np.empty((8, 8), np.uint64)  # the first matrix, by row
    for lane in range(32):
        for half in (0, 1):
            row, column = lane // 4, 2 * (lane % 4) + half
            value = 0x500 if half else 2 * lane
            expected[(column, row) if transposed else (row, column)] = value
    pairs = expected.reshape(32, 2)
    assert (found == (pairs[:, 0] | pairs[:, 1] << np.uint64(16))).all()


def test_packed_registers_keep_their_order():
    body = """
    mov.b64 {%r1, %r2}, %rd2;
    mov.b32 {%x1, %x2}, %r1;
    mov.b32 %r3, {%x2, %x1};
    mov.b64 {_, %r4}, %rd2;
    mov.b64 %rd3, {%r4, %r3};
    """
    found = lanes(body, WORDS)
    expected = [w >> 32 | (w >> 16 & 0xFFFF) << 32 | (w & 0xFFFF) << 48 for w in WORDS.tolist()]
    assert found.tolist() == expected


# ---- control


@pytest.mark.parametrize("order", [0, 1, 7])
def test_loops_part_and_meet(order):
    """Each thread goes round as often as its number says; then all of a warp take part in a shuffle."""
    body = """
    mov.b64 %rd3, 0;
    mov.b64 %rd4, %rd2;
    $again:
    setp.eq.s64 %p1, %rd4, 0;
    @%p1 bra $done;
    add.s64 %rd3, %rd3, %rd4;
    sub.s64 %rd4, %rd4, 1;
    bra.uni $again;
    $done:
    cvt.u32.u64 %r1, %rd3;
    shfl.sync.idx.b32 %r2, %r1, 31, 31, 0xffffffff;
    cvt.u64.u32 %rd4, %r2;
    add.s64 %rd3, %rd3, %rd4;
    """
    given = np.arange(96, dtype=np.uint64)
    sums = given * (given + 1) // 2
    assert (lanes(body, given, order=order) == sums + sums[given.astype(int) | 31]).all()


def test_predicates_may_be_negated_and_joined():
    body = """
    setp.gt.u64 %p1, %rd2, 3;
    setp.lt.and.u64 %p2, %rd2, 9, %p1;
    setp.eq.or.u64 %p3, %rd2, 20, %p2;
    setp.eq.xor.u64 %p4, %rd2, 5, %p3;
    mov.b64 %rd3, 0;
    @%p4 mov.b64 %rd3, 1;
    @!%p1 mov.b64 %rd3, 2;
    """
    expected = [2 if x <= 3 else int(((3 < x < 9) or x == 20) != (x == 5)) for x in range(32)]
    assert lanes(body, LANES).tolist() == expected


def test_registers_and_labels_belong_to_their_scope():
    """A function's registers and labels are its own, at each call; so are those of a pair of braces."""
    outside = """
    .func (.param .b64 out) twice_and(.param .b64 a, .param .b64 b)
    {
    .reg .b64 %rd<4>;
    .reg .pred %p<2>;
    ld.param.b64 %rd2, [a];
    ld.param.b64 %rd3, [b+0];
    setp.gt.u64 %p1, %rd2, 9;
    @%p1 bra $L1;
    add.s64 %rd2, %rd2, %rd2;
    $L1:
    add.s64 %rd1, %rd2, %rd3;
    st.param.b64 [out], %rd1;
    ret;
    }"""
    outside = "\n".join(line.strip() for line in outside.splitlines())
    call = """
    { .param .b64 param0; .param .b64 param1; .param .b64 retval0;
    st.param.b64 [param0], %rd2; st.param.b64 [param1], {other};
    call.uni (retval0), twice_and, (param0, param1);
    ld.param.b64 {result}, [retval0]; }
    """
    body = call.replace("{other}", "100").replace("{result}", "%rd5") + call.replace("{other}", "%rd5").replace(
        "{result}", "%rd3"
    )
    f = lambda a, b: (a if a > 9 else 2 * a) + b  # noqa: E731
    body += "{ .reg .b64 %rd3; mov.b64 %rd3, 77; }"
    assert lanes(body, LANES, outside).tolist() == [f(x, f(x, 100)) for x in range(32)]


def test_threads_know_their_numbers():
    body = """
    mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %nctaid.x;
    mov.u32 %r4, %laneid; mov.u32 %r5, %tid.y; mov.u32 %r6, %ntid.z;
    mad.lo.s32 %r7, %r1, %r2, %r0;
    mul.wide.u32 %rd2, %r7, 4;
    add.s64 %rd2, %rd2, %rd0;
    mad.lo.s32 %r8, %r3, 1000, %r4;
    mad.lo.s32 %r8, %r6, 100, %r8;
    add.s32 %r8, %r8, %r5;
    st.global.u32 [%rd2], %r8;
    """
    out = np.zeros(3 * 40, np.uint32)
    run(kernel(body, pointers=1), out, blocks=3, threads=40)
    assert out.tolist() == [3100 + i % 32 for _ in range(3) for i in range(40)]


def test_products_are_fused_where_ptx_lets_them_be():
    code = """
    mul.f32 %f1, %a, %b; add.f32 %f2, %f1, %c; sub.f32 %f3, %c, %f1; sub.f32 %f4, %f1, %c;
    mul.rn.f32 %f5, %a, %b; add.f32 %f6, %f5, %c; add.rn.f32 %f7, %f1, %c;
    mul.f32 %a, %a, %b; add.f32 %f8, %a, %c;
    mul.f32 %f9, %b, %b; mul.f32 %f10, %c, %c; add.f32 %f11, %f9, %f10;
    add.f32 %f1, %c, %c; add.f32 %f12, %f1, %c;
    """
    text = f"{HEADER}.visible .entry k()\n{{\n{code}\nret;\n}}\n"
    from ptx.text import statements

    def fused(mode):
        found = list(statements(Module(text).kernel("k")))
        count = fuse(found, mode)
        said = [f"{x.opcode} {' '.join(x.operands)}" for x in found]
        assert count == sum("fma" in x for x in said)
        return [x for x in said if "fma" in x]

    common = ["fma.rn.f32 %f2 %a %b %c"]
    assert fused(0) == []
    assert [x.split("%")[1].strip() for x in fused(1)] == ["f2", "f3", "f4", "f11"]
    assert fused(1)[0] == common[0]
    assert fused(1)[-1] == "fma.rn.f32 %f11 %b %b %f10"
    assert fused(2)[-1] == "fma.rn.f32 %f11 %c %c %f9"


def test_registers_begin_as_poison():
    """A register that nobody wrote is a NaN as a float, and no small number as an integer."""
    found = lanes("mov.b64 %rd3, %rd99;", LANES)
    assert np.isnan(found.view(np.float64)).all()
    assert np.isnan(found.astype(np.uint32).view(np.float32)).all()


def test_instructions_lanes_and_sectors_are_counted():
    body = f"""{PLACES}
    setp.lt.u32 %p1, %r0, 16;
    @%p1 ld.global.b64 %rd2, [%rd8];
    @!%p1 bra $end;
    add.f32 %f1, %f2, %f3;
    $end:
    """
    one = kernel(body)
    given, out = np.zeros(36, np.uint64), np.zeros(32, np.uint64)
    run(one, given[-given.ctypes.data // 8 % 4 :][:32], out)
    rows = {row[0]: row[2:] for row in one.program.counts()}
    assert rows["add.f32"] == (1, 16, 0, 0, 0)
    assert rows["ld.global.b64"] == (1, 16, 1, 4, 128)  # warps, lanes, requests, sectors, bytes
    assert rows["setp.lt.u32"] == (1, 32, 0, 0, 0)
    assert one.program.divergent > 0
    one.program.clear()
    assert not any(row[2] for row in one.program.counts())


def test_parameters_of_another_size_are_refused():
    one = kernel("")
    with pytest.raises(ValueError, match="16 bytes of parameters, got 8"):
        one.program.run(1, 32, bytes(8), 0, [], 0)


def test_every_opcode_that_a_kernel_uses_is_tested():
    """test_ptx_opcodes.py runs each of these; here only that the list is not empty."""
    assert len(executor().opcodes()) > 300
