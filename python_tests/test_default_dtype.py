"""Everything works under any torch.set_default_dtype, to the bit as under float32."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.layers import LAYERS
from torch import nn

import fogzo_kernels as fk

DEFAULTS = (torch.bfloat16, torch.float16, torch.float64)
PRESETS = {
    "lsq": fk.presets.lsq(2, "row"),
    "lsq1": fk.presets.lsq(1),
    "seq": fk.presets.seq(2),
    "bitnet": fk.presets.bitnet(),
    "quest": fk.presets.quest(3, block=16),
    "fixed": fk.presets.fixed(2, 0.1),
    "logistic": fk.Quantizer(fk.Grid.sign(), fk.Scale.fixed(0.1), fk.StraightThrough("tanh")),
}
INPUTS = {
    "none": None,
    "dynamic": fk.presets.dynamic(8),
    "quest": fk.presets.quest(4, block=16),
    "lsq": fk.presets.lsq(4),
}
OPTIMIZERS = {
    "adamw": lambda p, f: fk.AdamW(p, lr=0.01, fogzo=f),
    "momentum": lambda p, f: fk.SGD(p, lr=0.01, momentum=0.9, dampening=0.3, fogzo=f),
    "torch": lambda p, f: torch.optim.AdamW(p, lr=0.01),
}


@contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float32)


def run(quantizer, activation=None, optimizer="adamw", dtype=torch.float32, backend=None):
    """The state after two steps: of the model, of its optimizer, and what was logged."""
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    torch.manual_seed(0)  # here: PyTorch draws other first weights in another dtype
    for p in model.parameters():
        p.data = drawn(*p.shape).to(dtype) / 8
    x = drawn(8, 32).to(dtype)
    fk.quantize_model(model, quantizer, activation=activation, backend=backend)
    if activation is not None and activation == INPUTS["lsq"]:
        fk.calibrate_inputs_(model, lambda: model(x))
    fogzo = fk.Fogzo(model, total_steps=4, kappa=1.0, directions=2, backend=backend)
    steps = OPTIMIZERS[optimizer]([*model.parameters()], fogzo)
    for _ in range(2):
        steps.zero_grad()
        fogzo.run(lambda: model(x).float().square().mean())
        if optimizer == "torch":
            fogzo.estimate_()
        steps.step()
    fk.calibrate_(model)
    model(x).float().sum().backward()
    return {
        **model.state_dict(),
        **{f"grad {name}": p.grad for name, p in model.named_parameters()},
        **{f"state {i} {k}": v for i, s in steps.state_dict()["state"].items() for k, v in s.items()},
        "codes": model[0].codes(),
        "stats": torch.tensor(list(fogzo.stats().values()), dtype=torch.float64).nan_to_num(),
    }


def assert_same(make):
    with default(torch.float32):
        expected = make()
    for dtype in DEFAULTS:
        with default(dtype):
            found = make()
        assert found.keys() == expected.keys()
        assert [k for k in expected if found[k].dtype != expected[k].dtype and not k.endswith(" step")] == []
        assert [k for k in expected if not torch.equal(found[k], expected[k].to(found[k].dtype))] == []


@pytest.mark.parametrize("activation", INPUTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_do_not_depend_on_the_default_dtype(preset, activation):
    dtype = torch.bfloat16 if activation == "dynamic" else torch.float32
    assert_same(lambda: run(PRESETS[preset], INPUTS[activation], dtype=dtype))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_backends_and_optimizers_do_not_depend_on_the_default_dtype(optimizer, backend):
    assert_same(lambda: run(PRESETS["lsq"], optimizer=optimizer, backend=backend))


@pytest.mark.parametrize("distribution", ["uniform", "rademacher", "triangular", "logistic", "gaussian"])
def test_noise_does_not_depend_on_the_default_dtype(distribution, backend, device):
    options = {"distribution": distribution, "seed": 3, "step": 1, "backend": backend, "device": device}
    assert_same(lambda: {"noise": fk.noise(301, **options)})


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_do_not_depend_on_the_default_dtype(layer):
    def make():
        module, x = LAYERS[layer].make().float(), LAYERS[layer].input()
        torch.manual_seed(0)
        x = drawn(*x.shape) if x.is_floating_point() else x
        nn.init.normal_(module.weight)
        module.bias = None if getattr(module, "bias", None) is None else nn.Parameter(drawn(*module.bias.shape))
        fk.quantize_model(module, fk.presets.lsq(3, "row"))
        y = module(x)
        y.float().square().sum().backward()
        return {"y": y.detach(), "grad": module.weight.grad, "alpha": module.alpha.grad}

    assert_same(make)


@pytest.mark.parametrize("compute", [None, "int8"])
def test_int8_products_and_exports_do_not_depend_on_the_default_dtype(compute, tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(32, 16)).float()
        torch.manual_seed(0)
        model[0].weight.data, model[0].bias.data, x = drawn(16, 32), drawn(16), drawn(20, 32)
        fk.quantize_model(model, fk.presets.lsq(4, "row"), activation=fk.presets.dynamic(8))
        fk.set_compute_(model, compute)
        y = model(x).detach()
        place = tmp_path / str(torch.get_default_dtype())
        fk.export.safetensors(model, place)
        loaded = fk.export.load(place, nn.Sequential(nn.Linear(32, 16)).float())
        fk.dequantize_model(model)
        return {"y": y, "plain": model[0].weight.detach(), "loaded": loaded(x).detach()}

    assert_same(make)


#: What PyTorch makes of the default dtype, unless it is given another.
OF_THE_DEFAULT = {"zeros", "ones", "empty", "full", "eye", "linspace", "rand", "randn", "scalar_tensor"}


def test_every_tensor_that_the_package_makes_says_its_dtype():
    bare = [
        f"{path.name}:{node.lineno}"
        for path in (Path(fk.__file__).parent).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in OF_THE_DEFAULT
        and "dtype" not in [keyword.arg for keyword in node.keywords]
    ]
    assert bare == []
