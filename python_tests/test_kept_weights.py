"""In evaluation Q of a weight is made once, and made anew after whatever happens to weight, alpha or module."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from support.layers import LAYERS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fogzo_kernels as fk
from fogzo_kernels.nn.module import QuantizedModule
from fogzo_kernels.nn.parameter import VALUES

PRESETS = {
    "lsq": fk.presets.lsq(3),
    "lsq rows": fk.presets.lsq(3, "row"),
    "fixed": fk.presets.fixed(3, 0.1),
    "measured": fk.presets.bitnet(),
    "rotated": fk.presets.quest(3, block=16),
}


def layer(preset="lsq", kind="linear"):
    """A quantized layer in evaluation, and an input."""
    if kind == "linear":
        module, x = nn.Linear(16, 16), torch.randn(3, 16)
    elif kind == "conv2d":
        module, x = nn.Conv2d(16, 4, 2), torch.randn(2, 16, 5, 5)
    else:
        module, x = nn.Embedding(8, 16), torch.tensor([[0, 5], [7, 1]])
    fk.quantize_model(module, PRESETS[preset])
    return module.eval(), x


def kept(module):
    return vars(module)[VALUES].kept


@pytest.fixture
def made(monkeypatch):
    """The modules that made Q, in the order in which they did."""
    modules, make = [], QuantizedModule.quantized_rows

    def counted(self):
        modules.append(self)
        return make(self)

    monkeypatch.setattr(QuantizedModule, "quantized_rows", counted)
    return modules


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_it_is_made_once_with_the_same_bits(preset, kind, first, made):
    module, x = layer(preset, kind)
    expected = module(x).detach()  # with grad: not kept
    assert kept(module) is None
    for guard in (first, torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with guard():
                assert torch.equal(module(x), expected)
    assert len(made) == 2
    assert not kept(module).value.requires_grad
    module.train()
    with torch.no_grad():
        module(x), module(x)
    assert len(made) == 4
    assert kept(module) is None


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_keeps_it(name, made):
    module, x = LAYERS[name].make(), LAYERS[name].input()
    fk.quantize_model(module, fk.presets.lsq(4))
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(x), module(x))
        assert torch.equal(module(x), copy.deepcopy(module)(x))
    assert made.count(module) == 1


def step_of_an_optimizer(module, x):
    with torch.enable_grad():
        module(x).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def step_of_fogzo(module, x):
    fogzo = fk.Fogzo(module, total_steps=10, kappa=0.1, directions=1)
    fk.AdamW(module.parameters(), lr=0.1, fogzo=fogzo).step(lambda: module(x).square().mean())


def other_values(module, x):
    module.latent.data = torch.randn_like(module.latent)


def same_address_for_another(module, x):
    """Two replacements, of which the second may get the memory that the first weight had."""
    other_values(module, x)
    other_values(module, x)


def load(module, x, assign=False):
    state = {k: v.clone() for k, v in module.state_dict().items()}
    state["weight"] += 0.3
    module.load_state_dict(state, assign=assign)


def edit_through_data(module, x):
    module.latent.data.mul_(-1)
    module.eval()


def edit_through_data_and_a_forward_with_grad(module, x):
    module.latent.data.mul_(-1)
    with torch.enable_grad():
        module(x)


def another_alpha(module, x):
    alpha = module.alpha.detach() * 1.5
    module.alpha = nn.Parameter(alpha) if module.quantizer.learned else alpha


def another_quantizer(module, x):
    how = module.quantizer
    grid = fk.Grid.uniform(3) if how.grid.offset else fk.Grid.half_offset(3)
    module.weight_quantizer.quantizer = fk.Quantizer(grid, how.scale, how.straight_through, how.transform)


CHANGES = {
    "in place": lambda m, x: m.latent.mul_(-0.9),
    "an optimizer": step_of_an_optimizer,
    "Fogzo": step_of_fogzo,
    ".data": other_values,
    ".data twice": same_address_for_another,
    ".data turned": lambda m, x: setattr(m.latent, "data", m.latent.data.t()),
    "load": load,
    "load with assign": lambda m, x: load(m, x, assign=True),
    "alpha in place": lambda m, x: m.alpha.mul_(1.5),
    "alpha.data": lambda m, x: setattr(m.alpha, "data", m.alpha.data * 1.5),
    "another alpha": another_alpha,
    "set_alpha": lambda m, x: m.set_alpha(m.alpha.detach() * 1.5),
    "calibrate_": lambda m, x: (m.latent.data.mul_(3), m.calibrate_()),
    "reset_parameters": lambda m, x: m.reset_parameters(),
    "bfloat16": lambda m, x: m.to(torch.bfloat16),
    "quantizer": another_quantizer,
    "edit through .data": edit_through_data,
    "edit through .data, and grad": edit_through_data_and_a_forward_with_grad,
}


#: Changes that the next forward of a measured alpha undoes.
MEASURED_ANEW = ("alpha in place", "alpha.data", "another alpha", "set_alpha")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_change_is_seen(preset, change):
    module, x = layer(preset)
    with torch.no_grad():
        before = module(x)
        assert kept(module) is not None
        CHANGES[change](module, x)
        x = x.to(module.latent.dtype)
        after, expected = module(x), copy.deepcopy(module)(x)
    assert torch.equal(after, expected)
    measured = preset in ("measured", "rotated") and change in MEASURED_ANEW
    assert torch.equal(before, after.to(before.dtype)) == measured


@pytest.mark.parametrize("preset", PRESETS)
def test_a_weight_put_in_its_place_is_refused(preset):
    module, x = layer(preset)
    with torch.no_grad():
        module(x)
        module.weight = nn.Parameter(torch.randn(16, 16))
        with pytest.raises(RuntimeError, match="was replaced after its alpha was made"):
            module(x)


def test_another_backend_is_asked():
    module, x = layer()
    with torch.no_grad():
        module(x)
        module.backend = "abacus"
        with pytest.raises(ValueError, match="backend must be one of"):
            module(x)


def test_a_fixed_alpha_must_not_require_grad():
    module, x = layer("fixed")
    with torch.no_grad():
        module(x)
        module.alpha.requires_grad_()
        with pytest.raises(ValueError, match="alpha must not require grad"):
            module(x)


def test_an_alpha_that_left_its_range_is_held_and_a_fixed_one_refused():
    module, x = layer("lsq")
    with torch.no_grad():
        module(x)
        module.alpha.fill_(-1.0)
        with pytest.warns(UserWarning, match="drove a learned alpha out of range"):
            module(x)
        assert torch.equal(module.alpha, module.alpha_least)
        module, x = layer("fixed")
        module(x)
        module.alpha.fill_(-1.0)
        with pytest.raises(ValueError, match="must be finite, > 0"):
            module(x)


def test_tied_weights():
    model = nn.Sequential(nn.Embedding(16, 16), nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    fk.quantize_model(model, fk.presets.lsq(3))
    model.eval()
    x = torch.tensor([1, 2])
    with torch.no_grad():
        model(x)
        for tensor in (model[0].latent, model[0].alpha):
            tensor.mul_(1.3)
            assert torch.equal(model(x), copy.deepcopy(model)(x))


DROPS = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "to": lambda m: m.to(torch.bfloat16),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "set_alpha": lambda m: m.set_alpha(m.alpha.detach().clone()),
    "dequantize_model": lambda m: fk.dequantize_model(m),
}


@pytest.mark.parametrize("drop", DROPS)
def test_its_memory_is_freed(drop):
    module, x = layer()
    with torch.no_grad():
        module(x)
    memory = [weakref.ref(kept(module)), weakref.ref(kept(module).value)]
    DROPS[drop](module)
    gc.collect()
    assert [ref() for ref in memory] == [None, None]


def test_it_is_neither_saved_nor_copied():
    module, x = layer()
    keys = set(module.state_dict())
    with torch.no_grad():
        y = module(x)
        assert set(module.state_dict()) == keys
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert kept(other) is None
            assert torch.equal(other(x), y)


# ---- what must not run with it


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_profilers_and_traces_see_the_op():
    module, x = layer()
    with torch.no_grad():
        y = module(x)
        with Seen() as seen:
            module(x)
        assert any("fogzo.quantize" in op for op in seen.ops)
        module(x)
        with torch.profiler.profile() as profile:
            module(x)
        assert any("fogzo::quantize" in event.key for event in profile.key_averages())
        module(x)
        assert "fogzo::quantize" in str(torch.jit.trace(module, x, check_trace=False).inlined_graph)
        assert torch.equal(torch.vmap(module)(x), y)
        module(x)
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(module)
        program = torch.export.export(module, (x,))
        assert any("fogzo.quantize" in str(node.target) for node in program.graph.nodes)


def test_compiled_modules_follow_the_weight():
    module, x = layer()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x), module(x))
            module.latent.data.mul_(-1)
            assert torch.equal(compiled(x), copy.deepcopy(module)(x))
            module.eval()


def test_weights_of_functional_call_and_of_grad():
    module, x = layer()
    other = {"weight": torch.randn(16, 16)}
    with torch.no_grad():
        y = module(x)
        changed = copy.deepcopy(module)
        changed.latent.copy_(other["weight"])
        assert torch.equal(torch.func.functional_call(module, other, (x,)), changed(x))
        assert torch.equal(module(x), y)
    module(x).sum().backward()
    assert module.latent.grad is not None


def test_tensors_whose_edits_no_version_tells_are_not_kept():
    with torch.inference_mode():
        module, x = layer()
        module(x)
        assert kept(module) is None
    module, x = layer()
    module.share_memory()
    with torch.no_grad():
        module(x)
    assert kept(module) is None


def test_an_edit_of_the_kept_values_is_seen():
    module, x = layer()
    with torch.no_grad():
        y = module(x)
        kept(module).value.zero_()
        assert torch.equal(module(x), y)


def test_threads():
    module, x = layer()
    with torch.no_grad():
        y = module(x)
    wrong = []

    def run():
        for _ in range(100):
            with torch.no_grad():
                if not torch.equal(module(x), y):
                    wrong.append(True)
            vars(module)[VALUES].kept = None

    threads = [threading.Thread(target=run) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_products_of_codes_and_quantized_inputs():
    module, x = nn.Linear(16, 16), torch.randn(3, 16)
    fk.quantize_model(module, fk.presets.lsq(4), activation=fk.presets.dynamic(8))
    module.eval()
    with torch.no_grad():
        for compute in (None, "int8"):
            fk.set_compute_(module, compute)
            assert torch.equal(module(x), module(x))
            module.latent.mul_(-1)
            assert torch.equal(module(x), copy.deepcopy(module)(x))


def test_a_weight_that_changes_before_the_backward_is_an_error():
    module, x = layer()
    loss = module.train()(x).sum()
    with torch.no_grad():
        module.alpha.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
