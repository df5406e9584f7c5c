"""The probes of a step: what is written for them, in which steps they run, and the estimate that they give."""

import functools

import pytest
import torch
from support.training import batch, loss_of, make

import fogzo_kernels as fk


def micro_batches(count):
    x, y = batch(rows=24)
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def passes_of(model, fogzo, batches):
    """A step's passes over micro-batches; what each pass's losses come to, by direction and sign."""
    losses = {}
    for probe in fogzo.probes():
        with probe:
            for x, y in batches:
                probe.backward(loss_of(model, x, y) / len(batches))
        losses[probe.direction, probe.sign] = probe.loss.clone()
    return losses


def guides(model):
    return [m.weight.grad.clone() for m in model.modules() if hasattr(m, "quantizer")]


def options_of(fogzo):
    """What an op takes to draw the noise of the coming step."""
    quantizer = fogzo.weights[0].quantizer
    return {
        "grid": quantizer.grid, "straight_through": quantizer.straight_through,
        "tensor_ids": [w.tensor_id for w in fogzo.weights], "one_minus_beta": fogzo.one_minus_beta,
        "seed": fogzo.seed, "step": fogzo.steps,
    }  # fmt: skip


def norm_of(fogzo, grads):
    return fk.guide_norm(grads, [w.alpha for w in fogzo.weights], grid=fogzo.weights[0].quantizer.grid)


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("parts", [1, 4])
def test_the_estimate_is_that_of_its_losses(backend, parts, directions):
    """c = (L+ - L-) / 2 eps, the losses being sums over the micro-batches of a pass."""
    model, fogzo = make(schedule="constant", directions=directions, backend=backend)
    losses = passes_of(model, fogzo, micro_batches(parts))
    assert list(losses) == [(0, 0), *((i, sign) for i in range(directions) for sign in (1, -1))]
    grads = [w.parameter.grad.clone() for w in fogzo.weights]
    plus, minus = (torch.stack([losses[i, sign] for i in range(directions)]) for sign in (1, -1))
    norm, wanted = norm_of(fogzo, grads), [g.clone() for g in grads]
    fk.estimate_gradient_(wanted, plus, minus, [w.alpha for w in fogzo.weights], norm, **options_of(fogzo))
    assert torch.equal(fogzo.estimate_(), losses[0, 0])
    for w, expected in zip(fogzo.weights, wanted, strict=True):
        assert torch.allclose(w.parameter.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("directions", [1, 3])
def test_a_probe_runs_what_the_op_writes_for_its_sign_alone(backend, directions):
    model, fogzo = make(schedule="constant", directions=directions, backend=backend)
    for probe in fogzo.probes():
        with probe:
            if probe.sign == 0:
                grads = None
            else:
                grads = grads or [w.parameter.grad.clone() for w in fogzo.weights]
                alone = [torch.full_like(g, torch.nan) for g in grads]
                fk.perturb_quantize_(
                    *((alone, None) if probe.sign > 0 else (None, alone)),
                    [w.latent for w in fogzo.weights],
                    grads,
                    [w.alpha for w in fogzo.weights],
                    norm_of(fogzo, grads),
                    direction=probe.direction,
                    **options_of(fogzo),
                )
                for w, expected in zip(fogzo.weights, alone, strict=True):
                    assert all(torch.equal(m.effective_weight(), expected) for m in w.modules)
            probe.backward(loss_of(model, *batch()))


def test_both_probes_are_one_call(monkeypatch):
    """And the second one has memory of its own while they run, which nobody else takes."""
    from fogzo_kernels.train import probes

    calls = []

    def counted(*args, **options):
        calls.append(args)
        fk.perturb_quantize_(*args, **options)

    monkeypatch.setattr(probes, "perturb_quantize_", counted)
    model, fogzo = make(schedule="constant")
    for _ in range(2):  # the first one counts codes, too
        model.zero_grad()
        calls.clear()
        fogzo.backward(functools.partial(loss_of, model, *batch()))
    ((plus, minus, *_),) = calls
    assert not {t.data_ptr() for t in plus} & {t.data_ptr() for t in minus}
    assert all(w.memory().data_ptr() == t.data_ptr() for w, t in zip(fogzo.weights, plus, strict=True))


@pytest.mark.parametrize("optimizer", [fk.AdamW, fk.SGD])
def test_fused_steps_take_the_same_losses(optimizer):
    """As estimate_() and a plain step do, to the bit."""
    options = {"schedule": "constant", "every": 2}
    (fused, own), (plain, other) = make(**options), make(**options)
    ends = optimizer(fused.parameters(), lr=0.1, fogzo=own), optimizer(plain.parameters(), lr=0.1)
    for _ in range(4):
        for model, fogzo, end in ((fused, own, ends[0]), (plain, other, ends[1])):
            torch.manual_seed(1)
            passes_of(model, fogzo, micro_batches(4))
            if model is plain:
                fogzo.estimate_()
            end.step()
            end.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(fused.parameters(), plain.parameters(), strict=True))


def test_every_third_step_has_probes():
    model, fogzo = make(schedule="constant", every=3, start=0.2, total_steps=10)
    counts = []
    for _ in range(8):
        counts.append(len(passes_of(model, fogzo, micro_batches(1))))
        assert (fogzo.one_minus_beta is None) == (counts[-1] == 1)
        if counts[-1] == 1:
            grads = guides(model)
        fogzo.estimate_()
        if counts[-1] == 1:
            assert all(torch.equal(a, b) for a, b in zip(grads, guides(model), strict=True))
        model.zero_grad()
    assert counts == [1, 1, 1, 3, 1, 1, 3, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be an int >= 1, got 0"),
        ({"every": 2.0}, "every must be an int >= 1, got 2.0"),
        ({"every": 2, "capturable": True}, "every must be 1 if capturable, got 2"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_every_pass_gives_as_many_losses():
    """A loss that a probe leaves out would be read as a fall of the loss."""
    model, fogzo = make(schedule="constant")
    x, y = batch()
    for probe in fogzo.probes():
        with probe:
            for _ in range(2 if probe.sign == 0 else 1):
                probe.backward(loss_of(model, x, y) / 2)
    with pytest.raises(RuntimeError, match="got 2 in the gradient pass and 1 in a probe"):
        fogzo.estimate_()
    assert not fogzo.pending
