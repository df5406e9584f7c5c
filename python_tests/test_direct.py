"""A module's forward outside of passes, by native code: the bits, gradients and errors of the usual way."""

import copy
import warnings

import pytest
import torch
from support.layers import LAYERS
from torch import nn

import fogzo_kernels as fk
from fogzo_kernels.backends.gpu import plans
from fogzo_kernels.nn import quantized
from fogzo_kernels.nn.direct import Direct
from fogzo_kernels.nn.parameter import VALUES

PRESETS = {
    "lsq": fk.presets.lsq(3),
    "lsq rows": fk.presets.lsq(3, "row"),
    "fixed": fk.presets.fixed(3, 0.1),
    "half offset": fk.Quantizer(fk.Grid.half_offset(2), fk.Scale.fixed(0.2), fk.StraightThrough("identity")),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["cpu", "triton"])
def backend(request, monkeypatch):
    """The backend that quantizes modules: the best one, or Triton by its name."""
    if request.param == "triton":
        if reason := fk.available_backends("cpu")["triton"]:
            pytest.skip(f"backend triton: {reason}")
        monkeypatch.setenv("FOGZO_BACKEND", "triton")
    return request.param


def direct(module):
    return vars(module)[VALUES].direct


def outcome(module, x, upstream):
    """Output and gradients of a training forward."""
    module.zero_grad()
    y = module(x)
    (y * upstream).sum().backward()
    return [y.detach(), *[p.grad for p in module.parameters()]]


def same(a, b):
    return all((s is None and t is None) or torch.equal(s, t) for s, t in zip(a, b, strict=True))


def check_alike(module, x, monkeypatch):
    """The module and a copy, which goes the usual way, give the same output and gradients."""
    upstream = torch.randn(module(x).shape).to(module.weight.dtype)
    found = outcome(module, x, upstream)
    other = copy.deepcopy(module)
    assert direct(other) is None
    usual(monkeypatch)
    assert same(found, outcome(other, x, upstream))
    assert direct(other) is None


def usual(monkeypatch):
    monkeypatch.setattr(quantized, "direct_values", lambda module: None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding"])
def test_it_gives_the_bits_of_the_usual_way(name, preset, dtype, monkeypatch):
    module, x = LAYERS[name].make(), LAYERS[name].input()
    fk.quantize_model(module, PRESETS[preset])
    module.to(dtype)
    x = x if x.dtype == torch.int64 else x.to(dtype)
    module(x)
    assert isinstance(direct(module), Direct)
    check_alike(module, x, monkeypatch)


def test_large_weights_are_cut_into_ranges(monkeypatch):
    """Alphas of rows that several ranges share get one sum."""
    module, x = nn.Linear(70_001, 3, bias=False), torch.randn(2, 70_001)
    fk.quantize_model(module, fk.presets.lsq(2, "row"))
    module(x)
    assert isinstance(direct(module), Direct)
    check_alike(module, x, monkeypatch)


def linear(preset="lsq"):
    module, x = nn.Linear(16, 8), torch.randn(3, 16)
    fk.quantize_model(module, PRESETS[preset])
    module(x)
    assert isinstance(direct(module), Direct)
    return module, x


CHANGES = {
    "data of the weight": lambda m: setattr(m.weight, "data", torch.randn(8, 16)),
    "the weight in place": lambda m: m.weight.data.neg_(),
    "a transposed weight": lambda m: setattr(m.weight, "data", torch.randn(16, 8).t()),
    "a weight": lambda m: (setattr(m, "weight", nn.Parameter(torch.randn(8, 16))), m.calibrate_()),
    "data of alpha": lambda m: setattr(m.alpha, "data", torch.full_like(m.alpha, 0.25)),
    "alpha in place": lambda m: m.alpha.data.mul_(3),
    "alphas of rows": lambda m: m.set_alpha(torch.rand(8, 1) + 0.1),
    "the dtype": lambda m: m.bfloat16().float(),
    "the backend": lambda m: setattr(m, "backend", "reference"),
    "state": lambda m: m.load_state_dict({"weight": torch.randn(8, 16)}, strict=False),
    "a frozen weight": lambda m: m.weight.requires_grad_(False),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("preset", ["lsq", "fixed"])
def test_it_sees_what_has_changed(preset, change, monkeypatch):
    module, x = linear(preset)
    CHANGES[change](module)
    check_alike(module, x, monkeypatch)


def test_a_frozen_alpha_gets_no_gradient():
    module, x = linear()
    module.alpha.requires_grad_(False)
    module.zero_grad()
    module(x).sum().backward()
    assert module.alpha.grad is None
    assert module.weight.grad is not None


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_learned_alpha_out_of_range_is_held(value):
    module, x = linear()
    with torch.no_grad():
        module.alpha.fill_(value)
    with pytest.warns(UserWarning, match="out of range, and it is held"):
        module(x)
    assert module.alpha == module.alpha_least
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module(x).isfinite().all()


def test_a_fixed_alpha_out_of_range_is_an_error():
    module, x = linear("fixed")
    module.alpha.zero_()
    with pytest.raises(ValueError, match="alpha must be finite, > 0"):
        module(x)
    module.alpha.fill_(0.1).requires_grad_()
    with pytest.raises(ValueError, match="alpha must not require grad"):
        module(x)


def test_a_weight_that_changes_before_the_backward_is_an_error():
    module, x = linear()
    y = module(x)
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_that_of_the_usual_way(monkeypatch):
    def found(module):
        x = torch.ones(3, 16, requires_grad=True)
        (grad,) = torch.autograd.grad(module(x).square().sum(), [module.weight], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x])

    module, _ = linear("fixed")
    expected, other = found(module), copy.deepcopy(module)
    usual(monkeypatch)
    assert same(expected, found(other))


def test_a_gradient_of_other_strides_is_read_right(monkeypatch):
    module, _ = linear()
    upstream = torch.randn(16, 8).t()

    def grads(module):
        return torch.autograd.grad(module.effective_weight(), [module.weight, module.alpha], upstream)

    found = grads(module)
    usual(monkeypatch)
    assert same(found, grads(module))


def test_the_environment_chooses_the_backend(monkeypatch):
    module, x = linear()
    monkeypatch.setenv("FOGZO_BACKEND", "nope")
    with pytest.raises(ValueError, match="FOGZO_BACKEND must be one of"):
        module(x)
    monkeypatch.setenv("FOGZO_BACKEND", "reference")
    expected = module(x)
    monkeypatch.delenv("FOGZO_BACKEND")
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    "preset", [fk.presets.bitnet(), fk.presets.quest(3, block=16)], ids=["measured", "rotated"]
)
def test_measured_and_rotated_weights_are_right_too(preset, monkeypatch):
    module, x = nn.Linear(16, 8), torch.randn(3, 16)
    fk.quantize_model(module, preset)
    check_alike(module, x, monkeypatch)


@pytest.mark.parametrize("preset", ["fixed", "lsq rows"])
@pytest.mark.parametrize("shape", [(3, 7), (8, 16), (130, 1000)])
def test_tensors_that_are_not_aligned_are_right_too(shape, preset, monkeypatch):
    module = nn.Linear(*shape[::-1])
    fk.quantize_model(module, PRESETS[preset])
    memory = torch.randn(module.weight.numel() + 1)
    module.weight.data = memory[1:].view(shape)
    assert module.weight.data_ptr() % 16
    upstream = torch.randn(shape[0] * shape[1] + 3)[3:].view(shape)

    def found():
        values = module.effective_weight()
        parameters = [p for name, p in module.named_parameters() if name != "bias"]
        return [values, *torch.autograd.grad(values, parameters, upstream)]

    own = found()
    assert isinstance(direct(module), Direct)
    usual(monkeypatch)
    assert same(own, found())


def test_outputs_and_gradients_need_no_plan_of_their_own(backend, monkeypatch):
    if backend != "triton":
        pytest.skip("plans are of GPU backends")
    module, x = linear()
    module(x).sum().backward()
    monkeypatch.setattr(plans, "of_key", lambda *args: pytest.fail("a plan was made"))
    kept = [module(torch.randn(rows, 16)) for rows in (1, 5, 9)]
    for y in kept:
        y.sum().backward()


def test_a_profiler_at_the_first_forward_is_not_remembered():
    module, x = nn.Linear(16, 8), torch.randn(3, 16)
    fk.quantize_model(module, PRESETS["lsq"])
    with torch.profiler.profile() as profile:
        module(x)
    assert any("fogzo::quantize" in event.key for event in profile.key_averages())
    assert direct(module) is None
    module(x)
    assert isinstance(direct(module), Direct)


def test_native_code_holds_nothing_of_a_module_that_is_gone():
    from fogzo_kernels import _C

    before = _C.held_lists()
    module, _ = linear()
    assert _C.held_lists() > before
    del module
    assert _C.held_lists() == before
