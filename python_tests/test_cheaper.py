"""Steps of fewer forwards: forward differences, probes on a share of the micro-batches, every k-th step."""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from training import QUANTIZER, batch, loss_of, make

import fogzo_kernels as fk

DRAWS = 300


def micro_batches(count):
    x, y = batch(rows=24)
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def passes_of(model, fogzo, batches):
    """A step's passes over micro-batches; what each pass's losses come to, by direction and sign."""
    losses = {}
    for probe in fogzo.probes():
        with probe:
            for x, y in probe.batches(batches):
                probe.backward(loss_of(model, x, y) / len(batches))
        losses[probe.direction, probe.sign] = probe.loss.clone()
    return losses


def guides(model):
    return [m.weight.grad.clone() for m in model.modules() if hasattr(m, "quantizer")]


def expected(fogzo, grads, plus, minus):
    """The estimate of these losses from the gradients, by the op."""
    weights = fogzo.weights
    alphas = [w.alpha for w in weights]
    norm = fk.guide_norm(grads, alphas, grid=weights[0].quantizer.grid)
    out = [g.clone() for g in grads]
    quantizer = weights[0].quantizer
    fk.estimate_gradient_(
        out, plus, minus, alphas, norm, grid=quantizer.grid, straight_through=quantizer.straight_through,
        tensor_ids=[w.tensor_id for w in weights], one_minus_beta=fogzo.one_minus_beta, seed=fogzo.seed,
        step=fogzo.steps,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_the_estimate_is_that_of_its_losses(backend, difference, share, directions):
    """c = (L+ - L-) / 2 eps, or (L+ - L_0) / eps, with losses of the share times K over its size."""
    model, fogzo = make(
        schedule="constant", difference=difference, probe_share=share, directions=directions, backend=backend
    )
    batches = micro_batches(4)
    torch.manual_seed(3)
    losses = passes_of(model, fogzo, batches)
    assert [s for _, s in losses] == [0, *([1] if difference == "forward" else [1, -1]) * directions]
    grads = [w.parameter.grad.clone() for w in fogzo.weights]
    used = math.ceil(4 * share)
    torch.manual_seed(3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.norm.reset_running_stats()
        base = sum(loss_of(twin, x, y) / 4 for x, y in batches[:used])
    plus = torch.stack([losses[i, 1] for i in range(directions)]) * (4 / used)
    if difference == "forward":
        minus = 2 * base * (4 / used) - plus
    else:
        minus = torch.stack([losses[i, -1] for i in range(directions)]) * (4 / used)
    wanted = expected(fogzo, grads, plus, minus)
    assert torch.equal(fogzo.estimate_(), losses[0, 0])
    for w, one in zip(fogzo.weights, wanted, strict=True):
        assert torch.allclose(w.parameter.grad, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_a_forward_difference_is_exact_where_losses_are_close():
    """A large constant takes bits of the losses, but none of their difference: all are multiples of one ulp."""
    model, fogzo = make(schedule="constant", difference="forward")
    x, y = batch()
    losses = []

    def closure():
        losses.append(loss_of(model, x, y) + 1000)
        return losses[-1]

    fogzo.run(closure)
    grads = [w.parameter.grad.clone() for w in fogzo.weights]
    base, *_, plus = (loss.detach().double() for loss in losses)  # between them, two runs to compare
    difference = (plus - base).float().view(1)
    wanted = expected(fogzo, grads, difference, -difference)
    fogzo.estimate_()
    assert all(torch.equal(w.parameter.grad, one) for w, one in zip(fogzo.weights, wanted, strict=True))


class Curved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.tanh(3 * self.first(x)))


def draws(model, batches, **options):
    """Estimates over many seeds, (DRAWS, weights): which half of the batch comes first alternates."""
    found = []
    for seed in range(DRAWS):
        fogzo = fk.Fogzo(
            model,
            total_steps=9,
            one_minus_beta=0.2,
            schedule="constant",
            seed=seed,
            epsilon_scale=0.5,
            **options,
        )
        passes_of(model, fogzo, batches if seed % 2 else batches[::-1])
        fogzo.estimate_()
        found.append(torch.cat([w.parameter.grad.flatten() for w in fogzo.weights]).double())
        model.zero_grad()
    return torch.stack(found)


def test_the_mean_of_the_estimate_is_that_of_the_central_one(record_property):
    """Over the noise, and over which micro-batches the probes run; the variance is larger."""
    torch.manual_seed(0)
    model = Curved()
    fk.quantize_model(model, QUANTIZER)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(32, 6, generator=generator)
    y = torch.randint(2, (32,), generator=generator)
    batches = list(zip(x.chunk(2), y.chunk(2), strict=True))
    central = draws(model, batches)
    for name, options in {
        "forward": {"difference": "forward"},
        "half": {"probe_share": 0.5},
        "forward on half": {"difference": "forward", "probe_share": 0.5},
    }.items():
        found = draws(model, batches, **options)
        error = ((found.var(0) + central.var(0)) / DRAWS).sqrt()
        z = (found.mean(0) - central.mean(0)) / error.clamp(min=1e-12)
        ratio = float(found.var(0).sum() / central.var(0).sum())
        record_property(f"variance of {name} over that of central", ratio)
        assert z.abs().max() < 5, name
        assert z.square().mean() < 1.6, name
        assert ratio > 0.5


@pytest.mark.parametrize("optimizer", [fk.AdamW, fk.SGD])
def test_fused_steps_take_the_same_losses(optimizer):
    """As estimate_() and a plain step do, to the bit."""
    options = {"schedule": "constant", "difference": "forward", "probe_share": 0.5, "every": 2}
    (fused, one), (plain, other) = make(**options), make(**options)
    ends = optimizer(fused.parameters(), lr=0.1, fogzo=one), optimizer(plain.parameters(), lr=0.1)
    for _ in range(4):
        for model, fogzo, end in ((fused, one, ends[0]), (plain, other, ends[1])):
            torch.manual_seed(1)
            passes_of(model, fogzo, micro_batches(4))
            if model is plain:
                fogzo.estimate_()
            end.step()
            end.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(fused.parameters(), plain.parameters(), strict=True))


def steps_of(model, fogzo, optimizer=None):
    """Losses of two steps, and what they leave in gradients and weights."""
    found = []
    for _ in range(2):
        model.zero_grad()
        found += passes_of(model, fogzo, micro_batches(2)).values()
        (optimizer.step if optimizer else fogzo.estimate_)()
        found += [p.grad.clone() for p in model.parameters()]
    return [*found, *(p.detach().clone() for p in model.parameters())]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("directions", [1, 3])
def test_both_probes_at_once_are_the_same_steps(backend, directions, fused):
    found = []
    for both in (False, True):
        model, fogzo = make(schedule="constant", both_probes=both, directions=directions, backend=backend)
        optimizer = fk.AdamW(model.parameters(), lr=1e-2, fogzo=fogzo) if fused else None
        torch.manual_seed(3)  # dropout
        found.append(steps_of(model, fogzo, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_both_probes_are_one_call(monkeypatch):
    """And the second one has memory of its own while they run, which nobody else takes."""
    from fogzo_kernels.train import step as steps

    calls = []

    def counted(*args, **options):
        calls.append(args)
        fk.perturb_quantize_(*args, **options)

    monkeypatch.setattr(steps, "perturb_quantize_", counted)
    for both, expected in ((False, 2), (True, 1)):
        model, fogzo = make(schedule="constant", both_probes=both)
        for _ in range(2):  # the first one counts codes, too
            model.zero_grad()
            calls.clear()
            fogzo.step(functools.partial(loss_of, model, *batch()))
        assert len(calls) == expected
        plus, minus = calls[0][:2]
        assert (plus is not None) + (minus is not None) == 1 + both
        if both:
            assert not {t.data_ptr() for t in plus} & {t.data_ptr() for t in minus}
            assert all(w.memory().data_ptr() == t.data_ptr() for w, t in zip(fogzo.weights, plus, strict=True))
    with pytest.raises(TypeError, match="both_probes must be a bool, got int"):
        make(both_probes=1)


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


def test_settings_of_cheaper_steps_travel():
    _, fogzo = make(difference="forward", every=2, probe_share=0.25)
    _, same = make(difference="forward", every=2, probe_share=0.25)
    _, other = make(difference="forward", every=2)
    same.load_state_dict(fogzo.state_dict())
    with pytest.raises(ValueError, match=r"state\['probe_share'\] must be 1.0, got 0.25"):
        other.load_state_dict(fogzo.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"difference": "backward"}, "difference must be one of central, forward, got 'backward'"),
        ({"every": 0}, "every must be an int >= 1, got 0"),
        ({"every": 2.0}, "every must be an int >= 1, got 2.0"),
        ({"probe_share": 0.0}, "probe_share must be > 0, got 0.0"),
        ({"probe_share": 1.5}, "probe_share must be in 0..1, got 1.5"),
        ({"every": 2, "capturable": True}, "every must be 1 if capturable, got 2"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_share_needs_the_micro_batches():
    model, fogzo = make(schedule="constant", probe_share=0.5)
    x, y = batch()
    with pytest.raises(RuntimeError, match=r"probe_share must be 1 where a closure runs the passes, got 0.5"):
        fogzo.step(lambda: loss_of(model, x, y))
    passes = fogzo.probes()
    first = next(passes)
    with pytest.raises(RuntimeError, match=r"probe_share=0.5 must be used with the micro-batches"), first:
        first.backward(loss_of(model, x, y))
    assert all(p.grad is None for p in model.parameters())


def run_batches(model, fogzo, given, losses=1):
    """Passes that get so many micro-batches each, and give so many losses for each of them."""
    for probe, count in zip(fogzo.probes(), given, strict=False):
        with probe:
            for x, y in probe.batches(micro_batches(count)):
                for _ in range(losses):
                    probe.backward(loss_of(model, x, y))


@pytest.mark.parametrize(
    ("given", "losses", "message"),
    [
        ((4, 2, 4), 1, "micro_batches must be those of the gradient pass in every pass, got 2 of 4"),
        ((2, 2, 2), 2, r"each of probe.batches\(\) must give one loss to probe.backward, got 2"),
        ((2, 2, 2), 0, r"each of probe.batches\(\) must give one loss to probe.backward, got 0"),
    ],
)
def test_micro_batches_that_differ(given, losses, message):
    model, fogzo = make(schedule="constant", probe_share=0.5)
    with pytest.raises(RuntimeError, match=message):
        run_batches(model, fogzo, given, losses)
    assert not fogzo.pending


def test_batches_left_early_or_without_length():
    model, fogzo = make(schedule="constant", probe_share=0.5)
    for probe in fogzo.probes():
        with probe:
            for x, y in probe.batches(micro_batches(4)):
                probe.backward(loss_of(model, x, y))
                break
    with pytest.raises(RuntimeError, match="a loss for each of its micro-batches, got 1 in the gradient pass"):
        fogzo.estimate_()
    model.zero_grad()
    passes = fogzo.probes()
    first = next(passes)
    with pytest.raises(TypeError, match="micro_batches must be a sequence, got generator"), first:
        next(first.batches(pair for pair in micro_batches(2)))
    with pytest.raises(RuntimeError, match=r"probe\.batches must be called inside `with probe:`"):
        next(next(fogzo.probes()).batches([1]))


def test_every_pass_gives_as_many_losses():
    """Also without batches(): a loss that a probe leaves out would be read as a fall of the loss."""
    model, fogzo = make(schedule="constant")
    x, y = batch()
    for probe in fogzo.probes():
        with probe:
            for _ in range(2 if probe.sign == 0 else 1):
                probe.backward(loss_of(model, x, y) / 2)
    with pytest.raises(RuntimeError, match="got 2 in the gradient pass and 1 in a probe"):
        fogzo.estimate_()
    assert not fogzo.pending
