"""The CPU kernels for each instruction set: the same bits, whatever the set and the number of threads."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fogzo_kernels as fk
from fogzo_kernels import _C
from fogzo_kernels.spec.grid import FLOATS
from fogzo_kernels.spec.noise import DISTRIBUTIONS

VARIABLE = "FOGZO_CPU_ISA"
KNOWN = ("avx512", "avx2", "portable")
#: Lengths around a vector, a block of Philox calls, a tile and a task of a thread.
LENGTHS = (0, 1, 7, 8, 9, 63, 64, 65, 100, 1023, 1024, 1031, 32768, 32771)


def results(isa, monkeypatch, seed, shape, dtypes, scales, distribution, layout, n=2):
    """Everything that the kernels compute, for one tensor, from data that the seed fixes."""
    monkeypatch.setenv(VARIABLE, isa)
    generator = torch.Generator().manual_seed(seed)
    latent, grad, out = dtypes
    theta = torch.randn(shape, generator=generator).to(latent)
    g = (torch.randn(shape, generator=generator) * 1e-2).to(grad)
    alpha = torch.rand(scales, generator=generator) + 0.1
    grid = fk.Grid.half_offset(3)
    common = {
        "grid": grid, "straight_through": fk.StraightThrough("identity", noise=distribution),
        "one_minus_beta": 0.03, "seed": 2**63 + 5, "step": 9, "layouts": [layout], "backend": "cpu",
    }  # fmt: skip
    norm = fk.guide_norm(g, alpha, grid=grid, backend="cpu")
    plus, minus, one = (torch.full_like(theta, 99, dtype=out) for _ in range(3))
    fk.perturb_quantize_(plus, minus, theta, g, alpha, norm, **common)
    fk.perturb_quantize_(None, one, theta, g, alpha, norm, **common)
    losses = torch.rand(2, n, generator=generator)
    G = g.clone()
    fk.estimate_gradient_(G, *losses, alpha, norm, **common)
    found = [norm, plus, minus, one, G]
    for options in ({"momentum": 0.9, "nesterov": True}, {}):
        latents, q, state = theta.clone(), torch.full_like(theta, 99, dtype=out), torch.ones(shape)
        fk.estimate_sgd_(
            latents,
            g,
            state if options else None,
            *losses,
            alpha,
            norm,
            lr=0.1,
            optimizer_step=2,
            quantized=q,
            **options,
            **common,
        )
        found += [latents, q, state]
    states = [torch.full(shape, 1e-3), torch.full(shape, 1e-4)]
    fk.estimate_adamw_(theta, g, *states, *losses, alpha, norm, lr=0.1, optimizer_step=2, **common)
    back = G.clone().to(latent)
    fk.straight_through_backward_(
        back, theta, alpha, grid=grid, straight_through=common["straight_through"], backend="cpu"
    )
    alpha_grad = torch.full_like(alpha, 99)
    fk.learned_backward_(
        back.clone(),
        alpha_grad,
        theta,
        alpha,
        grid=grid,
        straight_through=common["straight_through"],
        factors=0.5,
        backend="cpu",
    )
    noise = fk.noise(
        theta.numel(), distribution, seed=3, layout=layout, device=torch.device("cpu"), backend="cpu"
    )
    return [*found, theta, *states, back, alpha_grad, noise]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_first_usable_instruction_set_is_chosen():
    assert _C.cpu_isas()[-1] == "portable"
    assert set(_C.cpu_isas()) <= set(KNOWN)
    assert _C.cpu_isa() == (os.environ.get(VARIABLE) or _C.cpu_isas()[0])


@pytest.mark.parametrize("isa", KNOWN[:2])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtypes", [
    *[(x, x, x) for x in FLOATS], (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.int8), (torch.float32, torch.float32, torch.int8),
    (torch.float16, torch.float32, torch.bfloat16),
], ids=str)  # fmt: skip
def test_every_set_gives_the_portable_bits(isa, distribution, dtypes, generator, monkeypatch):
    if isa not in _C.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    seed = generator.initial_seed()
    for n in LENGTHS:
        for start in (0, 5):
            arguments = seed, (n,), dtypes, (1,), distribution, (start, max(n, 1), max(n, 1))
            assert_same(results(isa, monkeypatch, *arguments), results("portable", monkeypatch, *arguments))


@pytest.mark.parametrize("isa", KNOWN[:2])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_chunk_numbers_beyond_32_bits_give_the_portable_bits(isa, distribution, generator, monkeypatch):
    """The upper half of a chunk's number changes within a row, and within a block."""
    if isa not in _C.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    for dtype in (torch.float32, torch.bfloat16):
        for before in (1024, 40, 3):
            layout = (2**35 * 7 - before, 2000, 2000)
            arguments = generator.initial_seed(), (2000,), (dtype,) * 3, (1,), distribution, layout
            assert_same(results(isa, monkeypatch, *arguments), results("portable", monkeypatch, *arguments))


@pytest.mark.parametrize("isa", KNOWN[:2])
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    groups=st.integers(1, 5),
    by_group=st.booleans(),
    offset=st.integers(0, 70),
    skip=st.integers(0, 70),
    distribution=st.sampled_from(list(DISTRIBUTIONS)),
    seed=st.integers(0, 2**31),
    n=st.integers(1, 3),
)
def test_rows_groups_and_shards_give_the_portable_bits(
    isa, rows, columns, groups, by_group, offset, skip, distribution, seed, n
):
    if isa not in _C.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    width = 8 * columns * groups if columns % 2 else columns * groups
    scales = (rows, groups) if by_group else (rows, 1)
    layout = (offset, width, width + skip)
    dtypes = (torch.float32, torch.float32, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        arguments = seed, (rows, width), dtypes, scales, distribution, layout, n
        assert_same(results(isa, patch, *arguments), results("portable", patch, *arguments))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_threads_do_not_change_a_bit(distribution, generator, monkeypatch):
    arguments = (
        generator.initial_seed(),
        (3, 70001),
        (torch.float32,) * 3,
        (3, 1),
        distribution,
        (3, 210003, 210003),
    )
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(_C.cpu_isa(), monkeypatch, *arguments))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("value", ["sse", "AVX2", "neon"])
def test_an_unknown_set_is_refused_before_anything_is_written(value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    theta, out = torch.randn(9), torch.full((9,), float("nan"))
    with pytest.raises(
        ValueError, match=f"FOGZO_CPU_ISA must be one that this processor runs, .*, got {value}"
    ):
        fk.quantize_(out, theta, torch.tensor(0.5), grid=fk.Grid.uniform(2), backend="cpu")
    assert out.isnan().all()
