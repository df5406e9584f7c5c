"""What only a GPU shows: captured graphs, launches, synchronizations, allocations, sizes, streams."""

import re
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU_BACKENDS
from support.tolerances import EXACT, M_TOLERANCE
from torch import nn

import fogzo_kernels as fk
from bench.agree import compared
from bench.calls import calls
from bench.comparison import Place
from fogzo_kernels.spec.noise import DISTRIBUTIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = torch.device("cuda")
GRID, STRAIGHT_THROUGH = fk.Grid.uniform(4), fk.StraightThrough("identity")
OPTIONS = {"grid": GRID, "straight_through": STRAIGHT_THROUGH}
#: Kernels of a step beside its passes: N, both probes at once, and the tail.
BEFORE = dict.fromkeys(("sumsq_kernel", "sum_kernel", "perturb_kernel"), 1)
#: CUDA has one kernel for the coefficients of the estimate and of the tail.
TAIL = {
    "triton": ("update_coefficients_kernel", "update_kernel"),
    "cuda": ("coefficients_kernel", "update_kernel"),
}


@pytest.fixture(params=GPU_BACKENDS)
def backend(request):
    """The name of a backend that runs on the GPU."""
    reason = fk.available_backends(DEVICE)[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def network(backend, dtype=torch.float32, width=64, depth=3):
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)]
    model = nn.Sequential(*layers, nn.Linear(width, 8)).to(DEVICE, dtype)
    scale = fk.Scale.fixed(lambda w: w.abs().mean(1, keepdim=True))
    fk.quantize_model(model, fk.Quantizer(GRID, scale, STRAIGHT_THROUGH), backend=backend)
    return model


class Training:
    """A model, its estimator and its optimizer, on fixed data."""

    def __init__(self, backend, dtype=torch.float32, lr=1e-3, capturable=True, **options):
        self.model = network(backend, dtype)
        options |= {"one_minus_beta": 0.3, "seed": 5, "capturable": capturable, "backend": backend}
        self.fogzo = fk.Fogzo(self.model, total_steps=4, **{"directions": 1} | options)
        rate = torch.tensor(lr, dtype=torch.float64, device=DEVICE) if capturable else lr
        self.optimizer = fk.AdamW(self.model.parameters(), lr=rate, fogzo=self.fogzo, capturable=capturable)
        generator = torch.Generator().manual_seed(4)
        self.inputs = torch.randn(32, 64, generator=generator).to(DEVICE, dtype)
        self.labels = torch.randint(8, (32,), generator=generator).to(DEVICE)

    def loss(self):
        return F.cross_entropy(self.model(self.inputs).float(), self.labels)

    def step(self):
        self.optimizer.zero_grad()
        return self.optimizer.step(self.loss)

    def capture(self, warm_up):
        """A graph of one step, after ``warm_up`` eager ones on the stream of the capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.captured_loss = self.step()
        return graph


# ---- graphs


@pytest.mark.parametrize("scales", [(), (300, 1), (300, 8)], ids=str)
def test_learned_scales_take_two_launches_and_can_be_captured(backend, scales):
    """A replay reads what the memory holds by then, and writes what an eager call does, to the bit.

    The second launch is for an alpha that several programs share.
    """
    latent, g, fresh = (torch.randn(300, 512, device=DEVICE) for _ in range(3))
    alpha = torch.full(scales, 0.25, device=DEVICE)
    alpha_grad, expected = torch.empty_like(alpha), torch.empty_like(alpha)

    def backward(grads, out):
        fk.learned_backward_(grads, out, latent, alpha, factors=0.5, backend=backend, **OPTIONS)

    backward(g.clone(), expected)  # compiles
    shared = {} if scales else {"learned_sum_kernel": 1}
    assert launched(lambda: backward(g, alpha_grad)) == {"learned_kernel": 1, **shared}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward(g, alpha_grad)
    once = fresh.clone()
    backward(once, expected)
    g.copy_(fresh)
    alpha_grad.fill_(float("nan"))
    graph.replay()
    assert torch.equal(g, once)
    assert torch.equal(alpha_grad, expected)


@pytest.mark.parametrize("options", [{}, {"directions": 0, "noise_per": "tensor"}], ids=["probes", "guided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_of_a_captured_step_are_eager_steps(backend, dtype, options):
    eager, captured = Training(backend, dtype, **options), Training(backend, dtype, **options)
    expected = [float(eager.step()) for _ in range(6)]
    graph = captured.capture(warm_up=2)
    found = []
    for _ in range(4):
        graph.replay()
        found.append(float(captured.captured_loss))
    torch.testing.assert_close(found, expected[2:], rtol=1e-4, atol=1e-5)
    assert captured.fogzo.steps == eager.fogzo.steps == 6
    for p, q in zip(eager.model.parameters(), captured.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert captured.fogzo.diagnostics() == eager.fogzo.diagnostics() == {
        "lost_directions": 0, "lost_steps": 0, "bad_alphas": 0,
    }  # fmt: skip


def test_each_replay_draws_its_own_noise(backend):
    training = Training(backend, lr=0.0)
    inner, passes = training.loss, []

    def loss():
        found = inner()
        passes.append(found.detach())
        return found

    training.loss = loss
    graph = training.capture(warm_up=5)  # beta has reached its end: only the noise differs from here on
    seen = []
    for _ in range(4):
        graph.replay()
        seen.append(tuple(x.item() for x in passes[-3:]))  # those of the capture
    assert len({losses[0] for losses in seen}) == 1
    assert len({losses[1:] for losses in seen}) == 4


def test_weights_set_between_replays_are_used(backend):
    training = Training(backend, lr=0.0)
    graph = training.capture(warm_up=2)
    graph.replay()
    before = float(training.captured_loss)
    with torch.no_grad():
        for p in training.model.parameters():
            p.mul_(-1)
        expected = float(training.loss())
    graph.replay()
    assert float(training.captured_loss) == pytest.approx(expected, rel=1e-5)
    assert expected != before


# ---- host and launches


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_waits_for_the_device_once(backend, capturable):
    """To look at the gradients: which weights take part, and whether the step is lost."""
    training = Training(backend, capturable=capturable)
    for _ in range(2):
        training.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in said if "synchronizing" in str(w.message)]) == 1


def launched(function):
    """Kernels by name that the function launches; copies and what the profiler does itself are none."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [found[1] if (found := re.search(r"fogzo::cuda::(\w+)", n)) else n for n in names]
    others = ("Memcpy", "Memset", "Activity Buffer", "Context Sync", "Stream Sync", "Event Sync", "Stream Wait")
    return Counter(n for n in names if not n.startswith(others))


def test_a_step_adds_five_kernels_to_its_passes(backend):
    training = Training(backend, capturable=False)
    for _ in range(2):
        training.step()
    found = launched(training.step)
    kernels = BEFORE | dict.fromkeys(TAIL[backend], 1)
    assert {name: found[name] for name in kernels} == kernels

    def passes():
        training.optimizer.zero_grad()
        probes = training.fogzo.probes()
        for probe in probes:
            with probe:
                probe.backward(training.loss())

    training.step()
    both = launched(passes)  # with norm and probes
    assert {name: both[name] for name in kernels} == BEFORE | dict.fromkeys(TAIL[backend], 0)
    ours = [name for name in found if re.fullmatch(r"\w+_kernel", name)]  # the others look at gradients
    assert sum(found[name] - both[name] for name in ours) == 2


# ---- memory


def big(n, dtype=torch.bfloat16):
    latents, grads = (torch.randn(n, device=DEVICE).to(dtype) for _ in range(2))
    return latents, grads, torch.full((1,), 0.5, device=DEVICE)


def test_ops_allocate_nothing_per_weight(backend):
    n = 2**26
    latent, grad, alpha = big(n)
    out, first, second = torch.empty_like(latent), *(torch.zeros(n, device=DEVICE) for _ in range(2))
    losses = torch.ones(2, 1, device=DEVICE)
    options = {"one_minus_beta": 1e-2, "seed": 3, "step": 2, "backend": backend, **OPTIONS}

    def ops():
        norm = fk.guide_norm(grad, alpha, grid=GRID, backend=backend)
        fk.perturb_quantize_(out, None, latent, grad, alpha, norm, **options)
        fk.perturb_quantize_(None, out, latent, grad, alpha, norm, **options)
        fk.estimate_gradient_(grad, *losses, alpha, norm, **options)
        fk.estimate_adamw_(
            latent, grad, first, second, *losses, alpha, norm, lr=1e-3, optimizer_step=1, quantized=out,
            **options,
        )  # fmt: skip

    ops()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 8 * n // 16384 + 64 * 1024  # a float64 per program of the norm, and the scalars


def test_more_elements_than_32_bits_count(backend):
    n, around = 2**31 + 2**20 + 11, 2**31
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    latent, grad, alpha = torch.empty(n, dtype=torch.bfloat16, device=DEVICE), None, torch.full((1,), 0.5)
    latent.normal_()
    grad = torch.empty_like(latent).normal_()
    out = torch.full((n,), 99, dtype=torch.int8, device=DEVICE)
    norm = torch.tensor(40000.0)
    options = {"one_minus_beta": 0.5, "seed": 3, "step": 2, "grid": GRID, "straight_through": STRAIGHT_THROUGH}
    fk.perturb_quantize_(out, None, latent, grad, alpha.to(DEVICE), norm.to(DEVICE), backend=backend, **options)
    for start, stop in ((0, 4099), (around - 4096, around + 4096), (n - 4099, n)):
        part = slice(start, stop)
        expected = torch.empty(stop - start, dtype=torch.int8)
        fk.perturb_quantize_(
            expected, None, latent[part].cpu(), grad[part].cpu(), alpha, norm, backend="reference",
            layouts=[(start, stop - start, stop - start)], **options,
        )  # fmt: skip
        assert torch.equal(out[part].cpu(), expected)
    assert int((out == 99).sum()) == 0


# ---- where scalars lie, lists, streams


def test_scalars_of_host_and_device_give_the_same_bits(backend):
    latent, grad, alpha = big(20001)
    norm = fk.guide_norm(grad, alpha, grid=GRID, backend=backend)
    losses = torch.tensor([[1.25], [1.0]], device=DEVICE)
    seed, step, count, lr, omb = 2**63 + 11, 7, 3, 0.0123, 0.037
    on_device = {
        "seed": torch.tensor(seed - 2**64, device=DEVICE), "step": torch.tensor(step, device=DEVICE),
        "one_minus_beta": torch.tensor(omb, dtype=torch.float64, device=DEVICE),
    }  # fmt: skip
    found = []
    for options, rate, number in (
        ({"seed": seed, "step": step, "one_minus_beta": omb}, lr, count),
        (on_device, torch.tensor(lr, dtype=torch.float64, device=DEVICE), torch.tensor(count, device=DEVICE)),
    ):
        plus, minus = torch.empty_like(latent), torch.empty_like(latent)
        fk.perturb_quantize_(plus, minus, latent, grad, alpha, norm, backend=backend, **options, **OPTIONS)
        g, theta, q = grad.clone(), latent.clone(), torch.empty_like(latent)
        fk.estimate_gradient_(g, *losses, alpha, norm, backend=backend, **options, **OPTIONS)
        first, second = (torch.full((20001,), 1e-3, device=DEVICE) for _ in range(2))
        fk.estimate_adamw_(
            theta, grad, first, second, *losses, alpha, norm, lr=rate, optimizer_step=number, quantized=q,
            backend=backend, **options, **OPTIONS,
        )  # fmt: skip
        found.append((plus, minus, g, theta, first, second, q))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_thousand_small_tensors_and_a_few_large_ones_equal_the_reference(backend):
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    sizes = [*torch.randint(0, 2000, (1000,), generator=generator).tolist(), 3 * 16384 + 5, 2**20, 2**18 + 3]
    latents, grads = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(2))
    alphas = [torch.rand(1, generator=generator) + 0.1 for _ in sizes]
    norm = fk.guide_norm(grads, alphas, grid=GRID, backend="reference")
    options = {"one_minus_beta": 1e-3, "seed": 3, "step": 2, "grid": GRID, "straight_through": STRAIGHT_THROUGH}
    expected, out = ([torch.full_like(t, float("nan")).to(d) for t in latents] for d in ("cpu", DEVICE))
    fk.perturb_quantize_(expected, None, latents, grads, alphas, norm, backend="reference", **options)
    moved = ([t.to(DEVICE) for t in ts] for ts in (latents, grads, alphas))
    fk.perturb_quantize_(out, None, *moved, norm.to(DEVICE), backend=backend, **options)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(out, expected, strict=True))


def test_ops_follow_the_current_stream(backend):
    latent, grad, alpha = big(2**24)
    norm = fk.guide_norm(grad, alpha, grid=GRID, backend=backend)
    options = {"one_minus_beta": 1e-3, "seed": 3, "backend": backend, **OPTIONS}
    expected, out = torch.empty_like(latent), torch.empty_like(latent)
    fk.perturb_quantize_(expected, None, latent, grad, alpha, norm, **options)
    late = torch.zeros_like(latent)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(latent)  # the op must wait for this
        fk.perturb_quantize_(out, None, late, grad, alpha, norm, **options)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_norm_has_the_same_bits_every_time(backend):
    _, grad, alpha = big(2**24 + 3)
    found = {float(fk.guide_norm(grad, alpha, grid=GRID, backend=backend)) for _ in range(20)}
    assert len(found) == 1


# ---- alphas from data


def test_alphas_take_two_launches_that_wait_for_nothing_and_can_be_captured(backend):
    tensors = [torch.randn(s, device=DEVICE) for s in ((3, 100_000), (5000, 7), (64, 128))]
    alphas = [torch.empty(t.shape[0], 1, device=DEVICE) for t in tensors]

    def measure():
        fk.measure_alphas_(alphas, tensors, statistic="rms", backend=backend)

    measure()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        measure()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert launched(measure) == {"measure_kernel": 1, "join_kernel": 1}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        measure()
    for factor in (2.0, 0.25):
        for t, alpha in zip(tensors, alphas, strict=True):
            t.mul_(factor)
            alpha.fill_(float("nan"))
        graph.replay()
        for t, alpha in zip(tensors, alphas, strict=True):
            wanted = t.double().square().mean(1, keepdim=True).sqrt()
            torch.testing.assert_close(alpha.double(), wanted, rtol=1e-6, atol=0)


def test_alphas_of_more_elements_than_32_bits_count(backend):
    n = 2**31 + 2**20 + 11
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    x, alpha = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE), torch.empty((), device=DEVICE)
    x[-1], x[2**31 + 3] = 5.0, -3.0
    for statistic, wanted in (("absmax", 5.0), ("absmean", 8 / n)):
        fk.measure_alphas_(alpha, x, statistic=statistic, backend=backend)
        assert alpha.item() == pytest.approx(wanted, rel=1e-6)


# ---- the backends give the same


def everything(backend, distribution, dtypes, device, seed):
    """What each op computes on one list of awkward tensors, moved to the CPU; losses of two directions."""
    generator = torch.Generator().manual_seed(seed)
    latent_t, grad_t, out_t = dtypes
    shapes = [(33, 40), (7, 13), (1,), (0, 8), (3, 8 * 2051)]
    thetas = [torch.randn(s, generator=generator).to(device, latent_t) for s in shapes]
    grads = [(torch.randn(s, generator=generator) * 1e-2).to(device, grad_t) for s in shapes]
    alphas = [
        (torch.rand((s[0], 1) if len(s) > 1 else (1,), generator=generator) + 0.1).to(device) for s in shapes
    ]
    losses = torch.rand(2, 2, generator=generator).to(device)
    options = {
        "grid": fk.Grid.half_offset(3), "straight_through": fk.StraightThrough("identity", noise=distribution),
        "one_minus_beta": 0.3, "seed": 2**63 + 5, "step": 9, "backend": backend,
    }  # fmt: skip
    norm = torch.tensor(3.5, device=device)
    plus, minus, q = ([torch.full_like(t, 99, dtype=out_t) for t in thetas] for _ in range(3))
    fk.perturb_quantize_(plus, minus, thetas, grads, alphas, norm, **options)
    estimates = [g.clone() for g in grads]
    fk.estimate_gradient_(estimates, *losses, alphas, norm, **options)
    first, second = ([torch.full(s, 1e-3, device=device) for s in shapes] for _ in range(2))
    fk.estimate_adamw_(  # with no losses G = g, which is equal: so is all that follows
        thetas, grads, first, second, *losses[:, :0], alphas, norm, lr=0.1, optimizer_step=2, quantized=q,
        **options,
    )  # fmt: skip
    u = [fk.noise(5003, distribution, seed=7, layout=(3, 5003, 5003), device=device, backend=backend)]
    found = {"plus": plus, "minus": minus, "estimates": estimates, "thetas": thetas, "first": first,
             "second": second, "q": q, "u": u}  # fmt: skip
    return {name: [t.cpu().float() for t in ts] for name, ts in found.items()}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtypes", [
    (torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.int8),
], ids=str)  # fmt: skip
def test_gpu_and_reference_give_the_same(backend, distribution, dtypes, generator):
    """Bit for bit, but for noise that is not exact, and for sums over directions."""
    seed = generator.initial_seed() % 2**31
    found = everything(backend, distribution, dtypes, DEVICE, seed)
    expected = everything("reference", distribution, dtypes, torch.device("cpu"), seed)
    for name in ("thetas", "first", "second", "q", *(("plus", "minus", "u") if distribution in EXACT else ())):
        assert all(map(torch.equal, found[name], expected[name])), name
    for one, other in zip(found["estimates"], expected["estimates"], strict=True):
        # |B / delta| is at most 1.8 * 0.55 / 0.1, and m is within 1e-4; then an ulp of bfloat16
        torch.testing.assert_close(one, other, rtol=2.0**-7, atol=2e-3)
    if distribution not in EXACT:
        assert (found["u"][0] - expected["u"][0]).abs().max() <= M_TOLERANCE[backend][distribution] + 4e-6
        different = sum(int((a != b).sum()) for a, b in zip(found["plus"], expected["plus"], strict=True))
        assert different <= sum(t.numel() for t in found["plus"]) * 1e-3  # those near a tie of rounding


@pytest.mark.parametrize("call", calls(), ids=lambda call: call.name.replace(", ", " "))
def test_every_op_gives_what_the_reference_does(backend, call):
    """Also transforms, alphas from data, and gradients of learned scales."""
    assert compared(call, Place(DEVICE, backend)) == []
