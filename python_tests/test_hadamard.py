"""hadamard_ and hadamard on every backend: against the matrix in float64, to the bit against the reference."""

import math
import re
from itertools import product

import pytest
import torch
from conftest import BACKENDS, device_of
from hypothesis import given
from hypothesis import strategies as st
from support.compiling import compiled
from support.hadamard import matrix
from support.spoiled import raises_and_writes_nothing, transposed_memory
from support.tolerances import HALF_ULP, SMALLEST

import fogzo_kernels as fk
from fogzo_kernels import _C
from fogzo_kernels.backends.gpu import plans
from fogzo_kernels.spec.grid import FLOATS
from fogzo_kernels.spec.hadamard import BLOCKS, factor

native = torch.ops.fogzo_cpu
NAN, INF = math.nan, math.inf
HERE = [b for b in BACKENDS if fk.available_backends(device_of(b))[b] is None]


def exact(x, block):
    return (x.double().reshape(-1, block) @ matrix(block)).view(x.shape)


def error(x, block, dtype):
    """k sums in float32, the factor, the product: k + 2 times 2^-24 of the absolute terms; then the dtype."""
    size = (x.double().abs().reshape(-1, block).sum(1, keepdim=True) / math.sqrt(block)).expand(-1, block)
    found = 1.01 * (math.log2(block) + 2) * 2.0**-24 * size.reshape(x.shape)
    return found + HALF_ULP[dtype] * (exact(x, block).abs() + found) + SMALLEST[dtype]


def shapes(block):
    return [(3, 2 * block), (block,), (0, block), (2, 1, 3, block), (1, 5 * block), (0,), (block // 8, block)]


def draw(generator, block, dtype, device="cpu"):
    return [torch.randn(s, generator=generator).to(dtype).to(device) for s in shapes(block)]


def poisoned(tensors, dtype):
    return [torch.full(t.shape, NAN, dtype=dtype, device=t.device) for t in tensors]


def by(backend, tensors, block, dtype):
    """Of tensors on the CPU, by a backend where that is tested."""
    there = [t.to(device_of(backend)) for t in tensors]
    out = poisoned(there, dtype)
    fk.hadamard_(out, there, block=block, backend=backend)
    return [t.cpu() for t in out]


# ---- values


@pytest.mark.parametrize(
    ("block", "dtype", "out_dtype"),
    [*product(BLOCKS, FLOATS[:1], FLOATS[:1]), *list(product([32], FLOATS, FLOATS))[1:]],
    ids=str,
)
def test_the_transform_is_the_product_with_the_matrix(backend, device, block, dtype, out_dtype, generator):
    tensors = draw(generator, block, dtype)
    for x, y in zip(tensors, by(backend, tensors, block, out_dtype), strict=True):
        off = (y.double() - exact(x, block)).abs()
        assert (off <= error(x, block, out_dtype)).all()
    reference = by("reference", tensors, block, out_dtype)
    assert all(map(torch.equal, by(backend, tensors, block, out_dtype), reference))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_order_is_sylvesters(backend, device, block):
    """Of a unit vector, a row of signs; every one of them is exact."""
    rows = [0, *(2**k for k in range(10) if 2**k < block), block - 1]
    y = fk.hadamard(torch.eye(block, device=device)[rows], block=block, backend=backend)
    signs = matrix(block).sign()
    assert torch.equal(y.cpu(), signs[rows].float() * torch.tensor(factor(block), dtype=torch.float32))
    assert torch.equal(signs[:2, :4], torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1]]).double())


@pytest.mark.parametrize("block", BLOCKS)
def test_the_transform_is_its_own_inverse(backend, device, block, generator):
    """To the bit where nothing rounds: integers, and blocks whose factor is a power of 2."""
    x = torch.randint(-9, 10, (3, 2 * block), generator=generator).float().to(device)
    twice = fk.hadamard(fk.hadamard(x, block=block, backend=backend), block=block, backend=backend)
    if math.log2(block) % 2 == 0:
        assert torch.equal(twice, x)
    else:
        assert not torch.equal(fk.hadamard(x, block=block, backend=backend), x)
        torch.testing.assert_close(twice, x, rtol=0, atol=1e-5 * math.sqrt(block))


@pytest.mark.parametrize("block", [16, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_longer_than_a_program_equal_the_reference(backend, device, block, dtype, generator):
    """More than one block of threads, tile and task of each backend, and a last one that is not full."""
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in ((1, 33 * 1024), (5, 4096), (7, 1024))]
    found = by(backend, tensors, block, dtype)
    assert all(map(torch.equal, found, by("reference", tensors, block, dtype)))


def test_threads_change_nothing(generator):
    tensors = draw(generator, 128, torch.float32)
    tensors.append(torch.randn(100, 1024, generator=generator))
    alone = by("cpu", tensors, 128, torch.bfloat16)
    torch.set_num_threads(3)
    assert all(map(torch.equal, alone, by("cpu", tensors, 128, torch.bfloat16)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter, on inf - inf
def test_values_that_are_not_finite_stay_in_their_block(backend, device):
    x = torch.ones(2, 64)
    x[0, 3], x[1, 16], x[1, 40], x[1, 41] = NAN, INF, INF, -INF
    (found,), (wanted,) = (by(b, [x], 16, torch.float16) for b in (backend, "reference"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert found[0, :16].isnan().all()
    assert found[1, 16:32].isinf().all()
    assert found[1, 32:48].isnan().any()
    assert found[0, 16:].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter, on what overflows
def test_large_sums_overflow_and_do_not_wrap(backend, device):
    x = torch.full((1, 16), 3e38)
    (found,) = by(backend, [x], 16, torch.float32)
    assert found[0, 0] == INF
    (found,) = by(backend, [x / 1e34], 16, torch.float16)
    assert found[0, 0] == INF  # 4 * 3e4 is beyond float16


@given(data=st.data())
def test_backends_agree(data):
    """Any list, dtypes, block and place in memory."""
    block = data.draw(st.sampled_from((16, 64, 128, 512)), "block")
    dtype, out_dtype = (data.draw(st.sampled_from(FLOATS), name) for name in ("dtype", "out"))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    tensors = [
        torch.randn(rows * blocks * block + shift, generator=generator).to(dtype)[shift:].view(rows, -1)
        for rows, blocks, shift in data.draw(
            st.lists(
                st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=3
            ),
            "rows, blocks and shifts",
        )
    ]
    results = [by(b, tensors, block, out_dtype) for b in HERE]
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


# ---- memory


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_transform_may_be_in_place(backend, device, dtype, generator):
    """All of a list, or some of it."""
    before = draw(generator, 32, dtype, device)
    wanted = by("reference", [t.cpu() for t in before], 32, dtype)
    tensors = [t.clone() for t in before]
    fk.hadamard_(tensors, tensors, block=32, backend=backend)
    assert all(map(torch.equal, [t.cpu() for t in tensors], wanted))
    tensors = [t.clone() for t in before]
    out = [t if i % 2 else torch.full_like(t, NAN) for i, t in enumerate(tensors)]
    fk.hadamard_(out, tensors, block=32, backend=backend)
    assert all(map(torch.equal, [t.cpu() for t in out], wanted))
    assert all(map(torch.equal, tensors[::2], before[::2]))


@pytest.mark.parametrize("shift", [1, 3, 8])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [(torch.float32, torch.float16), (torch.bfloat16,) * 2], ids=str
)
def test_unaligned_memory_gives_the_same_bits_and_keeps_its_neighbours(
    backend, device, shift, dtype, out_dtype, generator
):
    """At any offset in a storage; the neighbours stay."""
    whole = torch.randn(shift + 3 * 64 + 5, generator=generator).to(dtype).to(device)
    x = whole[shift : shift + 192].view(3, 64)
    memory = torch.full((shift + 2 + 192 + 5,), 7.0, dtype=out_dtype, device=device)
    out = memory[shift + 2 : shift + 194].view(3, 64)
    fk.hadamard_(out, x, block=64, backend=backend)
    assert torch.equal(out.cpu(), by("reference", [x.cpu()], 64, out_dtype)[0])
    assert memory[: shift + 2].eq(7).all()
    assert memory[shift + 194 :].eq(7).all()


def test_an_empty_list_is_no_error(backend):
    assert fk.hadamard_([], [], backend=backend) is None


def test_a_list_takes_one_launch(monkeypatch, generator):
    launches = []
    triton = pytest.importorskip("fogzo_kernels.backends.triton.hadamard")
    monkeypatch.setattr(triton, "launch", lambda kernel, programs, *a, **k: launches.append(programs))
    x = torch.randn(20 * 1024, generator=generator)
    fk.hadamard_([x.clone(), x.clone()], [x, x], backend="triton")
    assert launches == [2 * 20 * 1024 // plans.SHORTEST]


# ---- gradients and graphs


def test_the_gradient_is_the_same_transform(backend, device, generator):
    x, w = (torch.randn(3, 64, generator=generator).to(device) for _ in "ab")
    x.requires_grad_()
    w.requires_grad_()
    y = fk.hadamard(x, block=32, backend=backend)
    (g,) = torch.autograd.grad((y * w).sum(), x, create_graph=True)
    assert torch.equal(g, fk.hadamard(w.detach(), block=32, backend=backend))
    (gg,) = torch.autograd.grad((g * x.detach()).sum(), w)
    assert torch.equal(gg, y.detach())
    (g,) = torch.autograd.grad(fk.hadamard(x, block=32, backend=backend).t().sum(), x)  # of expanded ones
    torch.testing.assert_close(g.cpu().double(), exact(torch.ones(3, 64), 32), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_it_compiles_with_its_gradient(backend, device, dtype, generator):
    w = torch.randn(4, 256, generator=generator).to(dtype).to(device)

    def loss(x):
        return (fk.hadamard(x, backend=backend) * w).sum()

    graph, counter = compiled(loss)
    results = []
    for function in (loss, graph):
        x = w.flip(0).clone().requires_grad_()
        value = function(x)
        value.backward()
        results.append((value.detach(), x.grad))
    assert all(map(torch.equal, *results))
    assert counter.frame_count == 1


def test_it_compiles_in_place(backend, device, generator):
    def twice(tensors):
        fk.hadamard_(tensors, tensors, block=64, backend=backend)
        fk.hadamard_(tensors, tensors, block=64, backend=backend)
        return tensors[0] + 1

    before = torch.randint(-9, 10, (2, 128), generator=generator).float().to(device)
    graph, counter = compiled(twice)
    tensors = [before.clone(), before.flip(0).clone()]
    assert torch.equal(graph(tensors), before + 1)  # its own inverse
    assert torch.equal(tensors[1], before.flip(0))
    assert counter.frame_count == 1


def test_an_exported_program_has_the_transform():
    class Rotated(torch.nn.Module):
        def forward(self, x):
            return fk.hadamard(x, block=16) + 1

    x = torch.randn(3, 32)
    program = torch.export.export(Rotated(), (x,))
    assert "fogzo.hadamard" in str(program.graph)
    assert torch.equal(program.module()(x), Rotated()(x))


# ---- bad calls


def call(shapes=((32,), (3, 64)), block=32, **others):
    """A valid one, but for what is given."""
    tensors = [torch.ones(s) for s in shapes]
    return {"out": poisoned(tensors, torch.float32), "tensors": tensors, "block": block, **others}


MEMORY = torch.ones(7, 64)
DIVIDES = "must have a last dimension that block 32 divides, got shape "
BAD = [
    *((call(block=b), ValueError, f"block must be one of 16, 32, 64, 128, 256, 512, 1024, got {b}")
      for b in (0, -32, 8, 48, 2048)),
    (call(block=32.0), TypeError, "block must be an int, got float"),
    (call(block=True), TypeError, "block must be an int, got bool"),
    (call(((32,), (64, 3))), ValueError, f"tensors[1] {DIVIDES}(64, 3)"),
    (call(((16, 16), (3, 64))), ValueError, f"tensors[0] {DIVIDES}(16, 16)"),
    (call(((32,), ())), ValueError, f"tensors[1] {DIVIDES}()"),
    (call(((32,), (0, 5))), ValueError, f"tensors[1] {DIVIDES}(0, 5)"),
    (call(tensors=[torch.ones(32).double()] * 2), TypeError,
     "tensors[0] must be float32 or bfloat16 or float16, got float64"),
    (call(tensors=[torch.ones(32), torch.ones(3, 64).half()]), TypeError,
     "tensors[1] must have the dtype of tensors[0], float32, got float16"),
    (call(tensors=[torch.ones(32), transposed_memory(torch.ones(3, 64))]), ValueError,
     "tensors[1] must be contiguous, got strides (1, 3)"),
    (call(tensors=[torch.ones(32), torch.ones(3, 64, device="meta")]), ValueError, "tensors[1] must be on cpu"),
    (call(tensors=3), TypeError, "tensors must be a tensor or a list of tensors, got int"),
    (call(out=[torch.ones(32)]), ValueError, "out must have 2 tensors, got 1"),
    (call(out=[torch.ones(32), torch.ones(64, 3)]), ValueError, "out[1] must have shape (3, 64), got (64, 3)"),
    (call(out=[torch.ones(32).char(), torch.ones(3, 64).char()]), TypeError,
     "out[0] must be float32 or bfloat16 or float16, got int8"),
    (call(out=None), TypeError, "out must be a tensor or a list of tensors, got NoneType"),
    # what an output may share memory with: its own tensor, all of it, and nothing else
    (call(((3, 64), (3, 64)), out=[MEMORY[:3], MEMORY[2:5]]), ValueError,
     "out[1] must not share memory with out[0]"),
    (call(tensors=[torch.ones(32), MEMORY[:3]], out=[torch.ones(32), MEMORY[1:4]]), ValueError,
     "out[1] must not share memory with tensors[1]"),
    (call(tensors=[MEMORY[0], MEMORY[1]], out=[MEMORY[1], MEMORY[0]]), ValueError,
     "must not share memory with"),
    (call(tensors=[MEMORY[0], MEMORY[0]], out=[MEMORY[0], MEMORY[1]]), ValueError,
     "out[0] must not share memory with tensors[1]"),
    (call(tensors=[MEMORY[0], MEMORY[1]], out=[MEMORY.flatten()[:32].view(torch.float16), MEMORY[2].half()]),
     ValueError, "out[0] must not share memory with tensors[0]"),
]  # fmt: skip


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
@pytest.mark.parametrize(("args", "exception", "message"), BAD)
def test_a_bad_call_is_named_and_writes_nothing(args, exception, message, chosen):
    raises_and_writes_nothing("hadamard_", args | {"backend": chosen}, exception, re.escape(message))


@pytest.mark.parametrize("args", [args for args, _, _ in BAD])
def test_a_bad_native_call_is_refused_and_writes_nothing(args):
    """The native op refuses them by itself, and writes nothing."""
    lists = [args["out"], args["tensors"]]
    if not all(isinstance(x, list) for x in lists) or type(args["block"]) is not int:
        return  # no such call can be made
    held = [t for t in lists[0] + lists[1] if not t.is_meta]
    before = [t.clone() for t in held]
    with pytest.raises((RuntimeError, ValueError), match=r"^refused: |^block must be one of "):
        native.hadamard(*lists, args["block"])
    for t, old in zip(held, before, strict=True):
        torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "options", "exception", "message"),
    [
        (torch.ones(3, 100), {}, ValueError, "x[0] must have a last dimension that block 128 divides"),
        (torch.ones(128).double(), {}, TypeError, "x[0] must be float32 or bfloat16 or float16, got float64"),
        (torch.ones(64, 32).t(), {"block": 64}, ValueError, "x[0] must be contiguous, got strides"),
        (torch.ones(128), {"block": 100}, ValueError, "block must be one of 16, 32,"),
        (torch.ones(128), {"backend": 3}, TypeError, "backend must be a string or None, got int"),
        ([1.0], {}, TypeError, "x must be a Tensor, got list"),
    ],
)
def test_a_bad_call_of_one_tensor_is_named(x, options, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        fk.hadamard(x, **options)


def test_a_bad_call_does_not_compile():
    graph, _ = compiled(lambda x: fk.hadamard(x, block=16))
    with pytest.raises(
        Exception, match=r"x\[0\] must have a last dimension that block 16 divides, got shape \(3, 8\)"
    ):
        graph(torch.ones(3, 8))


def test_blocks_are_those_of_cpp():
    assert _C.names()["blocks"] == list(BLOCKS)
