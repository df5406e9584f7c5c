"""Presets against float64 programs of the papers' formulas; scales as values, and what is wrong with some."""

import copy
import math
import pickle
import re

import pytest
import torch
from support.layers import LAYERS, cells, rows_of, weight_of
from torch import nn

import fogzo_kernels as fk

STE = fk.StraightThrough("identity")


def quantizer(scale):
    return fk.Quantizer(fk.Grid.uniform(3), scale, STE)


def made(q, first=nn.init.ones_):
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    first(model[0].weight)
    fk.quantize_model(model, q)
    return model


# ---- an independent float64 program for each preset


def lsq_of(bits, granularity="tensor"):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def first(w):
        return 2 * w.abs().mean(2, keepdim=True) / math.sqrt(high)

    def q(w, s):
        v = w / s
        inside = (v > low) & (v < high)
        code = v.clamp(low, high).round()
        return s * code, inside.double(), torch.where(inside, code - v, code), math.sqrt(high)

    return fk.presets.lsq(bits, granularity), granularity, first, q


def lsq_of_one_bit(granularity="tensor"):
    def q(w, s):
        code = torch.where(w >= 0, 1.0, -1.0).double()
        return s * code, ((w / s).abs() < 1).double(), code, 1.0

    return fk.presets.lsq(1, granularity), granularity, lambda w: w.abs().mean(2, keepdim=True), q


def seq_of(bits, granularity="row"):
    """With the range as its parameter, as the paper has it; ours is the distance of values."""
    levels, share = (4, 0.5) if bits == 2 else (3, 2 / 3)
    shift = 0.5 if levels == 4 else 0.0

    def q(w, delta):
        v = w / delta - shift
        low, high = -(levels // 2), (levels - 1) // 2
        inside = (v > low) & (v < high)
        code = v.clamp(low, high).round()
        slope = torch.where(inside, code - v, code + shift)
        return delta * (code + shift), inside.double(), slope, 1.0

    return fk.presets.seq(bits, granularity), granularity, lambda w: share * w.abs().amax(2, keepdim=True), q


def bitnet_of():
    def q(w, s):
        return s * (w / s).clamp(-1, 1).round(), torch.ones_like(w), None, None

    return fk.presets.bitnet(), "tensor", lambda w: w.abs().mean(2, keepdim=True).clamp(min=1e-5), q


PRESETS = {
    **{f"lsq{b}": lsq_of(b) for b in (2, 3, 4, 8)},
    "lsq2 row": lsq_of(2, "row"),
    "lsq4 group": lsq_of(4, 3),
    "lsq1": lsq_of_one_bit(),
    "lsq1 row": lsq_of_one_bit("row"),
    "seq2": seq_of(2),
    "seq1.58": seq_of(1.58),
    "seq2 tensor": seq_of(2, "tensor"),
    "bitnet": bitnet_of(),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed_conv2d", "transformers"])
def test_presets_are_the_papers_formulas(name, preset, backend):
    """Forward, the weight's gradient and alpha's, against float64, for whatever layout of the weight."""
    q, granularity, first, formula = PRESETS[preset]
    layer = LAYERS[name]
    module = layer.make()
    nn.init.normal_(module.weight)
    fk.quantize_model(module, q, backend=backend)
    rows = rows_of(module.weight, layer.outputs).double()
    w = cells(rows, granularity)
    alpha = first(w)
    torch.testing.assert_close(module.alpha.detach().double().flatten(), alpha.flatten(), rtol=1e-5, atol=0)
    s = module.alpha.detach().double().reshape(alpha.shape)
    value, inside, slope, root = formula(w, s)
    found = module.effective_weight()
    upstream = torch.randn_like(found)
    found.backward(upstream)
    g = cells(rows_of(upstream, layer.outputs).double(), granularity)
    expected = weight_of(value.reshape(rows.shape).float(), module.weight, layer.outputs)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-7)
    masked = weight_of((g * inside).reshape(rows.shape).float(), module.weight, layer.outputs)
    torch.testing.assert_close(module.weight.grad, masked, rtol=1e-6, atol=0)
    if slope is None:
        assert not module.alpha.requires_grad
        return
    terms = g * slope / (math.sqrt(w.shape[2]) * root)
    error = (module.alpha.grad.double().flatten() - terms.sum(2).flatten()).abs()
    assert (error <= 1e-5 * terms.abs().sum(2).flatten()).all()


# ---- values, and what is wrong


@pytest.mark.parametrize(
    "scale",
    [
        fk.Scale.absmean(least=1e-5), fk.Scale.rms("row", add=1e-8), fk.Scale.absmax(64, factor=1 / 7),
        fk.Scale.learned(), fk.Scale.learned("row"), fk.Scale.learned(16),
        fk.Scale.learned(init=fk.Scale.absmax("row")), fk.Scale.learned(init=fk.Scale.fixed(0.5)),
    ],
    ids=repr,
)  # fmt: skip
def test_scales_are_values(scale):
    again = eval(repr(scale), {"Scale": fk.Scale})
    assert repr(again) == repr(scale)
    assert copy.deepcopy(scale) == scale == pickle.loads(pickle.dumps(scale))
    assert {scale: 1}[copy.copy(scale)] == 1
    q = quantizer(scale)
    assert fk.Quantizer.from_dict(q.to_dict()) == q
    assert scale != fk.Scale.fixed(0.5)
    assert scale != fk.Scale.absmean()


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda: fk.Scale(), TypeError, "use a constructor of Scale: Scale.fixed(alpha), Scale.absmax(), "),
        (lambda: fk.Scale.absmean("column"), ValueError,
         "granularity must be 'tensor', 'row' (an alpha for each output channel) or an int >= 2"),
        (lambda: fk.Scale.absmean(1), ValueError, "(the size of a group), got 1"),
        (lambda: fk.Scale.absmean(True), ValueError, "(the size of a group), got True"),
        (lambda: fk.Scale.rms(factor=0), ValueError, "factor must be finite and > 0, got 0"),
        (lambda: fk.Scale.rms(add=-1), ValueError, "add must be finite and >= 0, got -1"),
        (lambda: fk.Scale.rms(least=math.nan), ValueError, "least must be finite and >= 0, got nan"),
        (lambda: fk.Scale.rms(least="1"), TypeError, "least must be a number, got str"),
        (lambda: fk.Scale.learned(0), ValueError, "granularity must be"),
        (lambda: fk.Scale.learned(init=0.5), TypeError, "init must be a fixed or measured Scale, got float"),
        (lambda: fk.Scale.learned(init=fk.Scale.learned()), TypeError, "got LearnedScale"),
        (lambda: fk.presets.lsq(9), ValueError, "bits must be an int in 1..8, got 9"),
        (lambda: fk.presets.lsq(True), ValueError, "bits must be an int in 1..8, got True"),
        (lambda: fk.presets.seq(3), ValueError, "bits must be 2 or 1.58, got 3"),
        (lambda: made(quantizer(fk.Scale.absmean(5))), ValueError,
         "granularity must divide the rows of the weight, of 8 elements, got 5 for 0.weight"),
        (lambda: made(quantizer(fk.Scale.absmean()), nn.init.zeros_), ValueError,
         "alpha must be finite, > 0 and in"),
        (lambda: fk.calibrate_(made(quantizer(fk.Scale.learned())), fk.Scale.fixed(1.0)), ValueError,
         "scale must not turn a learned alpha into another or back, got Scale.fixed(1.0)"),
    ],
)  # fmt: skip
def test_a_bad_argument_of_a_preset_is_named(make, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        make()
