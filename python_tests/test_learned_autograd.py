"""quantize with an alpha that requires a gradient: autograd, compiled graphs, exported programs."""

import math

import pytest
import torch

import fogzo_kernels as fk
from fogzo_kernels import backends
from fogzo_kernels.spec.grid import FLOATS

NAN, INF = math.nan, math.inf
IDENTITY = fk.StraightThrough("identity", clip=False)
CLIPPED = fk.StraightThrough("identity")
ON_GRIDS = [
    (fk.Grid.uniform(2), CLIPPED), (fk.Grid.half_offset(3), IDENTITY),
    (fk.Grid.sign(), fk.StraightThrough("hardtanh")),
]  # fmt: skip


class Gate(torch.autograd.Function):
    """The identity, whose gradient passes where told."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def plain_lsq(latent, alpha, grid, straight_through, factor):
    """As its users write LSQ in PyTorch: clamp, detach() around rint, a scaled gradient of alpha."""
    groups = latent.shape[1] // alpha.shape[1]
    s = Gate.apply(alpha, torch.tensor(factor, dtype=alpha.dtype)).repeat_interleave(groups, 1)
    if grid.is_sign:  # hardtanh
        x = (latent / s).detach()
        sign = torch.where(x >= 0, 1.0, -1.0).to(latent.dtype)
        return s * sign + nothing(latent, x.abs() < 1)
    z = latent / s - grid.offset
    clamped = z.clamp(grid.qmin, grid.qmax)
    q = s * (clamped + (torch.round(clamped) - clamped).detach() + grid.offset)
    return q if straight_through.clip else q + nothing(latent, (z < grid.qmin) | (z > grid.qmax))


def nothing(latent, where):
    """Zero, with a gradient of one where told."""
    gated = Gate.apply(latent, where.to(latent.dtype))
    return gated - gated.detach()


@pytest.mark.parametrize("known", [False, True], ids=["quantize", "quantized"])
@pytest.mark.parametrize(("grid", "straight_through"), ON_GRIDS, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_autograd_gives_the_gradients_of_plain_pytorch(
    backend, device, grid, straight_through, groups, known, generator
):
    """Away from ties and ends, where float32 and float64 may disagree on a code."""
    latent, weight = torch.randn(2, 6, 32, generator=generator)
    alpha, factor = 0.2 + torch.rand(6, groups, generator=generator), 0.125
    z = latent / alpha.repeat_interleave(32 // groups, 1) - grid.offset
    near = ((z * 2) - torch.round(z * 2)).abs() < 1e-3
    latent = torch.where(near, 0.1 * alpha.repeat_interleave(32 // groups, 1), latent)
    own, other = ([t.clone().to(device) for t in (latent, alpha)] for _ in "ab")
    other = [t.cpu().double() for t in other]
    for t in (*own, *other):
        t.requires_grad_()
    options = {"grid": grid, "straight_through": straight_through, "alpha_factor": factor, "backend": backend}
    if known:
        with torch.no_grad():
            options["quantized"] = fk.quantize(*own, **options)
    q = fk.quantize(*own, **options)
    plain = plain_lsq(*other, grid, straight_through, factor)
    torch.testing.assert_close(q.detach().cpu().double(), plain.detach(), rtol=1e-6, atol=1e-6)
    (q * weight.to(device)).sum().backward()
    (plain * weight.double()).sum().backward()
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a.grad.cpu().double(), b.grad, rtol=1e-4, atol=1e-5)
    assert own[1].grad.abs().min() > 0


@pytest.mark.parametrize("wanted_by", ["latent", "alpha", "both"])
def test_who_requires_a_gradient_gets_it(backend, device, wanted_by, generator, monkeypatch):
    """Without one for alpha the other kernel runs, with the same g."""
    latent, alpha = torch.randn(6, 32, generator=generator).to(device), torch.full((6, 1), 0.5, device=device)
    latent.requires_grad_(wanted_by != "alpha")
    alpha.requires_grad_(wanted_by != "latent")
    grid, called = fk.Grid.uniform(2), []
    chosen = backends.load(backend)
    for op in ("learned_backward_", "straight_through_backward_"):
        monkeypatch.setattr(chosen, op, watched(getattr(chosen, op), op, called))
    fk.quantize(latent, alpha, grid=grid, straight_through=CLIPPED, backend=backend).sum().backward()
    assert (latent.grad is None, alpha.grad is None) == (wanted_by == "alpha", wanted_by == "latent")
    assert called[:1] == ["straight_through_backward_" if wanted_by == "latent" else "learned_backward_"]
    g = torch.ones_like(latent)
    fk.straight_through_backward_(g, latent, alpha, grid=grid, straight_through=CLIPPED, backend=backend)
    assert latent.grad is None or torch.equal(latent.grad, g)


def watched(function, name, called):
    def run(*args):
        called.append(name)
        return function(*args)

    return run


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gradient_of_another_layout_gives_the_same_bits(backend, device, dtype, generator):
    """Transposed, and expanded from one element, as sums and products give it."""
    latent = torch.randn(6, 32, generator=generator).to(device, dtype).requires_grad_()
    alpha = torch.full((6, 1), 0.5, device=device, requires_grad=True)
    q = fk.quantize(latent, alpha, grid=fk.Grid.uniform(2), straight_through=CLIPPED, backend=backend)
    weight = torch.randn(32, 6, generator=generator).to(device, dtype)
    for grad in (weight.t(), torch.tensor(0.5, dtype=dtype, device=device).expand(6, 32)):
        found = torch.autograd.grad(q, (latent, alpha), grad, retain_graph=True)
        same = torch.autograd.grad(q, (latent, alpha), grad.contiguous(), retain_graph=True)
        assert all(map(torch.equal, found, same))
        assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)


class Learned(torch.nn.Module):
    """A layer with a learned scale."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        generator = torch.Generator().manual_seed(7)
        self.weight = torch.nn.Parameter(torch.randn(6, 32, generator=generator))
        self.alpha = torch.nn.Parameter(torch.full((6, 1), 0.5))

    def forward(self, x):
        q = fk.quantize(
            self.weight,
            self.alpha,
            grid=fk.Grid.uniform(2),
            straight_through=CLIPPED,
            alpha_factor=0.25,
            backend=self.backend,
        )
        return x @ q.t()


@pytest.mark.parametrize("compiler", ["aot_eager", "eager"])
def test_it_compiles_into_one_graph_with_the_same_bits(backend, device, compiler):
    torch._dynamo.reset()
    model, x = Learned(backend).to(device), torch.eye(32, device=device)
    results = []
    for run_it in (model, torch.compile(model, fullgraph=True, backend=compiler)):
        model.zero_grad()
        run_it(x).square().sum().backward()
        results.append((model.weight.grad, model.alpha.grad))
    assert all(map(torch.equal, *results))
    assert results[0][1].count_nonzero() == 6


def test_it_compiles_with_a_known_quantized_weight(backend, device):
    torch._dynamo.reset()

    def loss(latent, alpha, q):
        options = {"grid": fk.Grid.uniform(2), "straight_through": CLIPPED, "backend": backend}
        return fk.quantize(latent, alpha, quantized=q, alpha_factor=0.5, **options).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        latent, q = (torch.linspace(-2, 2, 48, device=device).view(6, 8) for _ in "ab")
        latent.requires_grad_()
        alpha = torch.full((6, 2), 0.5, device=device, requires_grad=True)
        function(latent, alpha, q).backward()
        results.append((latent.grad, alpha.grad))
    assert all(map(torch.equal, *results))
    assert results[0][1].count_nonzero() > 6


def test_an_exported_program_gives_the_output_of_the_model():
    model, x = Learned(None), torch.eye(32)
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))
    assert any("fogzo.quantize" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("factor", [NAN, INF, -INF, "1", None, True])
def test_alpha_factor_is_a_finite_number(factor):
    error = ValueError if isinstance(factor, float) else TypeError
    alpha = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(error, match="alpha_factor must be "):
        fk.quantize(
            torch.ones(4), alpha, grid=fk.Grid.uniform(2), straight_through=CLIPPED, alpha_factor=factor
        )
