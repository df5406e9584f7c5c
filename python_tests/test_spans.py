"""How a plan cuts and reads tensors changes no bit: spans of programs, tensors that are not aligned."""

import pytest
import torch
from conftest import GPU_BACKENDS, device_of

import fogzo_kernels as fk
from fogzo_kernels.backends.gpu import plans

GRID = fk.Grid.half_offset(3)
#: More than one program of the longest span, and small ones. The last tensor of each list is not quantized.
LONG, SHORT = [(2, 8200), (3, 384), (2101,), (7, 25)], [(2, 1032), (3, 384), (1101,), (7, 25)]
ROTATED_LONG, ROTATED_SHORT = [(2, 8192), (5, 384), (7, 25)], [(2, 1024), (5, 384), (7, 25)]


def scales_of(kind, shapes):
    """Shapes of alphas: groups of 8 and 128, or one for each element of a tensor of one dimension."""
    of_groups = [(*s[:-1], s[-1] // (8 if s[-1] % 128 else 128)) if len(s) > 1 else s for s in shapes]
    of_rows = [(s[0], 1) if len(s) > 1 else (1,) for s in shapes]
    return {"tensor": [() for _ in shapes], "row": of_rows, "group": of_groups}[kind]


NAMES = {"one_minus_beta": 0.3, "seed": 2**63 + 3, "step": 5}
BLOCK = 128


@pytest.fixture(params=GPU_BACKENDS)
def backend(request):
    if (reason := fk.available_backends(device_of(request.param))[request.param]) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    """The plans of a test, which begins without any."""
    monkeypatch.setattr(plans, "_plans", plans.Recent())
    return plans._plans


def rows(planned, column):
    place = plans.COLUMNS.index(column)
    return [row[place] for p, _ in planned.values() for row in p.table.view(-1, len(plans.COLUMNS)).tolist()]


class Lists:
    """Operands of every op, each at its offset, in elements, from where memory is aligned."""

    def __init__(self, backend, seed, scales, shapes, dtype, offsets, block=0):
        self.backend, self.device = backend, device_of(backend)
        self.generator, self.offsets = torch.Generator().manual_seed(seed), offsets
        alphas = scales_of(scales, shapes[:-1])
        self.count, self.dtype = len(alphas), dtype
        self.latents, self.grads = self.some(shapes, "latents"), self.some(shapes, "grads")
        self.alphas = [(0.5 * torch.rand(s, generator=self.generator) + 0.1).to(self.device) for s in alphas]
        self.losses = torch.rand(2, 2, generator=self.generator).to(self.device)
        smooth = fk.StraightThrough("identity")
        transform = fk.Hadamard(block) if block else None
        self.on_grid = {"grid": GRID, "backend": backend, "transform": transform}
        self.options = {"straight_through": smooth, **NAMES, **self.on_grid}
        self.backward = {"straight_through": smooth, **self.on_grid}

    def some(self, shapes, name, dtype=None):
        return [
            self.placed(torch.randn(s, generator=self.generator).to(dtype or self.dtype), name) for s in shapes
        ]

    def placed(self, t, name):
        offset = self.offsets.get(name, 0)
        memory = torch.empty(t.numel() + offset, dtype=t.dtype, device=self.device)
        memory[offset:] = t.to(self.device).flatten()
        return memory[offset:].view(t.shape)

    def copies(self, tensors, name, dtype=None):
        return [self.placed(t.to(dtype or t.dtype), name) for t in tensors]

    def run(self):
        """What every op writes: pointwise results, then sums."""
        given, n = (self.latents[: self.count], self.grads[: self.count], self.alphas), self.count
        norm = fk.guide_norm(*given[1:], grid=GRID, backend=self.backend)
        fixed = torch.ones_like(norm)  # so that the others do not depend on a sum
        found = {}
        for out_t in (self.dtype, torch.int8):
            both = [self.copies(given[0], "outputs", out_t) for _ in "+-"]
            fk.perturb_quantize_(*both, *given, fixed, **self.options)
            q = self.copies(given[0], "outputs", out_t)
            fk.quantize_(q, given[0], self.alphas, **self.on_grid)
            found[out_t] = [*both[0], *both[1], *q]
        G = self.copies(given[1], "grads")
        fk.estimate_gradient_(G, *self.losses, self.alphas, fixed, **self.options)
        found["estimate"] = G
        masters = self.dtype != torch.float32
        for rule, options in (("adamw", {}), ("sgd", {"momentum": 0.9})):
            w = self.copies(self.latents, "latents")
            states = [self.some([t.shape for t in w], "states", torch.float32) for _ in range(2)]
            states[1] = [t.abs_() for t in states[1]]
            master = self.copies(w, "states", torch.float32) if masters else None
            q = self.copies(given[0], "outputs")
            given_states = states if rule == "adamw" else [states[0]]
            getattr(fk, f"estimate_{rule}_")(
                w,
                self.grads,
                *given_states,
                *self.losses,
                self.alphas,
                fixed,
                lr=0.1,
                optimizer_step=2,
                quantized=q,
                masters=master,
                **options,
                **self.options,
            )
            found[rule] = [*w, *q, *(master or []), *(t for ts in given_states for t in ts)]
        g = self.copies(given[1], "grads")
        fk.straight_through_backward_(g, given[0], self.alphas, **self.backward)
        found["backward"] = g
        g, alpha_grads = self.copies(given[1], "grads"), [torch.empty_like(a) for a in self.alphas]
        fk.learned_backward_(g, alpha_grads, given[0], self.alphas, factors=[1.0] * n, **self.backward)
        found["learned"] = g
        return found, [norm, *alpha_grads]


def same(one, other):
    for name, tensors in one.items():
        for i, (a, b) in enumerate(zip(tensors, other[name], strict=True)):
            assert torch.equal(a, b), (name, i)


def sums_are_near(sums, others):
    """In another order: within a few float64 roundings, and the float32 roundings of 8 squares or terms."""
    for a, b in zip(sums, others, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize(("scales", "block"), [("tensor", 0), ("row", 0), ("group", 0), ("row", BLOCK)])
def test_spans_change_no_bit_but_of_sums(backend, scales, block, monkeypatch, planned, generator):
    seed, found = generator.initial_seed(), []
    for span in (plans.SHORTEST, plans.SPAN):
        monkeypatch.setattr(plans, "SHORTEST", span)
        planned.clear()
        found.append(
            Lists(backend, seed, scales, ROTATED_LONG if block else LONG, torch.float32, {}, block).run()
        )
        assert set(rows(planned, "SPAN")) == {span}
    (first, sums), (second, others) = found
    same(first, second)
    sums_are_near(sums, others)


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.bfloat16, "grads"),
        (torch.bfloat16, "latents grads outputs states"),
        (torch.float32, "latents grads outputs states"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("scales", "block"), [("tensor", 0), ("row", 0), ("group", 0), ("row", BLOCK)])
def test_tensors_that_are_not_aligned_take_the_fast_path_with_the_same_bits(
    backend, dtype, scales, block, names, planned, generator
):
    """As gradients in a bucket behind a bias do."""
    seed, shapes = generator.initial_seed(), ROTATED_SHORT if block else SHORT
    expected, sums = Lists(backend, seed, scales, shapes, dtype, {}, block).run()
    assert set(rows(planned, "ALIGNED")) == {1}
    planned.clear()
    offset = int(torch.randint(1, 16 // dtype.itemsize, (), generator=generator))
    offsets = dict.fromkeys(names.split(), offset)
    found, others = Lists(backend, seed, scales, shapes, dtype, offsets, block).run()
    same(expected, found)
    sums_are_near(sums, others)
    numels, fast = rows(planned, "NUMEL"), rows(planned, "FAST")
    by_element = [n for n, f in zip(numels, fast, strict=True) if f != n & ~7]
    assert set(by_element) == ({1101} if scales == "group" else set())  # which has an alpha for each element
    assert 0 in rows(planned, "ALIGNED")


def test_the_norm_of_many_tensors_is_exact_where_its_squares_are(backend):
    """More partial sums than threads of the program that adds them; their float64 sum is exact in any order."""
    device, values = device_of(backend), [float(i % 64) for i in range(700)]
    grads = [torch.tensor([x], device=device) for x in values]
    alphas = [torch.tensor(0.5, device=device) for _ in grads]
    expected = sum((0.5 * x) ** 2 for x in values)
    found = fk.guide_sumsq(grads, alphas, grid=fk.Grid.uniform(4), backend=backend)
    assert found.dtype == torch.float64
    assert found.item() == expected
