"""The study of estimators: which runs it makes, what it says of them; small ones are run."""

import json
import math

import pytest
import torch

from bench.evidence import quality, tasks
from bench.evidence.quality import Job, Result

pytest.importorskip("transformers", reason="transformers is not installed")


def result(method="ste", loss=1.0, seed=0, steps=10, seconds=1.0, alive=0.5, **more):
    kappa = None if method == "ste" else 0.1
    job = Job("llama", "lsq", method, more.get("rate", 0.01), more.get("kappa", kappa), seed, steps)
    return Result(job, loss=loss, seconds=seconds, alive=alive, losses=[2.0, loss])


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("method", ["ste", "fogzo"])
def test_tasks_train(name, method, monkeypatch):
    """The loss of each falls; what is quantized starts alive; a run is a function of its job."""
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    if name == "llama-1m":
        monkeypatch.setitem(tasks.TASKS, name, tasks.llama(64, 1, 4, 32))  # the same, smaller
    job = Job(name, "lsq", method, 5e-3, None if method == "ste" else 0.1, 3, 12)
    ticks = []
    found = quality.train(job, lambda: ticks.append(1))
    assert len(ticks) == 12
    assert found.losses[-1] < found.losses[0]
    assert 0.2 < found.alive < 0.8
    assert math.isfinite(found.loss)
    assert (found.accuracy is None) == name.startswith("llama")
    assert found.stats.get("code_changes", 0) >= 0
    assert quality.train(job, lambda: None).losses == found.losses


def test_batches_are_those_of_seed_and_step():
    """So that methods of a seed see the same."""
    model = tasks.TASKS["resnet"].make().eval()
    loss = tasks.TASKS["resnet"].loss
    assert torch.equal(loss(model, 1, 2), loss(model, 1, 2))
    assert len({float(loss(model, seed, step).detach()) for seed in range(2) for step in range(2)}) == 4


def test_methods_try_as_much_and_are_judged_on_fresh_seeds():
    args = quality.parse(["--steps", "10", "--seeds", "3"])
    assert {len(quality.trials_of(args, method)) for method in quality.METHODS} == {6}
    asked = []

    def run(jobs):
        asked.append(jobs)
        best = {"ste": 3e-3, "fogzo": 4e-3, "late": 1e-2}
        slow = {"ste": 1.0, "fogzo": 1.5, "late": 1.2}
        return [
            Result(job, loss=abs(job.rate - best[job.method]) + (job.kappa or 0), seconds=slow[job.method])
            for job in jobs
        ]

    found = quality.cell(args, "llama", "lsq", run)
    search, fresh, *longer = asked
    assert len(search) == 36
    assert {job.seed for job in search} == set(quality.SEARCH_SEEDS)
    assert {(j.method, j.rate, j.kappa) for j in fresh} == {
        ("ste", 3e-3, None), ("fogzo", 4e-3, 0.1), ("late", 1e-2, 0.1),
    }  # fmt: skip
    assert {job.seed for job in fresh} == {0, 1, 2}
    assert [{(j.method, j.steps, j.rate) for j in jobs} for jobs in longer] == [
        {("ste", 15, 3e-3)},
        {("ste", 12, 3e-3)},
    ]
    assert len(found) == 36 + 9 + 6


def test_settings_are_judged_on_other_seeds_and_lengths():
    args = quality.parse(
        [
            "--steps",
            "40",
            "--search-steps",
            "10",
            "--seeds",
            "2",
            "--first-seed",
            "5",
            "--methods",
            "ste",
            "fogzo",
        ]
    )
    asked = []

    def run(jobs):
        asked.append(jobs)
        return [Result(job, loss=job.rate + (job.kappa or 0), seconds=1.0) for job in jobs]

    quality.cell(args, "llama", "lsq", run)
    search, fresh, _ = asked
    assert {(j.seed, j.steps) for j in search} == {(seed, 10) for seed in quality.SEARCH_SEEDS}
    assert {(j.method, j.rate, j.kappa, j.seed, j.steps) for j in fresh} == {
        (method, 1.5e-3, kappa, seed, 40)
        for method, kappa in (("ste", None), ("fogzo", 0.1))
        for seed in (5, 6)
    }


def test_a_run_that_diverged_is_not_the_best():
    losses = {0.1: (math.nan, 0.1), 0.2: (2.0, 2.2), 0.3: (3.0, 1.5)}
    results = [result(loss=a, rate=rate, seed=i) for rate, both in losses.items() for i, a in enumerate(both)]
    assert quality.best_of(results).rate == 0.2


@pytest.mark.parametrize(
    ("losses", "word"), [((0.5, 0.6, 0.7), "win"), ((1.0, 1.1, 1.0), "draw"), ((2.0, 2.1, 2.2), "loss")]
)
def test_a_difference_counts_from_two_standard_errors(losses, word):
    """A difference counts from two standard errors on, at equal steps and at equal time."""
    ste = [result(loss=loss, seed=i) for i, loss in enumerate((1.0, 1.1, 1.05))]
    own = [result("fogzo", loss, i, seconds=1.4) for i, loss in enumerate(losses)]
    longer = [result(loss=0.55 + 0.01 * i, seed=i, steps=14, seconds=1.4) for i in range(3)]
    searched = [result("fogzo", -9.0, quality.SEARCH_SEEDS[0])]
    said = quality.verdicts([*ste, *own, *longer, *searched], 10)
    assert said.startswith(f"llama, lsq, fogzo: at equal steps {word} (")
    assert f"at equal time {'draw' if word == 'win' else 'loss'} (" in said
    table = quality.table([*ste, *own, *longer, *searched], 10)
    assert table.count("\n") == 4
    assert "| ste, as long (14 steps) |" in table
    dead = quality.verdicts([*ste, *(Result(r.job, r.loss, alive=0.0) for r in own)], 10)
    assert dead == ""
    assert "codes start at 0" in quality.table([Result(r.job, r.loss, alive=0.0) for r in own], 10)


def test_what_was_measured_is_not_run_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "llama", tasks.llama(64, 1, 2, 16))
    out = tmp_path / "quality.json"
    options = [
        "--tasks", "llama", "--presets", "lsq", "--methods", "ste", "fogzo", "--steps", "2", "--seeds", "2",
        "--workers", "1", "--out", str(out), "--plot", str(tmp_path / "a/quality.png"),
    ]  # fmt: skip
    calls = []

    def here(train, jobs, steps, workers, preload):
        calls.append(len(jobs))
        return [train(job, lambda: None) for job in jobs]

    monkeypatch.setattr(quality.pool, "run", here)
    quality.main(options)
    runs = json.loads(out.read_text())["runs"]
    longer = {run["job"]["steps"] for run in runs} - {2}  # none where two steps take no longer by the clock
    assert sum(calls) == len(runs) == 24 + 4 + 2 * len(longer)
    assert (tmp_path / "a/quality.png").stat().st_size > 5_000
    said = capsys.readouterr().out
    assert "llama, lsq, fogzo: at equal steps" in said
    calls.clear()
    quality.main(options)
    assert not calls
