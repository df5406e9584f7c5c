"""The study of settings on the small MLP."""

import json
import math
import re

import pytest
import torch

from bench.evidence import sweep

EVERY = [(name, setting) for name in sweep.LINES for setting in sweep.settings_of(name)]


@pytest.mark.parametrize(
    ("name", "setting"), EVERY, ids=[f"{n}-{'ste' if s.fogzo is None else 'fogzo'}" for n, s in EVERY]
)
def test_every_setting_trains_and_again_alike(name, setting):
    job = sweep.Job(setting, sweep.RATES[setting.optimizer][2], 0, 8)
    one, other = (sweep.train(job, lambda: None) for _ in "12")
    assert math.isfinite(one.loss)
    assert 0 <= one.accuracy <= 1
    assert (one.loss, one.accuracy) == (other.loss, other.accuracy)


def test_no_two_lines_have_the_same_setting():
    """None is that of another line: a setting that does nothing would be a line for nothing."""
    ours = [setting for _, setting in EVERY if setting.fogzo is not None]
    plain = [setting for _, setting in EVERY if setting.fogzo is None]
    assert len(set(ours)) == len(ours) == len(sweep.LINES)
    assert len(set(plain)) == len(plain)


def test_ste_is_the_gradient_of_the_whole_batch():
    """Micro-batches are scaled to their mean: one step of SGD is that of the batch at once."""
    setting = sweep.Setting(optimizer="sgd")
    torch.manual_seed(3)
    model, data = sweep.build(setting, 64, 10), sweep.digits()
    rows = torch.randint(len(data.train_x), (sweep.BATCH,), generator=sweep.generator_of(3, 0))
    loss = torch.nn.functional.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
        expected = torch.nn.functional.cross_entropy(model(data.train_x), data.train_y)
    found = sweep.train(sweep.Job(setting, 0.1, 3, 1), lambda: None)
    assert found.loss == pytest.approx(float(expected), rel=1e-5)


def test_a_run_writes_what_its_table_says(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    lines = ["base", "kappa = 1", "cosine rate"]
    sweep.main(["--lines", *lines, "--steps", "10", "--seeds", "3", "--workers", "2", "--out", str(path)])
    said = capsys.readouterr().out
    found = sweep.lines_of(json.loads(path.read_text()))
    assert sweep.table(found) in said
    assert [line.name for line in found] == lines
    assert [(len(line.ste), len(line.fogzo)) for line in found] == [(3, 3), (0, 3), (3, 3)]
    assert {r.job.seed for line in found for r in line.fogzo} == {0, 1, 2}


def test_differences_are_of_the_same_seeds():
    def runs(losses, fogzo):
        setting = sweep.Setting(fogzo=fogzo)
        return [sweep.Result(sweep.Job(setting, 0.01, seed, 1), loss, 0.5) for seed, loss in losses.items()]

    line = sweep.Line("base", runs({0: 1.0, 1: 2.0}, None), runs({1: 2.5, 0: 1.5}, ()))
    assert re.search(r"\| 0\.5000 ± 0\.0000 \|", sweep.table([line]))


def test_the_best_rate_is_that_of_the_mean_and_one_that_diverged_is_none():
    jobs = [(0.1, 1.0), (0.1, math.nan), (0.2, 3.0), (0.2, 3.0), (0.4, 1.0), (0.4, 6.0)]
    found = [sweep.Result(sweep.Job(sweep.BASE, rate, i, 1), loss) for i, (rate, loss) in enumerate(jobs)]
    assert sweep.best_of(found) == 0.2
