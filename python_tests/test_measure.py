"""Alphas from data, on every backend against float64 (docs/contract.md, sections 4 to 6)."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fogzo_kernels as fk
from fogzo_kernels import _C
from fogzo_kernels.backends import reference
from fogzo_kernels.backends.gpu import cells, plans
from fogzo_kernels.spec.grid import FLOATS
from fogzo_kernels.spec.scale import STATISTICS

NAN, INF = math.nan, math.inf
SPAN = plans.SPAN  # of a program on a GPU; the CPU's blocks are twice as long
TOLERANCE = 1e-6  # relative, of the statistic
#: Shape of a tensor and of its alpha: short and long cells, one element, odd lengths, cells in several pieces.
CASES = (
    ((), ()), ((1,), (1,)), ((3,), ()), ((3,), (3,)), ((40, 16), (40, 1)), ((130, 3), (130,)),
    ((5, 8), (5, 8)), ((4, 6, 32), (4, 6, 8)), ((4, 6, 32), (4, 6, 1)), ((7, 300), (7, 1)), ((7, 300), (7, 60)),
    ((3, 4096), (3,)),
    ((2, 2049), (2,)), ((SPAN,), ()), ((2, SPAN + 8), (2, 1)), ((3, 2 * SPAN + 4), (3, 2)),
    ((4 * SPAN + 12345,), (1,)),
)  # fmt: skip


def measured(backend, alphas, tensors, statistic="rms", **options):
    """Alphas of these shapes, in memory that holds NaN."""
    found = [torch.full(shape, NAN, device=t.device) for shape, t in zip(alphas, tensors, strict=True)]
    fk.measure_alphas_(found, tensors, statistic=statistic, backend=backend, **options)
    return found


def in_float64(t, shape, statistic):
    """The statistic of each cell."""
    x = t.cpu().double().abs().reshape(math.prod(shape), -1)
    found = {
        "absmax": lambda: x.amax(1),
        "absmean": lambda: x.mean(1),
        "rms": lambda: x.square().mean(1).sqrt(),
    }
    return found[statistic]().view(shape)


def near(found, wanted, tolerance):
    """One rounding to float32, of a number that may be denormal, is part of the 1e-6."""
    error = (found.cpu().double() - wanted).abs()
    assert (error <= tolerance * wanted + 2.0**-150).all(), (error / wanted).max()


def check(backend, shapes, tensors, statistic):
    kept = [t.clone() for t in tensors]
    found = measured(backend, shapes, tensors, statistic)
    for one, shape, t, old in zip(found, shapes, tensors, kept, strict=True):
        assert one.shape == torch.Size(shape)
        near(one, in_float64(t, shape, statistic), 0.0 if statistic == "absmax" else TOLERANCE)
        assert torch.equal(t, old)
    return found


def random_tensors(generator, cases, dtype, device, scale=1.0):
    return [(torch.randn(s, generator=generator) * scale).to(dtype).to(device) for s, _ in cases]


# ---- right


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_statistics_are_near_float64(backend, device, dtype, statistic, generator):
    tensors = random_tensors(generator, CASES, dtype, device)
    found = check(backend, [shape for _, shape in CASES], tensors, statistic)
    if statistic == "absmax":
        assert all(
            torch.equal(a.cpu().flatten(), t.cpu().float().abs().reshape(a.numel(), -1).amax(1))
            for a, t in zip(found, tensors, strict=True)
        )


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_statistics_of_unaligned_memory_are_near_float64(backend, device, dtype, statistic, generator):
    """Each tensor begins one element behind an aligned address, and ends before one that is huge."""
    cases = [case for case in CASES if math.prod(case[0]) < 2 * SPAN]
    tensors = random_tensors(generator, cases, dtype, device)
    moved = [torch.full((t.numel() + 2,), 6e4, device=device).to(dtype)[1:-1].view(t.shape) for t in tensors]
    for t, other in zip(moved, tensors, strict=True):
        t.copy_(other)
    assert all(t.data_ptr() % 16 for t in moved)
    check(backend, [shape for _, shape in cases], moved, statistic)


@st.composite
def tensor_with_alpha(draw):
    sizes = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 8, 17, 40)), max_size=3)))
    rows = st.integers(0, len(sizes)).map(lambda n: sizes[:n] + (1,) * (len(sizes) - n))
    last = sizes[-1] if sizes else 1
    groups = st.sampled_from([g for g in range(1, last + 1) if last % g == 0]).map(lambda g: (*sizes[:-1], g))
    return sizes, draw(rows | groups)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])  # its name, its device
@given(
    cases=st.lists(tensor_with_alpha(), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(FLOATS),
    statistic=st.sampled_from(STATISTICS),
)
def test_statistics_of_any_list_are_near_float64(backend, device, cases, seed, dtype, statistic):
    tensors = random_tensors(torch.Generator().manual_seed(seed), cases, dtype, device)
    check(backend, [shape for _, shape in cases], tensors, statistic)


ROW = 2 * SPAN + 100
ADVERSARIAL = {
    "zeros": lambda x: x * 0,
    "constant": lambda x: x * 0 - 1.3,
    "one large": lambda x: torch.where(torch.arange(x.shape[-1]) == 77, 1e20, x),
    "denormal": lambda x: (x * 2.0**-140).clamp(-(2.0**-127), 2.0**-127),
    "squares underflow": lambda x: x * 1e-30,
    "partly lost squares": lambda x: x * 2.0**-72,
    "squares overflow": lambda x: x * 1e30,
    "sums overflow": lambda x: x.sign() * torch.finfo(x.dtype).max,
    "all sizes": lambda x: x * 10.0 ** torch.linspace(-44, 37, x.shape[-1]),
    "falling": lambda x: 1 / (1 + torch.arange(x.shape[-1]) + 0 * x),
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("data", ADVERSARIAL)
def test_squares_neither_overflow_nor_underflow(backend, device, data, statistic, generator):
    """Squares neither overflow nor underflow, in short and in long cells."""
    shapes = [((4, 8), (4, 1)), ((2, 520), (2, 65)), ((3, 77), (3,)), ((2, ROW), (2, 1))]
    shapes += [((3, 1024), (3, 1)), ((2, ROW + 4), (2, 1)), ((ROW,), ())]  # by chunks: sums of eight in float32
    tensors = [ADVERSARIAL[data](torch.randn(s, generator=generator)) for s, _ in shapes]
    tensors = [t.float().to(device) for t in tensors]
    assert all(t.isfinite().all() for t in tensors)
    check(backend, [shape for _, shape in shapes], tensors, statistic)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 3, 64, 1000, ROW])
def test_nan_and_infinity_stay_in_their_cell(backend, device, dtype, statistic, length):
    """A NaN wins over everything, an infinity over what is finite; other cells see nothing of it."""
    places = sorted({0, length // 2, min(length - 1, SPAN), length - 1})
    rows = [(place, values) for place in places for values in ((NAN,), (-NAN,), (INF,), (-INF,), (INF, NAN))]
    t = torch.ones(2 * len(rows), length).to(dtype)
    for i, (place, values) in enumerate(rows):
        for k, value in enumerate(values):
            t[2 * i, (place + k) % length] = value
    (found,) = measured(backend, [(len(t),)], [t.to(device)], statistic)
    for i, (_, values) in enumerate(rows):
        one = found[2 * i].item()
        assert math.isnan(one) if math.isnan(values[-1]) else one == INF, rows[i]
    assert torch.equal(found[1::2].cpu(), torch.ones(len(rows)))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_alpha_is_the_scaled_statistic_to_the_bit(backend, device, statistic, generator):
    """A float32 sum, product and maximum: to the bit."""
    cases = (((50, 40), (50, 1)), ((2, ROW), (2,)))
    tensors = random_tensors(generator, cases, torch.float32, device)
    tensors[0][:5] *= 0.0
    tensors[0][5, 5] = NAN
    shapes = [shape for _, shape in cases]
    plain = measured(backend, shapes, tensors, statistic)
    for factor, add, least in ((0.7979, 1e-8, 0.0), (1 / 3, 0.1, 0.6), (2.0, 0.0, 1e-5), (1e-30, 1.0, 1e30)):
        found = measured(backend, shapes, tensors, statistic, factor=factor, add=add, least=least)
        f, a, low = torch.tensor([factor, add, least])
        for alpha, value in zip(found, plain, strict=True):
            scaled = f * (value.cpu() + a)
            wanted = torch.where(scaled < low, low, scaled)
            assert torch.equal(alpha.cpu().nan_to_num(-1), wanted.nan_to_num(-1))
            assert torch.equal(alpha.isnan(), value.isnan())


@pytest.mark.parametrize("statistic", STATISTICS)
def test_cells_without_elements_have_the_statistic_zero(backend, device, statistic):
    """Their statistic is 0; an alpha without elements stays so; others in the list are as alone."""
    shapes = [((5, 0), (5, 1)), ((0, 3), (0, 1)), ((4, 8), (4, 1)), ((0,), ()), ((2, 0, 3), (40_000,))]
    tensors = [torch.ones(s, device=device) for s, _ in shapes]
    found = measured(backend, [s for _, s in shapes], tensors, statistic, factor=2.0, add=0.25, least=0.125)
    assert torch.equal(found[2].cpu(), torch.full((4, 1), 2.5))
    assert all((found[i] == 0.5).all() for i in (0, 3, 4))
    assert found[1].shape == (0, 1)
    found = measured(backend, [(5, 1)], tensors[:1], statistic, least=3.0)
    assert (found[0] == 3.0).all()


def test_an_empty_list_is_no_error(backend):
    fk.measure_alphas_([], [], statistic="rms", backend=backend)


def test_many_small_tensors_are_near_float64(backend, device, generator):
    cases = [((1 + i % 37,), ()) for i in range(300)]
    tensors = random_tensors(generator, cases, torch.bfloat16, device)
    check(backend, [()] * 300, tensors, "absmean")


# ---- the same bits


def bits(tensors):
    return [t.view(torch.int32).cpu() for t in tensors]


def same(one, other):
    return all(map(torch.equal, bits(one), bits(other)))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_same_bits_in_every_run_and_in_every_list(backend, device, statistic, generator):
    tensors, shapes = random_tensors(generator, CASES, torch.float32, device), [shape for _, shape in CASES]
    found = [measured(backend, shapes, tensors, statistic) for _ in range(2)]
    alone = [measured(backend, [s], [t], statistic)[0] for s, t in zip(shapes, tensors, strict=True)]
    backwards = measured(backend, shapes[::-1], tensors[::-1], statistic)[::-1]
    assert same(found[0], found[1])
    assert same(found[0], alone)
    assert same(found[0], backwards)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_same_bits_for_any_number_of_threads(name, statistic, generator):
    shapes = [(), (3,), (600, 1)]
    tensors = [torch.randn(s, generator=generator) for s in ((1_234_567,), (3, 200_001), (600, 1000))]
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(measured(name, shapes, tensors, statistic))
    torch.set_num_threads(1)
    assert all(same(*pair) for pair in pairwise(found))


def test_sums_of_the_reference_do_not_depend_on_threads(generator):
    """In float64: an alpha, rounded to float32, would hide nearly every difference."""
    rows = torch.rand(1, 2_345_678, generator=generator, dtype=torch.float64)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(reference.sum_of(rows).item())
    torch.set_num_threads(1)
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(math.fsum(rows[0].tolist()), rel=1e-13)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_with_any_instruction_set(dtype, statistic, generator, monkeypatch):
    tensors, found = random_tensors(generator, CASES, dtype, "cpu", 1e4), []
    tensors[3][0] = NAN
    for isa in _C.cpu_isas():
        monkeypatch.setenv("FOGZO_CPU_ISA", isa)
        found.append(measured("cpu", [shape for _, shape in CASES], tensors, statistic))
    assert all(same([a.nan_to_num(-1) for a in x], [b.nan_to_num(-1) for b in y]) for x, y in pairwise(found))


# ---- as PyTorch sees it


def test_meta_tensors_are_checked_and_an_export_measures_anew():
    class Measured(torch.nn.Module):
        def forward(self, x):
            alpha = torch.empty(x.shape[0], 1)
            fk.measure_alphas_(alpha, x, statistic="absmax", factor=0.5, backend="reference")
            return x / alpha

    x = torch.randn(4, 8)
    exported = torch.export.export(Measured(), (x,)).module()
    assert torch.equal(exported(2 * x), 2 * x / x.abs().amax(1, keepdim=True))
    fk.measure_alphas_(torch.empty(4, 1, device="meta"), x.to("meta"), statistic="rms")
    with pytest.raises(ValueError, match=r"alphas\[0\] must have one element"):
        fk.measure_alphas_(torch.empty(5, 1, device="meta"), x.to("meta"), statistic="rms")


def test_an_alpha_written_counts_as_a_change():
    alpha = torch.ones(1)
    before = alpha._version
    fk.measure_alphas_(alpha, torch.ones(3), statistic="rms")
    assert alpha._version == before + 1


# ---- what the native op refuses by itself; test_fuzz.py spoils it in every way


@pytest.mark.parametrize(("change", "message"), [
    ({"statistic": "Rms"}, "statistic must be one of absmax, absmean, rms, got Rms"),
    ({"factor": 0.0}, "refused: measure"),
    ({"add": -1.0}, "refused: measure"),
    ({"least": NAN}, "refused: measure"),
    ({"tensors": [torch.ones(4, 8).int()]}, "refused: dtype"),
    ({"tensors": []}, "refused: length"),
    ({"alphas": [torch.ones(4, 1).half()]}, "refused: dtype"),
    ({"alphas": [torch.ones(1, 8)]}, "refused: shape"),
    ({"alphas": [torch.ones(4, 2)[:, :1]]}, "refused: memory"),
])  # fmt: skip
def test_the_native_op_refuses_bad_calls_and_writes_nothing(change, message):
    args = {"alphas": [torch.full((4, 1), 99.0)], "tensors": [torch.ones(4, 8)], "statistic": "rms"}
    args |= {"factor": 1.0, "add": 0.0, "least": 0.0, **change}
    before = [alpha.clone() for alpha in args["alphas"]]
    with pytest.raises((RuntimeError, ValueError), match=f"^{message}"):
        torch.ops.fogzo_cpu.measure_alphas(*args.values())
    assert all(map(torch.equal, args["alphas"], before))


def test_the_native_op_refuses_an_alpha_in_its_tensor():
    x = torch.ones(4, 8)
    with pytest.raises(RuntimeError, match=r"^refused: overlap"):
        torch.ops.fogzo_cpu.measure_alphas([x[2, 3]], [x], "rms", 1.0, 0.0, 0.0)
    assert torch.equal(x, torch.ones(4, 8))


# ---- the table of a GPU backend


def test_cells_are_packed_or_cut():
    shapes = (((3, 2 * SPAN + 1), (3,)), ((0, 4), ()), ((1000, 100), (1000,)), ((SPAN,), ()))
    tensors = [torch.zeros(s) for s, _ in shapes]
    p = cells.plan(tensors, [torch.zeros(s) for _, s in shapes])
    rows = [dict(zip(cells.COLUMNS, row, strict=True)) for row in p.table.view(-1, len(cells.COLUMNS)).tolist()]
    assert [row["PIECES"] for row in rows] == [3, 1, 1, 1]
    assert [row["PACK"] for row in rows] == [1, SPAN, SPAN // 100, 1]
    assert [row["FIRST"] for row in rows] == [0, 9, 10, 17]
    assert p.owner[: p.programs].tolist() == [0] * 9 + [1] + [2] * 7 + [3]
    assert p.second.tolist() == [0] * 3
    assert (p.programs, p.seconds) == (18, 3)
    assert [row["THREADS"] for row in rows] == [128, 1, 8, 128]
    assert [row["WIDTH"] for row in rows] == [2048, 16, 16, 2048]
    assert [row["ALIGNED"] for row in rows] == [0, 1, 0, 1]
