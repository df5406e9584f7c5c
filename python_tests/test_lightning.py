"""Lightning, the real package: its steps are FOGZO's, clipped, logged, saved and resumed."""

import functools
import os

import pytest
import torch
import torch.nn.functional as F
from support.processes import as_launched, leave, needs_gloo, two_of
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fogzo_kernels as fk

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from fogzo_kernels.integrations.lightning import KEY, FogzoModuleMixin, GuidedNoise  # noqa: E402

STEPS, OPTIONS = 6, {"directions": 1, "kappa": 0.5, "seed": 3}
pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


class Rows(Dataset):
    def __init__(self, count=8 * STEPS):
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = (
            torch.randn(count, 12, generator=generator),
            torch.randint(4, (count,), generator=generator),
        )

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Plain(lightning.LightningModule):
    def __init__(self, fused=False, rate=0.05):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        fk.quantize_model(self.net, fk.presets.lsq(2))
        self.fused, self.rate, self.seen = fused, rate, []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.seen.append(float(loss.detach()))
        self.ran_in = type(self.trainer.strategy.model).__name__
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        kind = fk.SGD if self.fused else torch.optim.SGD
        return kind(self.parameters(), lr=self.rate)


class Ours(FogzoModuleMixin, Plain):
    fogzo_options = OPTIONS


def trainer_of(folder, **options):
    given = {
        "max_steps": STEPS, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder),
    } | options  # fmt: skip
    return lightning.Trainer(**given)


def fit(model, folder, ckpt_path=None, rows=None, batch=8, **options):
    trainer = trainer_of(folder, **options)
    trainer.fit(model, DataLoader(rows or Rows(), batch_size=batch), ckpt_path=ckpt_path)
    return trainer


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(clip=None):
    model, data = Plain(), Rows()
    fogzo = fk.Fogzo(model, total_steps=STEPS, **OPTIONS)
    optimizer, losses = model.configure_optimizers(), []
    for step in range(STEPS):
        rows = slice(8 * step, 8 * step + 8)
        optimizer.zero_grad()
        losses.append(
            fogzo.backward(lambda rows=rows: F.cross_entropy(model.net(data.x[rows]), data.y[rows])).item()
        )
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return losses, weights_of(model)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_lightning_takes_the_steps_of_a_loop_by_hand(tmp_path, fused, clip):
    model = Ours(fused)
    trainer = fit(model, tmp_path, gradient_clip_val=clip)
    losses, weights = by_hand(clip)
    assert model.seen[::3] == pytest.approx(losses, rel=1e-6)
    assert len(model.seen) == 3 * STEPS
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-5, atol=1e-6)
    assert model.fogzo.steps == trainer.global_step == STEPS


def test_what_is_logged_is_the_gradient_pass(tmp_path):
    """Also in the mean over an epoch, which would count the probes."""
    model = Ours()
    trainer = fit(model, tmp_path, max_steps=-1, max_epochs=1)
    losses, _ = by_hand()
    assert float(trainer.callback_metrics["loss_epoch"]) == pytest.approx(sum(losses) / STEPS, rel=1e-6)
    assert not model.probing


def test_without_probes_a_run_is_that_of_the_plain_module(tmp_path):
    class Late(Ours):
        fogzo_options = OPTIONS | {"start": 1.0}

    plain, late = Plain(), Late()
    for model in (plain, late):
        fit(model, tmp_path)
    theirs = weights_of(plain)
    assert plain.seen == late.seen
    assert all(torch.equal(p, theirs[name]) for name, p in late.named_parameters())


def test_bfloat16_trains(tmp_path):
    model = Ours()
    fit(model, tmp_path, precision="bf16-mixed")
    assert model.seen[::3] == pytest.approx(by_hand()[0], rel=0.05)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler_an_overflow_skips_the_step(tmp_path, fused, clip):
    """Its losses are those of float16; the overflow of the first step is skipped, and halves the scale."""
    from lightning.pytorch.plugins import MixedPrecision

    def run(scale, folder):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        model = Ours(fused)
        fit(model, folder, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=clip)
        return model, scaler

    if fused and clip:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):  # as any fused one
            run(8.0, tmp_path)
        return
    (model, scaler), (other, _) = (run(scale, tmp_path) for scale in (2.0**10, 2.0**4))
    assert model.fogzo.steps == other.fogzo.steps == STEPS
    assert scaler.get_scale() == 2.0**10
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights_of(other)[name], rtol=1e-2, atol=1e-3)
    model, scaler = run(2.0**120, tmp_path)
    assert model.fogzo.steps == 0
    assert scaler.get_scale() == 2.0 ** (120 - STEPS)
    assert all(torch.equal(p, weights_of(Ours())[name]) for name, p in model.named_parameters())


def half(folder, edit=lambda checkpoint: None, make=lambda: Ours(), *more):
    """The checkpoint of a run after 3 steps."""
    keep = lightning.callbacks.ModelCheckpoint(folder / "kept", "{step}", every_n_train_steps=3, save_top_k=-1)
    fit(make(), folder, enable_checkpointing=True, callbacks=[keep, *more])
    path = folder / "kept/step=3.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    edit(checkpoint)
    torch.save(checkpoint, path)
    return path


class Second(Rows):
    """Those of the second half of the steps."""

    def __init__(self):
        super().__init__()
        self.x, self.y = self.x[24:], self.y[24:]


def test_a_resumed_run_ends_with_the_bits_of_the_whole_one(tmp_path):
    whole = Ours()
    fit(whole, tmp_path)
    model = Ours()
    fit(model, tmp_path, ckpt_path=half(tmp_path), rows=Second())
    assert model.seen == whole.seen[9:]
    expected = weights_of(whole)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    assert model.fogzo.steps == STEPS


def test_a_finished_run_goes_on_for_more_steps(tmp_path):
    path = half(tmp_path)  # of a run of STEPS
    with pytest.raises(ValueError, match=r"state\['total_steps'\] must be 9, got 6.* may_differ="):
        fit(Ours(), tmp_path, ckpt_path=path, max_steps=9)

    class Longer(Ours):
        fogzo_options = OPTIONS | {"may_differ": ["total_steps"]}

    model = Longer()
    fit(model, tmp_path, ckpt_path=path, max_steps=9, rows=Rows(48 + 24))
    assert model.fogzo.steps == 9
    assert (
        model.fogzo.one_minus_beta
        == fk.Fogzo(model, total_steps=1, schedule="constant", **OPTIONS).one_minus_beta
    )


class Normed(Plain):
    def __init__(self, preset="lsq"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        fk.quantize_model(self.net, {"lsq": fk.presets.lsq(2), "bitnet": fk.presets.bitnet()}[preset])


class OursNormed(FogzoModuleMixin, Normed):
    fogzo_options = OPTIONS


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("preset", ["lsq", "bitnet"])
def test_an_epoch_that_averages_weights_moves_none(tmp_path, preset, accumulated):
    """StochasticWeightAveraging runs an epoch without steps, for BatchNorm: no weight moves."""
    model, average = OursNormed(preset), lightning.callbacks.StochasticWeightAveraging(swa_lrs=1e-2)
    fit(model, tmp_path, max_steps=-1, max_epochs=3, callbacks=[average], accumulate_grad_batches=accumulated)
    assert model.fogzo.steps == 3 * STEPS // accumulated
    assert not model.fogzo.pending
    averaged = dict(average._average_model.named_parameters())
    assert all(torch.equal(p, averaged[name]) for name, p in model.named_parameters())
    norm = model.net[1]
    found = norm.running_mean.clone(), norm.running_var.clone()
    norm.reset_running_stats()
    norm.momentum = None
    with torch.no_grad():
        for x, _ in DataLoader(Rows(), batch_size=8):
            model.net.train()(x)
    for one, other in zip(found, (norm.running_mean, norm.running_var), strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_that_was_loaded_begins_a_run_of_its_own(tmp_path):
    model = Ours.load_from_checkpoint(half(tmp_path), weights_only=False)
    fit(model, tmp_path)
    assert model.fogzo.steps == STEPS


def test_a_checkpoint_without_its_state_is_refused(tmp_path):
    path = half(tmp_path, edit=lambda checkpoint: checkpoint.pop(KEY))
    with pytest.raises(RuntimeError, match="the checkpoint must have 'fogzo', as FogzoModuleMixin writes it"):
        fit(Ours(), tmp_path, ckpt_path=path)


def by_parts(parts=2, clip=None, **options):
    """By hand, with the micro-batches of each step in each pass."""
    model, data = Plain(), Rows()
    fogzo = fk.Fogzo(model, total_steps=STEPS, **{"directions": 1} | OPTIONS | options)
    optimizer, losses = model.configure_optimizers(), []
    for step in range(STEPS):
        rows = torch.arange(8 * step, 8 * step + 8).chunk(parts)
        optimizer.zero_grad()
        for probe in fogzo.probes():
            with probe:
                for part in rows:
                    loss = F.cross_entropy(model.net(data.x[part]), data.y[part])
                    losses.append(float(loss.detach()))
                    probe.backward(loss / parts)
        fogzo.estimate_()
        optimizer.step()
    return losses, weights_of(model)


def test_micro_batches_are_kept_until_the_last(tmp_path):
    model = Ours()
    trainer = fit(model, tmp_path, batch=4, accumulate_grad_batches=2)
    losses, weights = by_parts()
    assert model.seen == pytest.approx(losses, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-5, atol=1e-6)
    assert model.fogzo.steps == trainer.global_step == STEPS
    assert "training_step" not in vars(model)


class Manual(Ours):
    """Takes its steps itself, each pass by micro-batches."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for probe in self.fogzo.probes():
            with probe:
                for x, y in zip(*(t.chunk(2) for t in batch), strict=True):
                    loss = F.cross_entropy(self.net(x), y)
                    self.seen.append(float(loss.detach()))
                    probe.backward(loss / 2)
        self.fogzo.estimate_()
        optimizer.step()


def test_manual_optimization_takes_the_steps_of_a_loop_by_hand(tmp_path):
    model = Manual()
    trainer = fit(model, tmp_path)
    losses, weights = by_parts()
    assert model.seen == losses
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert model.fogzo.steps == trainer.global_step == STEPS


def manual_worker(rank, folder, port):
    as_launched(rank, port)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "NODE_RANK": "0", "GROUP_RANK": "0"}
    with pytest.raises(ValueError, match="of a single device with manual optimization, got DDPStrategy"):
        fit(Manual(), folder, batch=4, devices=2, strategy="ddp")
    torch.save(True, os.path.join(folder, f"{rank}.pt"))
    leave()


@needs_gloo
def test_manual_optimization_of_two_processes_is_refused(tmp_path):
    """Nothing would exchange their gradients."""
    assert two_of(manual_worker, tmp_path) == [True, True]


def test_settings_that_lightning_cannot_run_are_refused(tmp_path):
    class Twice(Ours):
        fogzo_options = OPTIONS | {"total_steps": 3}

    with pytest.raises(ValueError, match="fogzo_options must not have total_steps"):
        fit(Twice(), tmp_path)

    class Silent(Ours):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(ValueError, match="training_step must return a loss in each pass of FOGZO, got None"):
        fit(Silent(), tmp_path)


def worker(rank, folder, port, parts=1):
    as_launched(rank, port)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "NODE_RANK": "0", "GROUP_RANK": "0"}
    model = Ours()
    fit(model, folder, batch=4 // parts, devices=2, strategy="ddp", accumulate_grad_batches=parts)
    torch.save((model.ran_in, model.seen, weights_of(model)), os.path.join(folder, f"{rank}.pt"))
    leave()


@needs_gloo
def test_two_processes_stay_one_model(tmp_path):
    """Their losses differ, their weights do not, and are near those of one process."""
    (kind, losses, weights), (_, others, same) = two_of(worker, tmp_path)
    assert kind == "DistributedDataParallel"
    assert losses != others
    assert all(torch.equal(w, same[name]) for name, w in weights.items())
    means = [(a + b) / 2 for a, b in zip(losses[::3], others[::3], strict=True)]
    assert means == pytest.approx(by_hand()[0], rel=0.1)


@needs_gloo
def test_two_processes_exchange_gradients_of_all_micro_batches(tmp_path):
    (_, _, weights), (_, _, same) = two_of(functools.partial(worker, parts=2), tmp_path)
    assert all(torch.equal(w, same[name]) for name, w in weights.items())
    (tmp_path / "whole").mkdir()
    (_, _, expected), _ = two_of(worker, tmp_path / "whole")
    for name, w in weights.items():
        torch.testing.assert_close(w, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_automatic_optimization_takes_guided_noise_by_a_hook(tmp_path, fused):
    """A plain LightningModule, whose optimizer is attached."""

    class Guided(Plain):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            guided = OPTIONS | {"directions": 0, "noise_per": "tensor"}
            self.estimator = fk.Fogzo(self.net, total_steps=STEPS, **guided)
            self.estimator.attach(optimizer)
            return optimizer

    model, data = Guided(fused), Rows()
    trainer = fit(model, tmp_path, gradient_clip_val=0.1)
    assert model.estimator.steps == trainer.global_step == STEPS
    hand = Guided(fused)
    optimizer = hand.configure_optimizers()
    for step in range(STEPS):
        rows = slice(8 * step, 8 * step + 8)
        optimizer.zero_grad()
        F.cross_entropy(hand.net(data.x[rows]), data.y[rows]).backward()
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.1)
        optimizer.step()
    weights = weights_of(hand)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


GUIDED = {"kappa": 0.5, "seed": 3}


@pytest.mark.parametrize("fused", [False, True])
def test_the_callback_adds_the_noise_of_an_attached_optimizer(tmp_path, fused):
    """The weights have the bits of a loop by hand, and fit takes its hook off again."""
    model, data, noise = Plain(fused), Rows(), GuidedNoise(**GUIDED)
    trainer = fit(model, tmp_path, callbacks=[noise])
    assert noise.fogzo.steps == trainer.global_step == STEPS
    hand = Plain(fused)
    optimizer = hand.configure_optimizers()
    fk.Fogzo(hand, STEPS, **GUIDED).attach(optimizer)
    for step in range(STEPS):
        rows = slice(8 * step, 8 * step + 8)
        optimizer.zero_grad()
        F.cross_entropy(hand.net(data.x[rows]), data.y[rows]).backward()
        optimizer.step()
    weights = weights_of(hand)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not noise.fogzo.attached


def test_the_callback_goes_on_from_a_checkpoint(tmp_path):
    """The steps are counted on, so that the rest of the run draws the noise of a whole run."""
    whole, other, noise = Plain(), Plain(), GuidedNoise(**GUIDED)
    fit(whole, tmp_path / "whole", callbacks=[GuidedNoise(**GUIDED)])
    path = half(tmp_path, lambda checkpoint: None, Plain, GuidedNoise(**GUIDED))
    fit(other, tmp_path / "rest", callbacks=[noise], ckpt_path=path, rows=Second())
    assert noise.fogzo.steps == STEPS
    weights = weights_of(whole)
    assert all(torch.equal(p, weights[name]) for name, p in other.named_parameters())


def test_the_callback_refuses_what_it_cannot_continue(tmp_path):
    plain = fit(Plain(), tmp_path / "plain", max_steps=3)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(RuntimeError, match="must have the state of GuidedNoise"):
        fit(Plain(), tmp_path / "more", callbacks=[GuidedNoise()], ckpt_path=tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="directions must be 0 for attach"):
        fit(Plain(), tmp_path / "probes", callbacks=[GuidedNoise(directions=1)])
