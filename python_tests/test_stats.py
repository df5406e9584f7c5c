"""What a step says of itself."""

import math
import warnings

import pytest
from test_step_traps import setup

import fogzo_kernels as fk


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_stats(difference):
    _, fogzo, closure = setup(difference=difference, directions=2)
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
    other = [losses[i, -1] if difference == "central" else losses[0, 0] for i in range(2)]
    assert found["loss"] == loss
    wanted = sum(abs(losses[i, 1] - other[i]) for i in range(2)) / 2
    assert found["difference"] == pytest.approx(float(wanted), rel=1e-5)
    assert found["rounding"] == pytest.approx(loss * 2.0**-23)
    assert found["one_minus_beta"] == 1e-2
    assert found["noise_to_guide"] == pytest.approx(0.01 * fogzo.total_weights / 0.99)
    assert found["guide_norm"] == float(norm)
    assert {k: found[k] for k in fogzo.diagnostics()} == fogzo.diagnostics()


def test_stats_warn_once_where_losses_are_rounding():
    model, fogzo, closure = setup()
    for _ in range(2):
        fogzo.step(lambda: closure() + 1e7)
        model.zero_grad()
    with pytest.warns(UserWarning, match="little more than float32's rounding at the loss"):
        fogzo.stats()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fogzo.stats()
