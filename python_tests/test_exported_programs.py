"""torch.export of quantized models: exported, saved, loaded, also in a fresh process, to the same bits."""

import io
import subprocess
import sys

import pytest
import torch
from support.layers import INPUTS
from torch import nn

import fogzo_kernels as fk

PRESETS = {
    "lsq": fk.presets.lsq(3),
    "lsq1 rows": fk.presets.lsq(1, "row"),
    "seq": fk.presets.seq(2),
    "bitnet": fk.presets.bitnet(),
    "quest": fk.presets.quest(3, block=16),
    "fixed": fk.presets.fixed(3, 0.1),
}


def made(preset, inputs="none", dtype=torch.float32, compute=None):
    """A model in evaluation, with an input."""
    torch.manual_seed(0)
    layers = nn.Conv1d(8, 16, 2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    model, x = nn.Sequential(*layers).to(dtype).eval(), torch.randn(4, 8, 3).to(dtype)
    fk.quantize_model(
        model, PRESETS[preset], activation=INPUTS[inputs], skip="0" if "quest" in (preset, inputs) else ()
    )
    if inputs == "learned":
        fk.calibrate_inputs_(model, lambda: model(x))
    fk.set_compute_(model, compute)
    return model, x


def exported(model, x, grad=True, strict=False):
    """The program, in a file and back."""
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_program_gives_the_output_of_the_model(preset, grad):
    model, x = made(preset)
    expected = model(x)
    assert torch.equal(exported(model, x, grad)(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("compute", [None, "int8"])
def test_a_program_quantizes_inputs_as_the_model(inputs, compute, grad):
    if compute and inputs == "none":
        return
    preset = "quest" if inputs == "quest" else "lsq"
    model, x = made(preset, inputs, compute=compute)
    assert torch.equal(exported(model, x, grad)(x), model(x))


@pytest.mark.parametrize("preset", ["lsq", "bitnet", "quest"])
def test_a_strict_program_in_bfloat16_gives_the_output_of_the_model(preset):
    model, x = made(preset, dtype=torch.bfloat16)
    assert torch.equal(exported(model, x, strict=True)(x), model(x))


def test_gradients_and_alphas_out_of_range_are_those_of_the_model():
    model, x = made("lsq")
    program = exported(model, x)
    model(x).square().sum().backward()
    program(x).square().sum().backward()
    for name, p in program.named_parameters():
        assert torch.equal(p.grad, model.get_parameter(name).grad)
    model.zero_grad()
    with torch.no_grad():
        model[2].alpha.neg_()
    program = exported(model, x)
    with pytest.warns(UserWarning, match="an update drove a learned alpha out of range"):
        assert torch.equal(program(x), model(x))


IN_A_FRESH_PROCESS = """
import sys, torch, fogzo_kernels
for name in sys.argv[2:]:
    x, y = torch.load(f"{sys.argv[1]}/{name}.pt")
    assert torch.equal(torch.export.load(f"{sys.argv[1]}/{name}.pt2").module()(x), y), name
print("alike", *sys.argv[2:])
"""


def test_a_saved_program_gives_the_same_output_in_a_fresh_process(tmp_path):
    for preset in PRESETS:
        model, x = made(preset, "quest" if preset == "quest" else "dynamic")
        torch.export.save(torch.export.export(model, (x,)), tmp_path / f"{preset}.pt2")
        torch.save((x, model(x).detach()), tmp_path / f"{preset}.pt")
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path), *PRESETS]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout.split("\n")[0] == " ".join(["alike", *PRESETS]), found.stderr
