"""Mistakes that many make: the error says what to write instead, and correct calls behave as before."""

import copy
import inspect
import pickle
import re
import warnings

import pytest
import torch
from support.processes import run_code
from torch import nn

import fogzo_kernels as fk


def network():
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))


def quantized(quantizer=None, **options):
    model = network()
    fk.quantize_model(model, quantizer or fk.presets.lsq(2), **options)
    return model


def zeros(quantizer, change=nn.init.zeros_):
    model = network()
    change(model[0].weight)
    fk.quantize_model(model, quantizer)


def by(scale):
    return fk.Quantizer(fk.Grid.uniform(2), scale, fk.StraightThrough())


def one_row_of_zeros(weight):
    with torch.no_grad():
        weight[1] = 0


def fogzo(**options):
    return fk.Fogzo(quantized(), **({"total_steps": 3} | options))


def adamw(**options):
    return fk.AdamW(quantized().parameters(), **options)


MADE_BY = "use a constructor of Grid: Grid.uniform(bits), Grid.half_offset(bits), Grid.sign() or Grid.ternary()"


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: fk.quantize_model(network(), "lsq"), TypeError, "got the str 'lsq': try fk.presets.lsq(2)"),
        (lambda: fk.quantize_model(network(), "bitnet"), TypeError, "'bitnet': try fk.presets.bitnet()"),
        (lambda: fk.quantize_model(network(), "int4"), TypeError, "'int4': try fk.presets.lsq(2)"),
        (lambda: fk.quantize_model(network(), fk.presets.quest), TypeError,
         "quantizer must be a Quantizer or None, got the function quest: try fk.presets.quest(2)"),
        (lambda: fk.quantize_model(network(), 4), TypeError, "got int: try fk.presets.lsq(2)"),
        (lambda: fk.quantize_model(network(), None, rules=[("0", "seq")]), TypeError,
         "rules[0][1] must be a Quantizer or None, got the str 'seq': try fk.presets.seq(2)"),
        (lambda: fk.quantize_model(network(), bits=4), TypeError,
         "argument 'bits': the bits are those of the quantizer, fk.presets.lsq(4) say"),
        (lambda: fk.quantize_model(network()), TypeError, "takes model and quantizer, fk.presets.lsq(2) say"),
        (lambda: fk.quantize_(network(), fk.presets.lsq(2)), TypeError,
         "did you mean quantize_model(model, quantizer)?"),
        (lambda: fk.Grid(4), TypeError, MADE_BY),
        (lambda: fk.Grid(bits=4), TypeError, MADE_BY),
        (lambda: fk.Scale(), TypeError, "use a constructor of Scale: Scale.fixed(alpha), Scale.absmax(),"),
        (lambda: fk.Scale(0.1), TypeError, "use a constructor of Scale: Scale.fixed(alpha), Scale.absmax(),"),
        (lambda: fk.Quantizer(bits=4), TypeError, "fk.presets has ready ones, fk.presets.lsq(2) say"),
        (fk.QuantLinear, TypeError,
         "QuantLinear is made by quantize_model(model, quantizer), in place, from a Linear"),
        (fk.QuantEmbedding, TypeError,
         "QuantEmbedding is made by quantize_model(model, quantizer), in place, from an Embedding"),
        (lambda: fk.presets.lsq(2, "channel"), ValueError,
         "must be 'tensor', 'row' (an alpha for each output channel) or an int >= 2 (the size of a group)"),
        (lambda: fk.presets.lsq(2, group_size=64), TypeError, "the argument is granularity, the size of a"),
        (lambda: fk.presets.seq(2, per_channel=True), TypeError, "the argument is granularity, lsq(4, 'row')"),
        (lambda: fk.presets.lsq(1.58), ValueError, "got 1.58 (three values: bitnet() or seq(1.58))"),
        (lambda: fogzo(beta=0.99), TypeError, "the argument is one_minus_beta, 1 - beta at the end, or kappa"),
        (lambda: fogzo(steps=3), TypeError, "unexpected keyword argument 'steps': the argument is total_steps"),
        (lambda: fogzo(num_directions=3), TypeError, "the argument is directions"),
        (lambda: fogzo(epsilon=1), TypeError, "the argument is epsilon_scale, a factor on eps"),
        (lambda: fogzo(lr=1e-3), TypeError, "the optimizer has the learning rate"),
        (lambda: fk.Fogzo(fk.quantize_model(network(), fk.presets.lsq(2)), total_steps=3), TypeError,
         "model must be a Module, got Report: quantize_model changes the model in place"),
        (lambda: fk.parameter_groups(fk.quantize_model(network(), fk.presets.lsq(2)), weight_decay=0.1),
         TypeError, "model must be a Module, got Report: quantize_model changes the model in place"),
        (lambda: adamw(beta1=0.9), TypeError, "the argument is betas, a pair"),
        (lambda: adamw(amsgrad=True), TypeError, "it is not offered; torch.optim has it"),
        (lambda: adamw(alpha_lr=1e-4), TypeError, "give it to fk.parameter_groups(model, weight_decay=..."),
        (lambda: fk.set_compute_(quantized(), "int8"), ValueError,
         "layer '0' needs activation= to multiply codes, as its input is not quantized:"),
        (lambda: zeros(by(fk.Scale.absmax())), ValueError,
         "got 0.0..0.0 for 0.weight: 0.weight is all zeros; give the scale a bound, Scale.absmax(least=1e-5)"),
        (lambda: zeros(by(fk.Scale.absmax("row")), one_row_of_zeros), ValueError,
         "for 0.weight: 0.weight holds rows or groups of zeros; give the scale a bound"),
        (lambda: zeros(by(fk.Scale.fixed(lambda w: w.abs().max()))), ValueError,
         "for 0.weight: 0.weight is all zeros; return more than 0 from the function"),
        (lambda: zeros(fk.presets.lsq(2), lambda w: nn.init.constant_(w, float("nan"))), ValueError,
         "got nan..nan for 0.weight: 0.weight holds NaN or inf"),
    ],
)  # fmt: skip
def test_a_common_mistake_is_told_what_to_write_instead(call, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        call()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_of_the_gpu_says_that_tensors_are_on_the_cpu(backend, tmp_path):
    """In a process of its own, as tests may let these backends run on the CPU."""
    code = f"""import torch, fogzo_kernels as fk
model = torch.nn.Linear(4, 4)
fk.quantize_model(model, fk.presets.lsq(2), backend={backend!r})
model(torch.ones(1, 4))
"""
    status, output = run_code(code, tmp_path, TRITON_INTERPRET="0")
    assert status == 1
    assert f"RuntimeError: backend {backend!r} is unavailable on cpu (tensors are on the CPU): " in output


def test_a_weight_that_became_zeros_is_named_by_the_forward_and_by_a_step():
    model = quantized(by(fk.Scale.absmax()))
    estimator = fk.Fogzo(model, total_steps=3)
    nn.init.zeros_(model[2].weight)
    for run in (
        lambda: model(torch.ones(2, 8)),
        lambda: estimator.backward(lambda: model(torch.ones(2, 8)).sum()),
    ):
        with pytest.raises(
            ValueError, match=r"^alpha must be .* got 0.0..0.0 for 2.weight: 2.weight is all zeros"
        ):
            run()


@pytest.mark.parametrize("optimizer", [fk.AdamW, fk.SGD])
def test_a_closure_without_backward_asks_for_fogzo(optimizer):
    """It would train nothing, in silence. With fogzo, or with a backward of its own, it trains."""
    model, x = quantized(), torch.randn(64, 8)
    before = [p.detach().clone() for p in model.parameters()]
    plain = optimizer(model.parameters(), lr=0.1)
    with pytest.raises(
        RuntimeError, match=f"pass fogzo= to {optimizer.__name__}, whose step then runs the backward"
    ):
        plain.step(lambda: model(x).square().sum())
    assert all(map(torch.equal, before, model.parameters()))

    def closure():
        loss = model(x).square().sum()
        loss.backward()
        return loss

    plain.step(closure)
    assert not all(map(torch.equal, before, model.parameters()))
    with torch.no_grad():
        assert plain.step(lambda: torch.tensor(1.0)) == 1  # nothing is left to do for it
    model.zero_grad()
    mine = optimizer(model.parameters(), lr=0.1, fogzo=fk.Fogzo(model, total_steps=3))
    now = [p.detach().clone() for p in model.parameters()]
    mine.step(lambda: model(x).square().sum())
    assert not all(map(torch.equal, now, model.parameters()))


def test_passes_that_no_estimate_follows_ask_for_fogzo():
    model, x = quantized(), torch.ones(2, 8)
    estimator, optimizer = fk.Fogzo(model, total_steps=3), fk.AdamW(model.parameters())
    estimator.run(lambda: model(x).sum())
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"had no estimate, .* or pass fogzo= to fk.AdamW or fk.SGD"):
        estimator.run(lambda: model(x).sum())


def test_a_name_that_is_close_is_found():
    """Python's own suggestion needs the name and the object of the error."""
    with pytest.raises(AttributeError, match="has no attribute 'quantise_model'") as found:
        fk.quantise_model  # noqa: B018
    assert found.value.name == "quantise_model"
    assert found.value.obj is fk


def test_hints_leave_signatures_values_and_other_errors_as_they_are():
    assert list(inspect.signature(fk.Grid).parameters) == ["qmin", "qmax", "offset", "r"]
    assert next(iter(inspect.signature(fk.quantize_model).parameters)) == "model"
    assert "total_steps" in inspect.signature(fk.Fogzo).parameters
    for value in (fk.Grid.uniform(3), fk.presets.seq(2)):
        assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value
    with pytest.raises(TypeError, match=r"^bits must be an int, got str$"):
        fk.Grid.uniform("4")
    with pytest.raises(TypeError, match=r"^directions must be an int, got float$"):
        fogzo(directions=1.0)
    with pytest.raises(TypeError, match=r"^Fogzo.__init__\(\) got an unexpected keyword argument 'colour'$"):
        fogzo(colour=1)
    model = quantized()
    assert type(type(model[0])(8, 4)) is nn.Linear  # as adapters make their layers


def test_warnings_point_at_the_line_of_the_caller():
    model = quantized()
    with torch.no_grad():
        model[0].weight.mul_(1000)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fk.Fogzo(model, total_steps=3, one_minus_beta=0.999)
    texts = [str(w.message) for w in found]
    assert [text.partition(" ")[0] for text in texts] == ["the", "one_minus_beta"]
    assert {w.filename for w in found} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fogzo(one_minus_beta=1e-4)
