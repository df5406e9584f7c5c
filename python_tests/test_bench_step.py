"""The benchmark of a step: how many forwards its methods run, and what it reports; no timing."""

import json

import pytest
import torch
from torch import nn

from bench import step
from bench.materialized import Materialized, Mezo

SMALL = ["--device", "cpu", "--rows", "8", "--hidden", "16", "--layers", "1", "--turns", "4"]
#: Micro-batches that a method's step runs, of 4; every-4 over four steps.
FORWARDS = {"ste": 4, "fogzo": 12, "forward": 8, "half": 8, "forward-half": 6, "eager": 12, "mezo": 8}


def methods(*names, model="mlp", options=()):
    args = step.parse([*SMALL, "--model", model, *options])
    found = step.model_of(args)
    return {name: step.method_of(name, *found, args) for name in names}, found


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_of_a_step(name, monkeypatch):
    calls = []
    original = step.of_labels
    monkeypatch.setattr(step, "of_labels", lambda *inputs: calls.append(1) or original(*inputs))
    found, _ = methods(name)
    clock = step.Clock(torch.device("cpu"))
    for _ in range(2):
        found[name](clock)
    assert len(calls) == 2 * FORWARDS[name]
    assert clock.passes > 0


def test_every_fourth_step_has_probes(monkeypatch):
    calls = []
    original = step.of_labels
    monkeypatch.setattr(step, "of_labels", lambda *inputs: calls.append(1) or original(*inputs))
    found, _ = methods("every-4")
    for _ in range(8):
        found["every-4"](step.Clock(torch.device("cpu")))
    assert len(calls) == 8 * 4 + 2 * 8


@pytest.mark.parametrize("model", step.SHAPES)
def test_rows_table_and_plot(model, tmp_path, capsys):
    names = ["forward", "eager", "mezo"]
    hidden = ["--hidden", "64"] if model == "llama" else []
    chosen = ["--model", model, *hidden, "--context", "8", "--methods", *names]
    step.main(
        [*SMALL, *chosen, "--json", str(tmp_path / "a/step.json"), "--plot", str(tmp_path / "b/step.png")]
    )
    found = json.loads((tmp_path / "a/step.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["ste", *names]
    for row in found["rows"]:
        assert len(row["seconds"]) == 4
        assert 0 < row["rest_of_ste"] < row["of_ste"]
    assert found["rows"][0]["of_ste"] == 1
    assert found["arguments"]["model"] == model
    assert (tmp_path / "b/step.png").stat().st_size > 1000
    assert "| forward |" in capsys.readouterr().out


def test_ratios_are_those_of_the_same_turns():
    ste, row = step.Row("ste", [1, 2, 1, 2, 10, 20, 10, 20]), step.Row("x", [2, 2, 2, 3, 20, 20, 20, 30])
    row.rest = [0.6] * 4 + [3] * 4
    assert row.against(ste) == 1.5
    assert row.against(ste, rest=True) == pytest.approx((0.4 + 0.2) / 2)


def test_peers_do_what_they_say():
    """FOGZO's is along the direction that it keeps; MeZO's weights move along the noise alone."""
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    batches = [(x, y)]

    def loss(model, x, y):
        return (model(x) - y).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    peer = Materialized(model, ["2"], lr=0.1, compiled=False)
    assert peer.names == ["0.weight"]
    kept = []
    peer.directions = lambda grads, kappa: kept.extend([torch.randn_like(g) for g in grads]) or kept
    peer.step(loss, batches, lambda call: call())
    (v,) = kept
    ratio = model[0].weight.grad / v
    assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4)
    assert ratio.abs().max() > 0
    before = model[0].weight.detach().clone()
    mezo = Mezo(model, ["2"], lr=0.1, compiled=False)
    mezo.step(loss, batches, lambda call: call())
    torch.manual_seed(1)
    noise = torch.randn_like(before)
    moved = (model[0].weight - before) / noise
    assert torch.allclose(moved, moved.flatten()[0].expand_as(moved), atol=1e-4)
