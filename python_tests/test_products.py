"""Products of int8 codes in linear layers: those of the values, and the same gradients."""

import copy
import os
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.processes import start
from torch import nn

import fogzo_kernels as fk
from fogzo_kernels.nn.linear import int_mm, multiplied
from fogzo_kernels.nn.view import WeightView

STE = fk.StraightThrough("identity")
GRIDS = {
    "uniform-8": (fk.Grid.uniform(8), STE),
    "uniform-2": (fk.Grid.uniform(2), STE),
    "half-3": (fk.Grid.half_offset(3), STE),
    "ternary": (fk.Grid.ternary(), STE),
    "sign": (fk.Grid.sign(), fk.StraightThrough("hardtanh")),
}
SCALES = {
    "tensor": fk.Scale.absmean(factor=0.4, least=1e-6),
    "row": fk.Scale.absmean("row", factor=0.4, least=1e-6),
}
QUEST = fk.presets.quest(4, block=16)


def pair(weights, inputs, bias=True, dtype=torch.float32, backend=None):
    """The same layer twice: by values, and by codes."""
    values = nn.Linear(32, 5, bias=bias)
    fk.quantize_model(values, weights, activation=inputs, backend=backend)
    values.to(dtype)
    if hasattr(values, "input_alpha"):
        fk.calibrate_inputs_(values, lambda: values(torch.randn(7, 32, dtype=dtype)))
    codes = copy.deepcopy(values)
    fk.set_compute_(codes, "int8")
    return values, codes


def quantizer(grid, scale):
    return fk.Quantizer(GRIDS[grid][0], SCALES[scale], GRIDS[grid][1])


def check(values, codes, x, tolerance):
    """Outputs and all gradients; in units of their largest."""
    results = []
    upstream = torch.randn(values(x).shape, dtype=x.dtype)
    for module in (values, codes):
        module.zero_grad()
        given = x.clone().requires_grad_()
        y = module(given)
        y.backward(upstream)
        results.append([y.detach(), given.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).abs().max() <= tolerance * max(a.double().abs().max(), 1e-3)


@pytest.mark.parametrize("of_weight", SCALES)
@pytest.mark.parametrize("of_input", SCALES)
@pytest.mark.parametrize("inputs", GRIDS)
@pytest.mark.parametrize("weights", GRIDS)
def test_an_int8_product_is_the_product_of_the_values(weights, inputs, of_weight, of_input):
    check(*pair(quantizer(weights, of_weight), quantizer(inputs, of_input)), torch.randn(7, 32), 2e-6)


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [(fk.presets.lsq(2), fk.presets.lsq(4)), (fk.presets.bitnet(), fk.presets.dynamic(8)), (QUEST, QUEST),
     (fk.presets.seq(2), fk.presets.dynamic(8, "tensor"))],
    ids=["lsq", "bitnet", "quest", "seq"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_every_preset_are_those_of_values(weights, inputs, dtype, backend):
    x = torch.randn(2, 3, 32, dtype=dtype)
    check(*pair(weights, inputs, dtype=dtype, backend=backend), x, 2e-6 if dtype == torch.float32 else 2e-2)


@given(data=st.data())
def test_codes_multiply_exactly(data):
    """Any sizes, all codes, both offsets."""
    m, k, n = (data.draw(st.integers(0 if i == 0 else 1, 40)) for i in range(3))
    offsets = [data.draw(st.sampled_from([0.0, 0.5])) for _ in range(2)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    a, b = (torch.randint(-128, 128, s, dtype=torch.int8, generator=generator) for s in ((m, k), (n, k)))
    exact = (a.double() + offsets[0]) @ (b.double() + offsets[1]).t()
    assert torch.equal(multiplied(a, b, *offsets).double(), exact.float().double())
    assert torch.equal(int_mm(a, b.t()).long(), a.long() @ b.long().t())


def of_a_lesser_processor(rank, isa):
    """Products of the largest codes and others, where oneDNN takes no more than this instruction set."""
    os.environ["ONEDNN_MAX_CPU_ISA"] = isa  # read at its first use
    a, b = torch.randint(-128, 128, (7, 70), dtype=torch.int8), torch.full((5, 70), 127, dtype=torch.int8)
    a[0], a[1], b[1:3] = 127, -128, torch.randint(-128, 128, (2, 70), dtype=torch.int8)
    assert torch.equal(int_mm(a, b.t()).long(), a.long() @ b.long().t())


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE", "ALL"])
def test_codes_multiply_exactly_on_any_processor(isa):
    """Without VNNI oneDNN adds pairs of products in 16 bits, and cuts off what is larger."""
    start(of_a_lesser_processor, (isa,), 1)


def test_long_rows_do_not_overflow():
    a = torch.full((1, 70_000), -128, dtype=torch.int8)
    assert multiplied(a, a, 0.5, 0.5).item() == torch.tensor(70_000 * 127.5**2).float().item()


@pytest.mark.parametrize("shape", [(32,), (0, 32), (1, 32), (2, 3, 4, 32)], ids=str)
def test_inputs_of_any_shape_give_the_product_of_values(shape):
    values, codes = pair(fk.presets.lsq(4), fk.presets.dynamic(8))
    x = torch.randn(shape)
    torch.testing.assert_close(codes(x), values(x))
    assert codes(x.to(torch.float32)).shape == (*shape[:-1], 5)


def test_products_keep_autocast_compile_and_take_no_bias():
    values, codes = pair(fk.presets.lsq(4), fk.presets.dynamic(8), bias=False)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert codes(x).dtype == values(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(codes, backend="aot_eager", fullgraph=True)(x), values(x))
    assert "int8 products" in str(codes)
    plain = fk.dequantize_model(codes)
    assert type(plain) is nn.Linear
    assert not hasattr(plain, "product")


def test_fogzo_steps_are_those_of_values():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    fk.quantize_model(model, fk.presets.lsq(2), activation=fk.presets.dynamic(8))
    other = copy.deepcopy(model)
    fk.set_compute_(other, "int8")
    x, y = torch.randn(9, 32), torch.randint(4, (9,))
    losses = []
    for m in (model, other):
        fogzo = fk.Fogzo(m, total_steps=9, kappa=1.0, seed=3, directions=1)
        losses.append(fogzo.backward(lambda m=m: F.cross_entropy(m(x), y)))
    torch.testing.assert_close(*losses)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    fk.set_compute_(other, None)
    assert torch.equal(other(x), model(x))


class Tied(nn.Module):
    """A weight that multiplies codes in one place and values in another, and one that does so nowhere else."""

    def __init__(self, share):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.out = nn.Linear(32, 4)
        if share:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(F.relu(self.second(F.relu(self.first(x)))))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("weights", [fk.presets.lsq(2), fk.presets.quest(3, block=16)])
def test_probes_are_codes_with_the_bits_of_values(weights, share, backend, monkeypatch):
    """A probe's codes are written as such, where all that share the weight multiply codes."""
    inputs = fk.presets.quest(4, block=16) if weights.transform else fk.presets.dynamic(8)
    found = []
    for codes in (False, True):
        torch.manual_seed(0)
        model = Tied(share)
        fk.quantize_model(model, weights, activation=inputs, backend=backend)
        fk.set_compute_(model, "int8")
        if share:
            model.second.product = None
        fogzo = fk.Fogzo(model, total_steps=9, kappa=1.0, seed=3, schedule="constant", directions=1)
        x, y = torch.randn(9, 32), torch.randint(4, (9,))
        optimizer = fk.AdamW(model.parameters(), lr=1e-2, fogzo=fogzo)
        with monkeypatch.context() as patch:
            if not codes:
                patch.setattr(WeightView, "takes_codes", False)
            for _ in range(2):
                optimizer.zero_grad()
                for probe in fogzo.probes():
                    with probe:
                        held = {n: m.pass_weight for n, m in model.named_modules() if hasattr(m, "pass_weight")}
                        kinds = {n: p.rows.dtype for n, p in held.items()}
                        values = [m.probe for m in model.modules() if hasattr(m, "pass_weight")]
                        assert all(v is None or v.dtype == torch.float32 for v in values)
                        found += [v.clone() for v in values if v is not None]
                        probe.backward(F.cross_entropy(model(x), y))
                    found.append(probe.loss.clone())
                optimizer.step()
        assert kinds["out"] is (torch.int8 if codes else torch.float32)
        assert kinds["first"] is (torch.int8 if codes and not share else torch.float32)
        found += [p.detach().clone() for p in model.parameters()]
    half = len(found) // 2
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))


CANNOT = "cannot multiply codes:"


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        (fk.presets.lsq(2), None, "needs activation= to multiply codes, as its input is not quantized"),
        (fk.presets.lsq(2, 8), fk.presets.dynamic(8), f"{CANNOT} its weight has scales for groups of a row"),
        (fk.presets.lsq(2), fk.presets.dynamic(8, 8), f"{CANNOT} its input has scales for groups of a row"),
        (
            fk.presets.lsq(2),
            QUEST,
            f"{CANNOT} its weight is transformed by None, its input by Hadamard(block=16)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(weights, inputs, message):
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16))
    fk.quantize_model(
        model, weights, activation=inputs, rules=[("0", fk.presets.lsq(2), fk.presets.dynamic(8))]
    )
    with pytest.raises(ValueError, match=re.escape(f"layer '1' {message}")):
        fk.set_compute_(model, "int8")
    assert model[0].product is None
    with pytest.raises(ValueError, match=re.escape("compute must be None or 'int8', got 'fp4'")):
        fk.set_compute_(model, "fp4")
    with pytest.raises(ValueError, match="model must have quantized linear layers, got none"):
        fk.set_compute_(nn.Linear(3, 3), "int8")
