"""The Triton backend's own: a name that its kernels have no code for is an error, never another one's code."""

from contextlib import contextmanager

import pytest
import torch
from conftest import device_of
from support.processes import run_code

import fogzo_kernels as fk
from fogzo_kernels import backends
from fogzo_kernels.spec import noise, straight_through, update

TritonError = pytest.importorskip("triton.errors").TritonError

DEVICE = device_of("triton")


@pytest.fixture(autouse=True)
def _runs_here():
    if (reason := fk.available_backends(DEVICE)["triton"]) is not None:
        pytest.skip(f"backend triton: {reason}")


@pytest.fixture
def operands():
    latent, grad = (torch.ones(11, device=DEVICE) for _ in range(2))
    return latent, grad, torch.ones(1, device=DEVICE), torch.ones((), device=DEVICE)


def options(**changed):
    given = {
        "grid": fk.Grid.uniform(2),
        "straight_through": fk.StraightThrough("identity"),
        "seed": 1,
        "step": 2,
    }
    return {**given, "one_minus_beta": 0.5, "backend": "triton", **changed}


@contextmanager
def no_code_for(name):
    """The compiler's error, or the interpreter's, says at its root what has no code."""
    with pytest.raises(TritonError) as caught:
        yield
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert f"no code for {name}" in str(error)


def test_a_distribution_without_code_is_an_error(monkeypatch, operands):
    monkeypatch.setitem(noise.DISTRIBUTIONS, "cauchy", 1.0)
    latent, grad, alpha, norm = operands
    losses = torch.ones(2, 1, device=DEVICE)
    out = torch.full_like(latent, 99)
    given = options(straight_through=fk.StraightThrough("identity", noise="cauchy"))
    for call in (
        lambda: fk.noise(11, "cauchy", seed=1, device=DEVICE, backend="triton"),
        lambda: fk.perturb_quantize_(out, None, latent, grad, alpha, norm, **given),
        lambda: fk.estimate_gradient_(grad, *losses, alpha, norm, **given),
        lambda: fk.estimate_sgd_(
            latent, grad, (), *losses, alpha, norm, lr=0.1, momentum=0.0, optimizer_step=1, **given
        ),
    ):
        with no_code_for("distribution cauchy"):
            call()
    assert [out.unique().tolist(), latent.unique().tolist(), grad.unique().tolist()] == [[99], [1], [1]]


def test_a_straight_through_kind_without_code_is_an_error(monkeypatch, operands):
    monkeypatch.setitem(straight_through.KINDS, "cubic", (0.5, "uniform"))
    monkeypatch.setitem(straight_through.FORMS, "cubic", ("cubic", True))
    latent, grad, alpha, _ = operands
    with no_code_for("straight-through kind cubic"):
        fk.straight_through_backward_(
            grad,
            latent,
            alpha,
            grid=fk.Grid.sign(),
            straight_through=fk.StraightThrough("cubic"),
            backend="triton",
        )
        fk.learned_backward_(
            grad,
            torch.ones_like(alpha),
            latent,
            alpha,
            grid=fk.Grid.sign(),
            straight_through=fk.StraightThrough("cubic"),
            factors=1.0,
            backend="triton",
        )
    assert grad.unique().tolist() == [1]


@pytest.mark.parametrize("losses", [0, 1])
def test_a_rule_without_code_is_an_error(monkeypatch, operands, losses):
    monkeypatch.setitem(update.VARIANTS, "lion", 0)
    monkeypatch.setattr(update.UpdateRule, "variant", property(lambda _: "lion"))
    latent, grad, alpha, norm = operands
    both = torch.ones(2, losses, device=DEVICE)
    with no_code_for("rule lion"):
        fk.estimate_sgd_(
            latent, grad, (), *both, alpha, norm, lr=0.1, momentum=0.0, optimizer_step=1, **options()
        )
    assert latent.unique().tolist() == [1]


def test_the_package_gives_the_functions_of_the_protocol():
    """Though a file of the package is called as one of them is."""
    backend = backends.load("triton")
    names = [name for name in vars(backends.Backend) if not name.startswith("_")]
    assert "noise" in names
    assert all(callable(getattr(backend, name)) for name in names)


def key_of(order, folder):
    """The compiler's key of a kernel, with the plan's columns in some order."""
    code = f"""
from fogzo_kernels.backends.gpu import plans
plans.COLUMNS = {order}
from fogzo_kernels.backends.triton.norm import sumsq_kernel
print(sumsq_kernel.cache_key)
"""
    status, output = run_code(code, folder)
    assert status == 0, output
    return output


def test_another_order_of_columns_is_compiled_anew(tmp_path):
    """Or the compiler's cache on disk would give a kernel that reads other columns."""
    assert key_of("plans.COLUMNS", tmp_path) == key_of("plans.COLUMNS", tmp_path)
    assert key_of("plans.COLUMNS", tmp_path) != key_of("plans.COLUMNS[::-1]", tmp_path)
