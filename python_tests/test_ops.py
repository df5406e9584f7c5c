"""The ops as PyTorch sees them: schemas, compiled graphs, the choice of a backend, empty input."""

import copy

import pytest
import torch
from support.compiling import compiled
from support.samples import (
    MIX,
    ON_BACKENDS,
    arguments,
    f64,
    i64,
    samples,
    tensors,
)
from support.spoiled import raises_and_writes_nothing
from torch import nn

import fogzo_kernels as fk
from fogzo_kernels import backends

GRID, STRAIGHT_THROUGH = fk.Grid.uniform(2), fk.StraightThrough()
ON_GRID = {"grid": GRID, "straight_through": STRAIGHT_THROUGH}


@pytest.fixture(autouse=True)
def _no_graphs_from_other_tests():
    torch._dynamo.reset()


# ---- schemas, fakes, autograd


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("fogzo::") for name in names if name.startswith("fogzo::"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", registered())
def test_every_op_passes_opcheck(op, dtype, backend, device):
    torch.library.opcheck(getattr(torch.ops.fogzo, op).default, samples(device, dtype, backend)[op])


@pytest.mark.parametrize("op", ["estimate_gradient_", "estimate_update_"])
def test_guided_noise_is_without_losses(backend, device, op):
    """In the schemas of PyTorch's ops, which say so by a flag of its own."""
    op = getattr(torch.ops.fogzo, op).default
    names, values = [a.name for a in op._schema.arguments], samples(device, torch.float32, backend)[op._opname]
    args = dict(zip(names, values, strict=False)) | {"block": 0, "noise_factors": torch.ones(2, device=device)}
    before = [t.clone() for t in args["grads"]]
    with pytest.raises(ValueError, match=r"losses_plus must have 0\.\.0 entries, got 2"):
        op(**args, guided=True)
    assert all(map(torch.equal, args["grads"], before))
    args |= {name: torch.empty(0, device=device) for name in ("losses_plus", "losses_minus")}
    torch.library.opcheck(op, (), {**args, "guided": True})


# ---- compiled


def call(op, backend):
    return lambda args: getattr(fk, op)(**args, backend=backend)


def same_as_eager(function, graph, make):
    """The compiled function returns and writes the same bits."""
    eager, traced = make(), make()
    expected, found = function(eager), graph(traced)
    assert (expected is None) == (found is None)
    assert expected is None or torch.equal(expected, found)
    for a, b in zip(tensors(eager), tensors(traced), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", ON_BACKENDS)
def test_compiled_is_eager_bit_for_bit(op, backend, device):
    function = call(op, backend)
    graph, counter = compiled(function)
    same_as_eager(function, graph, lambda: arguments(op, device))
    assert counter.frame_count == 1


def test_a_whole_step_compiles_into_one_graph(backend, device):
    """Norm, probes and estimate, as a compiled training step would call them."""
    shared = {**ON_GRID, "one_minus_beta": 0.25, "seed": 1, "backend": backend}

    def step(args):
        norm = fk.guide_norm(args["grads"], args["alphas"], grid=GRID, backend=backend)
        fk.perturb_quantize_(**args, norm=norm, **shared)
        plus, minus = ([q.square().sum() for q in args[name]] for name in ("plus", "minus"))
        losses = torch.stack(plus[:1]), torch.stack(minus[:1])
        fk.estimate_gradient_(args["grads"], *losses, args["alphas"], norm, **shared)
        return norm

    def make():
        args = arguments("perturb_quantize_", device)
        return {name: args[name] for name in ("plus", "minus", "latents", "grads", "alphas")}

    graph, counter = compiled(step)
    same_as_eager(step, graph, make)
    assert counter.frame_count == 1


@pytest.mark.parametrize("clip", [True, "trust"])
def test_compiled_quantize_has_the_eager_gradient(clip, backend, device):
    options = {"grid": GRID, "straight_through": fk.StraightThrough(clip=clip), "backend": backend}

    def loss(latent, alpha, weight):
        return (fk.quantize(latent, alpha, **options) * weight).sum()

    graph, counter = compiled(loss)
    results = []
    for function in (loss, graph):
        args = arguments("perturb_quantize_", device)
        latent = args["latents"][1].requires_grad_()
        value = function(latent, args["alphas"][1], args["grads"][1])
        value.backward()
        results.append((value, latent.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert 0 < results[0][1].count_nonzero() < results[0][1].numel()  # clipped, but not all
    assert counter.frame_count == 1


def test_a_bad_call_does_not_compile():
    graph, _ = compiled(call("quantize_", "reference"))
    args = arguments("quantize_", "cpu")
    args["out"] = args["out"][::-1]
    with pytest.raises(Exception, match=r"out\[0\] must have shape \(3,\), got \(4, 8\)"):
        graph(args)
    assert all(t.isnan().all() for t in args["out"])


# ---- values that change each step


def values_of_step(i, args, device):
    """New values of all that changes from step to step, as tensors."""
    known = {
        "seed": i64(2**62 + 7 * i), "step": i64(3 + i), "one_minus_beta": f64(0.1 + i / 8),
        "norm": torch.tensor(0.5 + i, device=device),
        "losses_plus": torch.tensor([1.0 + i, -0.5], device=device),
        "losses_minus": torch.tensor([0.25, 2.0 * i], device=device),
    }  # fmt: skip
    return args | {name: value for name, value in known.items() if name in args}


@pytest.mark.parametrize("op", [*MIX, "noise"])
def test_new_tensor_values_do_not_recompile(op, backend, device):
    function = call(op, backend)
    graph, counter = compiled(function)
    counts = []
    for i in range(5):
        same_as_eager(function, graph, lambda: values_of_step(i, arguments(op, device), device))  # noqa: B023
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 5


@pytest.mark.parametrize("op", [*MIX, "noise"])
def test_new_int_values_recompile_once(op, backend, device):
    """The first change makes the numbers symbolic; 2^63, where they wrap, is one more case."""
    function = call(op, backend)
    graph, counter = compiled(function)
    counts = []
    for first in (1, 2**63 + 5):
        for i in range(6):
            names = {"seed": first + i * 2**40, "step": 2 + 1000 * i}
            same_as_eager(function, graph, lambda: arguments(op, device) | names)  # noqa: B023
            counts.append(counter.frame_count)
    assert counts[1] <= counts[0] + 1
    assert counts[1:6] == counts[1:2] * 5
    assert counts[6:] == counts[6:7] * 6
    assert counts[6] <= counts[5] + 1


# ---- models


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 4))
    return model


def train(model, forward, data, target, steps, counter=None, **options):
    """Every loss of every pass, the last weights, and graphs compiled after each step."""
    fogzo = fk.Fogzo(model, total_steps=steps, kappa=16.0, seed=3, **{"directions": 1} | options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, graphs = [], []

    def closure():
        loss = nn.functional.cross_entropy(forward(data), target)
        losses.append(loss.detach().clone())
        return loss

    torch.manual_seed(7)  # dropout
    for _ in range(steps):
        fogzo.backward(closure)
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(counter.frame_count if counter else 0)
    return losses, [p.detach().clone() for p in model.parameters()], graphs


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_compiled_model_trains_like_the_plain_one(start, backend, device):
    """One graph with gradients and one without; probes are written and taken away between them."""
    steps = 6
    plain = network()
    fk.quantize_model(plain, fk.Quantizer(GRID, fk.Scale.fixed(0.125), STRAIGHT_THROUGH), backend=backend)
    plain.to(device)
    model = copy.deepcopy(plain)
    forward, counter = compiled(model)
    generator = torch.Generator().manual_seed(11)
    data = torch.randn(32, 8, generator=generator).to(device)
    target = torch.randint(4, (32,), generator=generator).to(device)
    options = {"start": start, "backend": backend, "directions": 2}
    losses, weights, _ = train(plain, plain, data, target, steps, **options)
    found, found_weights, graphs = train(model, forward, data, target, steps, counter, **options)
    first = int(start * steps)  # the first step with probes
    assert len(losses) == first + 5 * (steps - first) + 2  # the first step with probes looks twice more
    assert all(torch.equal(a, b) for a, b in zip(losses, found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, found_weights, strict=True))
    assert graphs[first:] == [2] * (steps - first)
    assert len({loss.item() for loss in losses}) > steps  # probes were not the plain forward


def test_a_probe_is_read_when_the_graph_runs(backend, device):
    """Writing or replacing it is seen by the graph and does not compile another."""
    model = nn.Linear(8, 4, bias=False)
    fk.quantize_model(model, fk.Quantizer(GRID, fk.Scale.fixed(0.5), STRAIGHT_THROUGH), backend=backend)
    model.to(device)
    forward, counter = compiled(model)
    x = torch.eye(8, device=device)
    with torch.no_grad():
        q = forward(x)
        model.probe = torch.ones(4, 8, device=device)
        assert torch.equal(forward(x), torch.ones(8, 4, device=device))
        graphs = counter.frame_count
        model.probe.fill_(3.0)
        assert torch.equal(forward(x), torch.full((8, 4), 3.0, device=device))
        model.probe = torch.full((4, 8), 5.0, device=device)
        assert torch.equal(forward(x), torch.full((8, 4), 5.0, device=device))
        model.probe = None
        assert torch.equal(forward(x), q)
    assert counter.frame_count == graphs == 2


# ---- backends that do not run


@pytest.mark.parametrize("op", ON_BACKENDS)
def test_variable_names_an_unknown_backend(op, monkeypatch):
    monkeypatch.setenv("FOGZO_BACKEND", "abacus")
    message = "FOGZO_BACKEND must be one of cpu, triton, cuda, reference, got 'abacus'"
    raises_and_writes_nothing(op, arguments(op, "cpu"), ValueError, message)


@pytest.mark.parametrize("op", ON_BACKENDS)
def test_an_unavailable_backend_says_why(op, backend, device, monkeypatch):
    monkeypatch.setattr(backends.load(backend), "unavailable", lambda device: "it is out of order")
    message = f"'{backend}' is unavailable on {device}.*: it is out of order"
    args = arguments(op, device)
    raises_and_writes_nothing(op, args | {"backend": backend}, RuntimeError, f"backend {message}")
    monkeypatch.setenv("FOGZO_BACKEND", backend)
    raises_and_writes_nothing(op, args, RuntimeError, f"FOGZO_BACKEND {message}")


def test_a_backend_that_cannot_be_imported_says_why(monkeypatch):
    load = backends.load
    reason = "cannot be imported: No module named 'abacus'"
    monkeypatch.setattr(backends, "load", lambda name: reason if name == "cpu" else load(name))
    args = arguments("quantize_", "cpu")
    message = f"backend 'cpu' is unavailable on cpu: {reason}"
    raises_and_writes_nothing("quantize_", args | {"backend": "cpu"}, RuntimeError, message)
    fk.quantize_(**args)  # without a name the next one is taken
    assert not args["out"][0].isnan().any()


def test_a_backend_on_a_device_that_it_does_not_serve_says_why():
    with pytest.raises(RuntimeError, match="backend 'cpu' is unavailable on meta: it runs on the CPU"):
        fk.noise(4, "uniform", seed=1, device="meta", backend="cpu")


# ---- legal, though nothing or little is there


def run_all(shapes, backend, device, alpha_of=lambda t: torch.tensor(0.5), **names):
    """Every list op on tensors of these shapes: what each of them wrote."""
    generator = torch.Generator().manual_seed(9)
    latents, grads = ([torch.randn(s, generator=generator).to(device) for s in shapes] for _ in "ab")
    alphas = [alpha_of(t).to(device) for t in latents]
    plus, minus, out = ([torch.full_like(t, float("nan")) for t in latents] for _ in "abc")
    given = {"one_minus_beta": 0.25, "seed": 1, "backend": backend, **ON_GRID, **names}
    norm = fk.guide_norm(grads, alphas, grid=GRID, backend=backend)
    fk.perturb_quantize_(plus, minus, latents, grads, alphas, norm, **given)
    fk.quantize_(out, latents, alphas, grid=GRID, backend=backend)
    smoothed = [g.clone() for g in grads]
    fk.straight_through_backward_(smoothed, latents, alphas, **ON_GRID, backend=backend)
    losses = torch.tensor([2.0], device=device), torch.tensor([0.5], device=device)
    fk.estimate_gradient_(grads, *losses, alphas, norm, **given)
    return [norm, *plus, *minus, *out, *smoothed, *grads]


def test_empty_tensors_change_nothing_for_the_others(backend, device):
    """They change nothing for the others, wherever they stand in the list."""
    names = {"tensor_ids": [4, 5, 6, 7, 8], "layouts": None}
    shapes = [(0,), (4, 8), (0, 5), (5, 0), (2, 0, 3)]
    found = run_all(shapes, backend, device, **names)
    expected = run_all([(4, 8)], backend, device, tensor_ids=[5])
    assert [tuple(t.shape) for t in found] == [(), *shapes * 5]
    for a, b in zip([t for t in found if t.numel()], expected, strict=True):
        assert torch.equal(a, b)
    rows = run_all([(5, 0), (0, 5)], backend, device, lambda t: torch.ones(t.shape[0], 1))
    assert rows[0] == 0


def test_a_tensor_without_dimensions_is_one_element(backend, device):
    found = run_all([()], backend, device)
    expected = run_all([(1,)], backend, device)
    assert all(a.shape == () and a == b for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter, on inf * 0
def test_empty_lists_are_no_error_and_count_what_is_lost(backend, device):
    if device.type == "cpu":  # a list without tensors names no other device
        assert run_all([], backend, device) == [torch.tensor(0.0)]
    given = {"one_minus_beta": 0.5, "seed": 1, "backend": backend, **ON_GRID}
    norm = torch.tensor(float("inf"), device=device)
    fk.perturb_quantize_(None, None, [], [], [], norm, **given)
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    losses = (torch.tensor(x, device=device) for x in ([1.0, float("nan")], [0.5, 0.5]))
    fk.estimate_gradient_([], *losses, [], norm, counters=counters, **given)
    assert counters.tolist() == [1, 1, 0]  # what was lost is lost for empty lists, too


def test_noise_of_no_elements_is_empty():
    for layout in (None, (0, 1, 1), (2**51 - 1, 8, 8)):
        u = fk.noise(0, "gaussian", seed=1, layout=layout, backend="reference")
        assert u.shape == (0,)


@pytest.mark.parametrize("op", [op for op in ON_BACKENDS if op not in ("noise", "quantize")])
def test_bare_tensors_are_lists_of_one(op, backend, device):
    lists, bare = arguments(op, device), arguments(op, device)
    if "noise_factors" in lists:
        lists["noise_factors"] = bare["noise_factors"] = lists["noise_factors"][1:].clone()
    for name, value in lists.items():
        if isinstance(value, list):
            lists[name], bare[name] = value[1:], bare[name][1]
            if name in ("tensor_ids", "layouts"):
                bare[name] = lists[name]
    expected, found = call(op, backend)(lists), call(op, backend)(bare)
    assert expected is None or torch.equal(expected, found)
    assert all(torch.equal(a, b) for a, b in zip(tensors(lists), tensors(bare), strict=True))


def test_shards_of_one_tensor_share_its_id(backend, device):
    """Halves of a row-major tensor in one list are the tensor."""
    whole = [[torch.zeros(4, 8, device=device)], [torch.ones(4, 8, device=device)]]
    halves = [[t.clone() for t in x[0].split(2)] for x in whole]
    alpha, norm = torch.tensor(0.5, device=device), torch.tensor(2.0, device=device)
    results = []
    for (latents, grads), layouts in (
        (whole, [(0, 32, 32)]),
        (halves, [(0, 16, 16), (16, 16, 16)]),
    ):
        plus = [torch.full_like(t, float("nan")) for t in latents]
        fk.perturb_quantize_(
            plus,
            None,
            latents,
            grads,
            [alpha] * len(latents),
            norm,
            **ON_GRID,
            one_minus_beta=0.9,
            seed=1,
            tensor_ids=[4] * len(latents),
            layouts=layouts,
            epsilon_scale=8.0,
            backend=backend,
        )
        results.append(torch.cat(plus))
    assert torch.equal(*results)
    assert not torch.equal(results[0][:2], results[0][2:])  # the halves drew different noise


@pytest.mark.parametrize("value", [2.0**-100, 2.0**100])
def test_alphas_at_the_ends_of_their_range_quantize(value, backend, device):
    latent = torch.tensor([-3.0, 0.0, 3.0], device=device) * value
    out = torch.full((3,), 77, dtype=torch.int8, device=device)
    alpha = torch.tensor(value, device=device)
    fk.quantize_(out, latent, alpha, grid=GRID, backend=backend)
    assert out.tolist() == [-2, 0, 1]
