"""An input that is not finite makes the outputs of its rows NaN, whatever quantizes it; its step is lost."""

import math

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

INPUTS = {
    "dynamic": fk.presets.dynamic(8),
    "tensor": fk.presets.dynamic(4, "tensor"),
    "groups": fk.presets.dynamic(8, 8),
    "quest": fk.presets.quest(4, block=16),
    "fixed": fk.presets.fixed(4, 0.3),
    "function": fk.presets.fixed(4, lambda rows: 0.3),
    "learned": fk.presets.lsq(4),
}
#: Whose cells are rows; others are the whole input.
BY_ROWS = {"dynamic", "groups", "quest"}
BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def made(inputs, compute=None, dtype=torch.float32, kind="linear"):
    torch.manual_seed(0)
    first = nn.Linear(32, 16) if kind == "linear" else nn.Conv1d(2, 4, 3)
    x = torch.randn(6, 32) if kind == "linear" else torch.randn(6, 2, 16)
    model, x = nn.Sequential(first).to(dtype), x.to(dtype)
    weights = fk.presets.quest(2, block=16) if inputs == "quest" and kind == "linear" else fk.presets.lsq(4)
    fk.quantize_model(model, weights, activation=INPUTS[inputs])
    if inputs == "learned":
        fk.calibrate_inputs_(model, lambda: model(x))
    fk.set_compute_(model, compute) if kind == "linear" else None
    return model, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("kind", "compute"),
    [("linear", None), ("linear", "int8"), ("convolution", None)],
    ids=["values", "int8", "conv"],
)
@pytest.mark.parametrize("inputs", INPUTS)
def test_inputs_that_are_not_finite_give_nan(inputs, kind, compute, bad, dtype):
    if compute and inputs in ("groups", "function"):
        return
    model, x = made(inputs, compute, dtype, kind)
    expected = model(x)
    x.flatten(1)[3, 5] = BAD[bad]
    y = model(x)
    rows = y.flatten(1)
    assert rows[3].isnan().all() or (inputs == "groups" and rows[3].isnan().any())
    others = [0, 1, 2, 4, 5]
    if inputs in BY_ROWS:
        assert torch.equal(y[others], expected[others])
    else:
        assert y.isnan().all()


@pytest.mark.parametrize("compute", [None, "int8"])
@pytest.mark.parametrize("inputs", ["dynamic", "learned", "fixed"])
def test_compiled_and_exported_models_give_nan_too(inputs, compute):
    model, x = made(inputs, compute)
    expected = model(x)
    program = torch.export.export(model, (x,)).module()
    compiled = torch.compile(model, backend="aot_eager")
    for run in (program, compiled):
        assert torch.equal(run(x), expected)
    x[3, 5] = math.nan
    for run in (program, compiled):
        assert run(x)[3].isnan().all()


@pytest.mark.parametrize("compute", [None, "int8"])
@pytest.mark.parametrize("optimizer", [fk.AdamW, fk.SGD])
@pytest.mark.parametrize("inputs", ["dynamic", "learned", "fixed", "quest"])
@pytest.mark.filterwarnings("ignore:the loss or a gradient of a step")
def test_the_step_is_lost_and_the_run_goes_on(inputs, optimizer, compute):
    model, x = made(inputs, compute)
    fogzo = fk.Fogzo(model, total_steps=4, kappa=1.0, directions=1)
    steps = optimizer(model.parameters(), lr=0.01, fogzo=fogzo)
    bad = x.clone()
    bad[3, 5] = math.inf
    before = {name: t.clone() for name, t in model.named_parameters()}
    for batch, moves in ((x, True), (bad, False), (x, True)):
        steps.zero_grad()
        loss = steps.step(lambda batch=batch: model(batch).float().square().mean())
        assert bool(loss.isfinite()) == moves
        after = {name: t.clone() for name, t in model.named_parameters()}
        changed = [name for name in after if not torch.equal(after[name], before[name])]
        assert bool(changed) == moves, changed
        before = after
    assert fogzo.diagnostics() == {"lost_directions": 0, "lost_steps": 1, "bad_alphas": 0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("init", [None, fk.Scale.fixed(0.3)])
def test_calibration_names_the_module(bad, init):
    if bad == 0 and init:
        return
    grid, how = fk.Grid.uniform(4), fk.StraightThrough("identity")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    fk.quantize_model(
        model, None, rules=[("1", fk.presets.lsq(4), fk.Quantizer(grid, fk.Scale.learned(init=init), how))]
    )
    model[0].bias.data.fill_(bad)
    model[0].weight.data.zero_()
    with pytest.raises(ValueError, match="for the input of 1"):
        fk.calibrate_inputs_(model, lambda: model(torch.randn(3, 8)))
    assert model[1].input_alpha.isnan()
