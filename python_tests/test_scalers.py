"""Gradient scalers: a step moves by the unscaled estimate at every scale, or raises before anything moves."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from support.processes import fresh_accelerate  # noqa: F401
from torch import nn

import fogzo_kernels as fk

SCALES = [1.0, 2.0**10, 2.0**16]
FUSED = {
    "AdamW": functools.partial(fk.AdamW, lr=1e-2),
    "SGD": functools.partial(fk.SGD, lr=0.1, momentum=0.9),
}


class Run:
    """Two steps on three micro-batches each, by a way of its own."""

    def __init__(self, kind, scale, dtype=torch.float32, preset=None, fused=True, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        fk.quantize_model(self.model, preset or fk.presets.lsq(2))
        self.model.to(dtype)
        settings = {"total_steps": 10, "kappa": 1.0, "schedule": "constant"} | options
        self.fogzo = fk.Fogzo(self.model, **{"directions": 1} | settings)
        self.optimizer = FUSED[kind](self.model.parameters(), **({"fogzo": self.fogzo} if fused else {}))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 0)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(6, 12, generator=generator).to(dtype)
        self.y = torch.randint(4, (6,), generator=generator)

    def passes(self, factor=1.0):
        self.optimizer.zero_grad()
        for probe in self.fogzo.probes():
            with probe:
                for x, y in zip(self.x.chunk(3), self.y.chunk(3), strict=True):
                    loss = F.cross_entropy(self.model(x).float(), y) / 3
                    probe.backward(self.scaler.scale(loss) * factor)

    def state(self):
        return copy.deepcopy([[*self.model.parameters()], self.optimizer.state_dict()["state"]])


def direct(run):
    run.passes()
    run.scaler.step(run.optimizer)


def estimated(run):
    run.passes()
    run.fogzo.estimate_()
    run.scaler.step(run.optimizer)


def clipped(run):
    run.passes()
    run.fogzo.estimate_()
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
    run.scaler.step(run.optimizer)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("way", [direct, estimated, clipped])
@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize(
    "options",
    [{}, {"directions": 3}, {"start": 1.0}, {"preset": fk.presets.bitnet()},
     {"dtype": torch.bfloat16}],
    ids=str,
)  # fmt: skip
def test_every_scale_gives_the_same_step(options, kind, way):
    found, changes = [], set()
    for scale in [0, *SCALES]:
        run = Run(kind, scale, fused=way is direct, **options)
        for _ in range(2):
            way(run)
            run.scaler.update()
        found.append(run.state())
        assert run.fogzo.steps == 2
        if way is direct:
            stats = run.fogzo.stats()
            assert stats["loss"] < 3  # the unscaled one
            changes.add(str(stats["code_changes"]))
    assert all(same(state, found[0]) for state in found[1:])
    assert len(changes) == (way is direct)  # codes are counted with the unscaled norm


@pytest.mark.parametrize("scale", SCALES)
def test_gradients_unscaled_before_a_fused_step_are_an_error(scale):
    run = Run("AdamW", scale)
    before = run.state()
    run.passes()
    run.scaler.unscale_(run.optimizer)
    with pytest.raises(
        RuntimeError, match=r"unscale_.*must not come between .*call fogzo\.estimate_\(\) before"
    ):
        run.scaler.step(run.optimizer)
    assert same(run.state(), before)


def test_a_closure_under_a_scaler_is_refused():
    run = Run("SGD", 8.0)
    run.scaler.scale(torch.ones(()))
    before = run.state()
    with pytest.raises(RuntimeError, match="closure must be None under a gradient scaler"):
        run.scaler.step(run.optimizer, lambda: F.cross_entropy(run.model(run.x), run.y))
    assert same(run.state(), before)


@pytest.mark.parametrize("way", [direct, estimated, clipped])
@pytest.mark.parametrize("kind", [*FUSED, "torch"])
def test_an_overflow_skips_the_step_and_halves_the_scale(kind, way):
    run = Run(kind if kind != "torch" else "SGD", 2.0**100, fused=way is direct and kind != "torch")
    if kind == "torch":
        run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.1)
    way = estimated if kind == "torch" and way is direct else way
    way(run)
    run.scaler.update()
    before = run.state()
    run.scaler._scale.fill_(2.0**127)
    run.passes, passes = functools.partial(run.passes, 2.0**10), run.passes
    way(run)
    run.scaler.update()
    assert same(run.state(), before)
    assert run.scaler.get_scale() == 2.0**126
    assert (run.fogzo.steps, run.fogzo.diagnostics()["lost_steps"]) == (1, 1)
    run.passes = passes
    run.scaler._scale.fill_(2.0**10)
    way(run)
    run.scaler.update()
    assert run.fogzo.steps == 2
    assert not same(run.state(), before)


@pytest.mark.parametrize("scale", [0, 2.0**12])
def test_under_a_scaler_two_optimizers_skip_the_same_step(scale):
    found = []
    for with_bad in (False, True):
        run = Run("AdamW", scale)
        biases = [layer.bias for layer in (run.model[0], run.model[2])]
        rest = [p for p in run.model.parameters() if all(p is not b for b in biases)]
        run.optimizer = fk.AdamW(rest, lr=1e-2, fogzo=run.fogzo)
        other = torch.optim.SGD(biases, lr=0.1, momentum=0.9)
        for bad in (False, True, False) if with_bad else (False, False):
            run.model.zero_grad()
            run.passes(float("inf") if bad else 1.0)
            for optimizer in (other, run.optimizer):
                run.scaler.step(optimizer)
            run.scaler.update()
        found.append([run.state(), other.state_dict()["state"]])
    assert same(*found)


def test_without_fogzo_a_fused_optimizer_is_pytorchs():
    for bad in (False, True):
        found = []
        for make in (fk.AdamW, functools.partial(torch.optim.AdamW, fused=True)):
            p = torch.ones(4, requires_grad=True)
            optimizer, scaler = make([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
            for factor in (1.0, float("inf") if bad else 2.0):
                optimizer.zero_grad()
                scaler.scale(p.square().sum() * factor).backward()
                scaler.step(optimizer)
                scaler.update()
            found.append((p.detach(), torch.tensor(scaler.get_scale())))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_captured_step_under_a_scaler_skips_an_overflow(monkeypatch):
    """The scale and what it found are read on the device."""
    for module in ("train.step", "train.guards.gradients", "optim.fused"):
        monkeypatch.setattr(f"fogzo_kernels.{module}.capturing", lambda: True)
    found = []
    for scale in (0, 2.0**10):
        run = Run("AdamW", scale, capturable=True)
        rate = torch.tensor(1e-2, dtype=torch.float64)
        run.optimizer = fk.AdamW(run.model.parameters(), lr=rate, fogzo=run.fogzo, capturable=True)
        direct(run)
        run.scaler.update()
        before = run.state()
        run.passes(float("inf"))
        run.scaler.step(run.optimizer)
        assert same(run.state(), before)
        found.append(before)
    assert same(*found)


# ---- of other packages


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("kind", ["fused", "estimated", "torch"])
def test_accelerates_optimizer_skips_an_overflow(kind):
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    found = []
    for scale in (0, 2.0**10):
        run = Run("AdamW", scale, fused=kind == "fused")
        if kind == "torch":
            run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-2)
        run.optimizer = accelerate.optimizer.AcceleratedOptimizer(
            run.optimizer, scaler=run.scaler if scale else None
        )
        for factor in (1.0, float("inf"), 1.0):
            run.passes(factor)
            if kind != "fused":
                run.fogzo.estimate_()
            run.optimizer.step()
        found.append(run.state())
        assert run.scaler.get_scale() == (2.0**9 if scale else 1.0)
        assert run.fogzo.steps == 2
    assert same(*found)
