"""Any parameter of any module: what its forward reads is Q, and what everybody else reads is the parameter."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fogzo_kernels as fk
from fogzo_kernels.nn.registry import quantized_class
from fogzo_kernels.nn.weight import WeightQuantizer, alpha_of

PRESETS = {"fixed": fk.presets.fixed(3, 0.1), "lsq": fk.presets.lsq(2, "row"), "bitnet": fk.presets.bitnet()}


class Mixes(nn.Module):
    """A class that nobody has seen before: its matrix lies transposed, and a method of it reads the matrix."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 4))
        self.calls, self.enter, self.go = 0, None, None

    def mixed(self, x):
        return x @ self.matrix

    def forward(self, x, scale=1.0):
        self.calls += 1
        if self.enter is not None:
            self.enter.set()
            self.go.wait(20)
        return scale * self.mixed(x)


KINDS = {
    "own class": (Mixes, {"parameter": "matrix", "outputs": 1}, (3, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3), {"outputs": 1}, (2, 4, 5, 5)),
}


def made(kind="own class", preset="lsq"):
    """The plain module, the quantized one, and an input."""
    torch.manual_seed(0)
    make, options, shape = KINDS[kind]
    plain = make()
    module, q, form = copy.deepcopy(plain), PRESETS[preset], quantized_class(type(plain), **options)
    weight = module.get_parameter(form.PARAMETER)
    form.from_plain(module, WeightQuantizer(q, 0), alpha=alpha_of("weight", weight, form.OUTPUTS, q))
    return plain, module, torch.randn(shape)


def with_values(plain, module):
    """The plain module with Q in place of the latent."""
    twin = copy.deepcopy(plain)
    twin.get_parameter(module.PARAMETER).data = module.effective_weight().detach()  # a product rounds by order
    return twin


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_runs_with_values_and_the_latent_gets_the_gradient(kind, preset):
    plain, module, x = made(kind, preset)
    latent = module.get_parameter(module.PARAMETER)
    assert not torch.equal(module.effective_weight(), latent)
    twin = with_values(plain, module)
    expected, found = twin(x), module(x)
    assert torch.equal(found, expected)
    assert getattr(module, module.PARAMETER) is latent
    found.square().sum().backward()
    expected.square().sum().backward()
    through = module.quantizer.straight_through.clip is False
    grad, other = latent.grad, twin.get_parameter(module.PARAMETER).grad
    kept = torch.ones_like(grad, dtype=torch.bool) if through else grad != 0
    assert kept.any()
    torch.testing.assert_close(grad[kept], other[kept])


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_comes_back_and_the_plain_one_loads(kind):
    plain, module, x = made(kind)
    state, (_, other, _) = module.state_dict(), made(kind)
    assert {"alpha", "alpha_least"} == state.keys() - plain.state_dict().keys() - {"_extra_state"}
    with torch.no_grad():
        other.latent.neg_()
        other.alpha.mul_(3)
    other.load_state_dict(state)
    assert torch.equal(other(x), module(x))
    other.alpha.data.mul_(3)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_the_way_back(kind):
    plain, module, x = made(kind)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is type(module)
        assert torch.equal(twin(x), module(x))
        assert twin.latent is not module.latent
    assert type(module.to_plain()) is type(plain)
    assert torch.equal(module(x), plain(x))
    assert vars(module).keys() == vars(plain).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_move_it(kind):
    _, module, x = made(kind, "bitnet")
    fogzo, before = fk.Fogzo(module, total_steps=4, kappa=1.0, directions=1), module.latent.detach().clone()
    optimizer = fk.SGD(module.parameters(), lr=0.1, fogzo=fogzo)
    losses = []

    def closure():
        losses.append(module(x).square().mean())
        return losses[-1]

    optimizer.step(closure)
    assert len({float(loss.detach()) for loss in losses}) > 1  # probes differ
    assert not torch.equal(module.latent, before)


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_to_one_graph(kind):
    _, module, x = made(kind)
    forward = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, grads = [], []
    for run in (module, forward, module):
        found.append(run(x))
        found[-1].sum().backward()
        grads.append(module.latent.grad)
        module.latent.grad = None
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    torch.testing.assert_close(grads[1], grads[0])


class Compiles(Mixes):
    """A compiler begins inside the forward."""

    mixed = torch.compile(Mixes.mixed, backend="eager")


def test_a_compiler_that_begins_inside_the_forward_reads_values():
    torch.manual_seed(0)
    module, x, q = Compiles(), torch.randn(3, 6), PRESETS["lsq"]
    alpha = alpha_of("matrix", module.matrix, 1, q)
    quantized_class(Compiles, "matrix", 1).from_plain(module, WeightQuantizer(q, 0), alpha=alpha)
    for _ in range(2):
        assert torch.equal(module(x), x @ module.effective_weight())
        assert torch.equal(module.mixed(x), x @ module.latent)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_reads_values_again(reentrant):
    _, module, x = made()
    x.requires_grad_()
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    grad, module.latent.grad = module.latent.grad, None
    module(x).square().sum().backward()
    assert torch.equal(module.latent.grad, grad)


def test_a_compiled_checkpoint():
    _, module, x = made("transposed convolution")
    run = torch.compile(lambda x: checkpoint(module, x, use_reentrant=False), backend="aot_eager")
    assert torch.equal(run(x), module(x))


def test_threads_do_not_see_each_other():
    """While one thread is inside the forward, another reads the latent, and runs the forward to its end."""
    _, module, x = made()
    expected, found = module(x).detach(), []
    module.enter, module.go = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: found.append(module(x).detach()))
    thread.start()
    assert module.enter.wait(20)
    assert module.matrix is module.latent
    module.enter, go = None, module.go
    assert torch.equal(module(x), expected)
    go.set()
    thread.join()
    assert torch.equal(found[0], expected)


def test_an_error_in_the_forward_leaves_the_latent_readable():
    _, module, x = made()
    with pytest.raises(RuntimeError):
        module(x[:, :2])
    assert module.matrix is module.latent
    assert module.calls == 1


def test_arguments_by_name():
    _, module, x = made()
    assert torch.equal(module(scale=2.0, x=x), 2 * module(x))
    inputs = fk.presets.dynamic(8)
    module.activation = inputs
    assert not torch.equal(module(x), F.linear(x, module.effective_weight().t()))
    assert torch.equal(module(x=x), module(x))


def test_functional_call_takes_other_latents():
    _, module, x = made()
    other = {"matrix": 2 * module.matrix.detach()}
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.matrix.copy_(other["matrix"])
    assert torch.equal(functional_call(module, other, (x,)), twin(x))


def test_a_parametrized_weight_does_not_run_as_it_is():
    conv = nn.Conv2d(3, 4, 3)
    fk.quantize_model(conv, PRESETS["lsq"])
    parametrizations.weight_norm(conv)
    with pytest.raises(RuntimeError, match="weight must not be parametrized in a quantized Conv2d"):
        conv(torch.randn(1, 3, 4, 4))
