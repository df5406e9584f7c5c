"""Settings of the estimator, the schedule of 1 - beta, and resuming."""

import pytest
import torch
from support.training import batch, loss_of, make, run_step, same_state, state_of

from fogzo_kernels.train.settings import linear

# ---- settings


@pytest.mark.parametrize("name", ["seed", "directions", "epsilon_scale", "steps", "one_minus_beta"])
def test_settings_are_read_only(name):
    """One that could be set would disagree with the state dict."""
    _, fogzo = make()
    with pytest.raises(AttributeError):
        setattr(fogzo, name, 1)


def test_public_names_are_few():
    _, fogzo = make()
    assert {name for name in dir(fogzo) if not name.startswith("_")} == {
        "backward", "run", "probes", "estimate_", "pending", "steps", "one_minus_beta", "diagnostics",
        "state_dict", "load_state_dict", "weights", "total_weights", "device", "directions", "seed",
        "epsilon_scale", "check", "discard", "stats", "backend",
        "found_inf", "pending_step", "check_estimates", "attach", "attached",
    }  # fmt: skip


def test_repr_says_the_settings():
    _, fogzo = make(directions=2, seed=5)
    assert repr(fogzo) == (
        "Fogzo(total_steps=100, one_minus_beta=0.01, directions=2, seed=0, epsilon_scale=1.0,"
        " schedule='linear', start=0.0, every=1, noise_per='model'): 0 steps taken,"
        " 2 quantized weights of 136 elements on cpu"
    )


# ---- resuming


def test_resuming_gives_the_same_bits(tmp_path):
    def setup():
        model, fogzo = make(total_steps=8, directions=2)
        return model, fogzo, torch.optim.Adam(model.parameters(), lr=0.05)

    def go(model, fogzo, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            fogzo.backward(lambda step=step: loss_of(model, *batch(seed=step)))
            optimizer.step()

    run = setup()
    torch.manual_seed(9)
    go(*run, range(8))
    straight = state_of(run[0])

    run = setup()
    torch.manual_seed(9)
    go(*run, range(3))
    saved = [part.state_dict() for part in run] + [torch.get_rng_state()]
    torch.save(saved, tmp_path / "run.pt")
    run = setup()
    torch.manual_seed(123)
    *states, rng = torch.load(tmp_path / "run.pt")
    for part, state in zip(run, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(rng)
    go(*run, range(3, 8))
    assert same_state(straight, state_of(run[0]))


def test_resuming_with_other_settings_is_refused():
    _, fogzo = make(seed=1)
    _, other = make(seed=1, directions=2)
    with pytest.raises(ValueError, match="directions"):
        other.load_state_dict(fogzo.state_dict())
    with pytest.raises(ValueError, match="keys"):
        other.load_state_dict({})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "counters",
            torch.ones((), dtype=torch.int64),
            r"state\['counters'\] must have shape \(3,\), got \(\)",
        ),
        ("steps", -1, r"state\['steps'\] must be in 0\.\.4294967295, got -1"),
    ],
)
def test_a_bad_state_changes_nothing(name, value, message):
    model, fogzo = make()
    run_step(model, fogzo, [batch()])
    before = fogzo.state_dict()
    with pytest.raises(ValueError, match=message):
        fogzo.load_state_dict(before | {"steps": 7, name: value})
    assert str(fogzo.state_dict()) == str(before)


def test_a_state_written_before_loads_where_a_step_of_its_settings_is_left():
    """States had a difference and a share of the micro-batches, of which one value each is left."""
    _, fogzo = make()
    before = fogzo.state_dict() | {"steps": 3, "difference": "central", "probe_share": 1.0}
    fogzo.load_state_dict(before)
    assert fogzo.steps == 3
    assert not {"difference", "probe_share"} & fogzo.state_dict().keys()
    for name, wanted, value in (("difference", "central", "forward"), ("probe_share", 1.0, 0.5)):
        with pytest.raises(ValueError, match=rf"state\['{name}'\] must be {wanted}, got '?{value}'?: steps of"):
            fogzo.load_state_dict(before | {"steps": 7, name: value})
    assert fogzo.steps == 3


def test_a_state_is_not_loaded_inside_a_pass():
    _, fogzo = make()
    state = fogzo.state_dict()
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) must not be called inside a pass"):
        fogzo.run(lambda: fogzo.load_state_dict(state))
    assert not fogzo.pending


# ---- the schedule


@pytest.mark.parametrize("total", [1, 7, 1000])
def test_schedule_of_tensors_has_the_bits_of_numbers(total):
    steps = list(range(0, 2 * total, max(total // 13, 1)))
    numbers = [linear(step, total, 0.3) for step in steps]
    tensors = [linear(torch.tensor(step).double(), total, 0.3).item() for step in steps]
    assert numbers == tensors
    assert numbers[0] == 0.0
    assert numbers[-1] == 0.3
    assert numbers == sorted(numbers)
