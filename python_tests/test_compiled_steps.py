"""torch.compile around a training step: the step runs as without it, between what is compiled."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fogzo_kernels as fk

#: The same in every run: PyTorch's own optimizer rounds otherwise when it is compiled, which may flip a code.
DATA = torch.Generator().manual_seed(1)
X, Y = torch.randn(64, 32, generator=DATA), torch.randint(5, (64,), generator=DATA)
STEPS = 3


def by_closure(model, fogzo, optimizer):
    return optimizer.step(lambda: F.cross_entropy(model(X), Y))


def by_closure_and_zeros(model, fogzo, optimizer):
    optimizer.zero_grad()
    return optimizer.step(lambda: F.cross_entropy(model(X), Y))


def by_estimate(model, fogzo, optimizer):
    loss = fogzo.backward(lambda: F.cross_entropy(model(X), Y))
    optimizer.step()
    return loss


def by_run(model, fogzo, optimizer):
    fogzo.run(lambda: F.cross_entropy(model(X), Y))
    return optimizer.step()


def by_probes(model, fogzo, optimizer):
    for probe in fogzo.probes():
        with probe:
            for x, y in zip(X.chunk(2), Y.chunk(2), strict=True):
                probe.backward(F.cross_entropy(model(x), y) / 2)
    loss = fogzo.estimate_()
    optimizer.step()
    return loss


def trained(step, kind, compiled, part):
    """Losses and weights; ``part`` compiles the model as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 5))
    fk.quantize_model(model, fk.presets.lsq(2))
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, schedule="constant", directions=1)
    if kind is fk.AdamW:
        optimizer = fk.AdamW(model.parameters(), lr=1e-2, fogzo=fogzo)
    else:
        optimizer = kind(model.parameters(), lr=1e-2)
    torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager") if part else model
    call = torch.compile(step, backend="aot_eager") if compiled else step
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(float(call(forward, fogzo, optimizer)))
    assert fogzo.steps == STEPS
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:a pass of a step changes")
@pytest.mark.parametrize("part", [False, True], ids=["", "model compiled"])
@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (by_closure, fk.AdamW), (by_closure_and_zeros, fk.AdamW), (by_run, fk.AdamW), (by_estimate, fk.AdamW),
        (by_estimate, torch.optim.AdamW), (by_probes, torch.optim.AdamW),
    ],
)  # fmt: skip
def test_a_compiled_training_step_is_the_plain_one(step, kind, part):
    plain, compiled = (trained(step, kind, c, part) for c in (False, True))
    exact = kind is fk.AdamW  # PyTorch's own is compiled, and rounds otherwise
    assert plain[0] == (compiled[0] if exact else pytest.approx(compiled[0], rel=1e-5))
    assert len(set(plain[0])) == STEPS
    for p, q in zip(plain[1], compiled[1], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0 if exact else 1e-4)


def test_a_step_that_must_be_one_graph_says_why_it_is_none():
    model = nn.Sequential(nn.Linear(32, 5))
    fk.quantize_model(model, fk.presets.lsq(2))
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
    step = torch.compile(lambda: fogzo.backward(lambda: F.cross_entropy(model(X), Y)), fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="a step of FOGZO is not compiled; compile the model"
    ):
        step()


def test_the_package_does_not_load_the_compiler():
    """A second or two, for all who do not use it."""
    code = "import sys, torch; before = 'torch._dynamo' in sys.modules; import fogzo_kernels; "
    code += "sys.exit(not before and 'torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
