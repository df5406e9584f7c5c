"""What a step says of itself."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.training import setup
from torch import nn

import fogzo_kernels as fk


def test_stats_are_those_of_the_step():
    _, fogzo, closure = setup(directions=2)
    assert all(math.isnan(v) for k, v in fogzo.stats().items() if k not in fogzo.diagnostics())
    losses = {}
    for probe in fogzo.probes():
        with probe:
            probe.backward(closure())
        losses[probe.direction, probe.sign] = probe.loss.clone().double()
    weights = fogzo.weights
    grid, grads = weights[0].quantizer.grid, [w.parameter.grad for w in weights]
    norm = fk.guide_norm(grads, [w.alpha for w in weights], grid=grid)
    loss = float(fogzo.estimate_())
    found = fogzo.stats()
    assert found["loss"] == loss
    wanted = sum(abs(losses[i, 1] - losses[i, -1]) for i in range(2)) / 2
    assert found["difference"] == pytest.approx(float(wanted), rel=1e-5)
    assert found["rounding"] == pytest.approx(loss * 2.0**-23)
    assert found["one_minus_beta"] == 1e-2
    assert found["noise_to_guide"] == pytest.approx(0.01 * fogzo.total_weights / 0.99)
    assert found["guide_norm"] == float(norm)
    assert {k: found[k] for k in fogzo.diagnostics()} == fogzo.diagnostics()
    assert math.isnan(found["alphas_at_floor"])  # of fixed ones


def wide(noise_to_guide, scale, **options):
    """A layer of so many weights that the noise is near its expectation, and a step of it."""
    torch.manual_seed(0)
    model = nn.Linear(256, 200, bias=False)
    fk.quantize_model(model, fk.Quantizer(fk.Grid.uniform(2), scale, fk.StraightThrough("identity")))
    d = model.weight.numel()
    noise = noise_to_guide / (d + noise_to_guide)
    fogzo = fk.Fogzo(
        model, total_steps=9, one_minus_beta=noise, schedule="constant", **{"directions": 1} | options
    )
    x, y = torch.randn(64, 256), torch.randint(200, (64,))
    return model, fogzo, lambda: F.cross_entropy(model(x), y)


@pytest.mark.parametrize("noise_to_guide", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("directions", [1, 3])
def test_cosine_is_that_of_estimate_and_guide(noise_to_guide, directions):
    model, fogzo, closure = wide(noise_to_guide, fk.Scale.rms("row"), directions=directions, seed=5)
    fogzo.run(closure)
    delta = model.alpha * model.quantizer.grid.r
    guide = model.weight.grad * delta
    fogzo.estimate_()
    real = F.cosine_similarity((model.weight.grad * delta).flatten(), guide.flatten(), dim=0)
    d = model.weight.numel()
    assert fogzo.stats()["cosine"] == pytest.approx(float(real), abs=10 / math.sqrt(d))
    if noise_to_guide == 0.0:
        assert abs(float(real)) > 0.999


def test_code_changes_are_those_of_the_probes():
    """In the first step, and in the first after each stats(); the others cost nothing."""
    model, fogzo, closure = wide(2.0, fk.Scale.fixed(0.02), directions=2)
    shares = []
    for _ in range(4):
        model.zero_grad()
        rows = {}
        for probe in fogzo.probes():
            with probe:
                rows[probe.direction, probe.sign] = None if model.probe is None else model.probe.clone()
                probe.backward(closure())
        fogzo.estimate_()
        shares.append(float((rows[0, 1] != rows[0, -1]).float().mean()))
        if len(shares) != 2:
            counted = 1 if len(shares) == 3 else -1  # the second was the first after a call
            assert fogzo.stats()["code_changes"] == pytest.approx(shares[counted], rel=1e-6)
    assert len(set(shares)) == 4
    assert 0 < shares[0] < 1


def test_stats_give_the_share_of_alphas_at_their_floor():
    model, fogzo, closure = wide(1.0, fk.Scale.absmean("row", factor=0.2, least=0.00625))
    fogzo.backward(closure)
    share = float((model.alpha <= 0.00625).float().mean())
    assert 0 < share < 1
    assert fogzo.stats()["alphas_at_floor"] == pytest.approx(share)
    model, fogzo, closure = wide(1.0, fk.Scale.learned("row"))
    assert fogzo.stats()["alphas_at_floor"] == 0.0
    with torch.no_grad():
        model.alpha[:50] = -1.0
    with pytest.warns(UserWarning, match="an update drove a learned alpha out of range"):
        fogzo.backward(closure)
    assert fogzo.stats()["alphas_at_floor"] == 0.25


def test_stats_of_a_loaded_state_are_none():
    """Those of the run before would be taken for its own."""
    _, fogzo, closure = setup()
    fogzo.backward(closure)
    assert not math.isnan(fogzo.stats()["code_changes"])
    fogzo.load_state_dict(fogzo.state_dict())
    found = fogzo.stats()
    assert all(math.isnan(v) for k, v in found.items() if k not in fogzo.diagnostics())


def test_stats_warn_once_where_losses_are_rounding():
    model, fogzo, closure = setup()
    for _ in range(2):
        fogzo.backward(lambda: closure() + 1e7)
        model.zero_grad()
    with pytest.warns(UserWarning, match="little more than float32's rounding at the loss"):
        fogzo.stats()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fogzo.stats()
