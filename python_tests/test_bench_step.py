"""The benchmark of a step: how many forwards its methods run, what they move, what it reports; no timing."""

import copy
import functools
import gc
import json

import pytest
import torch
from torch import nn

import fogzo_kernels as fk
from bench.lost import LOST
from bench.step import __main__ as program
from bench.step import host, materialized, measure, models
from bench.step.materialized import Materialized, Mezo
from bench.step.measure import Row
from bench.step.methods import INT4, LSQ, METHODS, Clock, method_of
from bench.step.peers import prepare_lsq, prepare_torchao
from bench.step.report import quartiles
from bench.step.traffic import peak_of, recorded

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--rows", "8", "--hidden", "32", "--layers", "1", "--turns", "4"]
#: Micro-batches that a method's step runs, of 4.
FORWARDS = {
    **dict.fromkeys(["float", "lsq", "modules", "ste", "guided", "ste-int4", "ste-w4a8"], 4),
    "fogzo": 12,
    "eager": 12,
    "mezo": 8,
}


def method(name, *options, model="mlp"):
    args = program.parse([*SMALL, "--model", model, *options])
    (setting,) = program.settings_of(args)
    return method_of(name, models.task_of(setting), setting)


def counted_forwards(monkeypatch):
    calls = []
    original = models.of_labels
    monkeypatch.setattr(models, "of_labels", lambda *inputs: calls.append(1) or original(*inputs))
    return calls


@pytest.mark.parametrize("name", FORWARDS)
def test_a_step_runs_the_stated_number_of_forwards(name, monkeypatch):
    calls = counted_forwards(monkeypatch)
    step, clock = method(name), Clock(CPU)
    for _ in range(2):
        step(clock)
    assert len(calls) == 2 * FORWARDS[name]
    assert clock.passes > 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.everything) if name == "torchao-compiled" else name
        for name in METHODS
        if name.startswith("torchao")
    ],
)
def test_a_step_runs_with_the_layers_of_torchao(name, monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    calls, compiled = counted_forwards(monkeypatch), []
    compiling = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m, **how: compiled.append(m) or compiling(m, **how))
    step = method(name)
    for _ in range(2):
        step(Clock(CPU))
    assert len(calls) == 8
    assert len(compiled) == (name == "torchao-compiled")


@pytest.mark.parametrize("model", models.SHAPES)
def test_the_program_writes_rows_and_a_plot(model, tmp_path, capsys):
    names = ["mezo", "eager", "guided", "fogzo"]
    hidden = ["--hidden", "64"] if model == "llama" else []
    chosen = ["--model", model, *hidden, "--context", "8", "--methods", *names]
    program.main(
        [*SMALL, *chosen, "--json", str(tmp_path / "a/step.json"), "--plot", str(tmp_path / "b/step.png")]
    )
    found = json.loads((tmp_path / "a/step.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["float", *names]
    for row in found["rows"]:
        assert len(row["seconds"]) == 4
        assert 0 < row["rest_of_float"] < row["of_float"]
        assert row["peak_bytes"] > 0
        assert (row["bytes"] is None) == (row["method"] not in ("guided", "fogzo"))
    assert found["rows"][0]["of_float"] == 1
    assert found["arguments"]["model"] == [model]
    assert (tmp_path / "b/step.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "| fogzo |" in said
    assert "fogzo: " in said
    assert "fogzo of eager: " in said


def test_host_times_have_a_row_for_each_method_and_a_plot(tmp_path, capsys):
    files = ["--json", str(tmp_path / "host.json"), "--plot", str(tmp_path / "host.png")]
    assert host.main(["--device", "cpu", "--layers", "2", "4", "--rounds", "1", *files]) == 0
    times = json.loads((tmp_path / "host.json").read_text())["seconds"]
    assert {
        "plain",
        "forward",
        "ste, learned alpha",
        "guided, fixed alpha",
        "fogzo, fixed alpha",
        "evaluation",
    } <= set(times)
    assert all(seconds > 0 for points in times.values() for seconds in points.values())
    assert (tmp_path / "host.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in said.splitlines()[2:]] == [f"| {name}" for name in times]
    assert host.slope({10: 2e-5, 20: 5e-5}) == pytest.approx(3.0)


def test_each_setting_of_an_axis_has_a_row_of_its_own(tmp_path, capsys):
    path = tmp_path / "step.json"
    axes = ["--hidden", "16", "32", "--micro-batches", "1", "2", "--methods", "fogzo", "--no-traffic"]
    program.main([*SMALL, "--model", "mlp", *axes, "--json", str(path), "--plot", str(tmp_path / "step.png")])
    rows = json.loads(path.read_text())["rows"]
    assert [(r["hidden"], r["micro_batches"]) for r in rows[::2]] == [(16, 1), (16, 2), (32, 1), (32, 2)]
    assert [r["method"] for r in rows[:2]] == ["float", "fogzo"]
    assert rows[0]["peak_bytes"] is None
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert "hidden 32, micro-batches 2" in capsys.readouterr().out


def test_ratios_are_those_of_the_same_turns():
    base, row = Row("float", [1, 2, 1, 2, 10, 20, 10, 20]), Row("x", [2, 2, 2, 3, 20, 20, 20, 30])
    row.rest = [0.6] * 4 + [3] * 4
    assert row.against(base) == 1.5
    assert row.against(base, rest=True) == pytest.approx((0.4 + 0.2) / 2)
    assert quartiles([1.0, 2.0, 4.0]) == (1.5, 3.0)
    assert quartiles([2.0]) == (2.0, 2.0)


def test_some_methods_have_no_compiled_model_or_quantized_inputs(capsys):
    assert program.parse(["--compiled"]).methods == ["float", "modules", "ste", "guided", "fogzo"]
    with pytest.raises(SystemExit):
        program.parse(["--activation-bits", "8", "--methods", "mezo"])
    assert (
        "--methods with --compiled or --activation-bits must be of float, modules, ste, guided, fogzo, got mezo"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("options", [["--compiled"], ["--activation-bits", "8", "--compute", "int8"]])
def test_a_step_runs_with_every_option_of_the_model(options):
    step = method("fogzo", *options)
    for _ in range(2):
        step(Clock(CPU))


@pytest.mark.parametrize("lost", [False, True])
def test_a_method_that_fails_is_left_out(lost, monkeypatch, tmp_path, capsys):
    """Its reason is kept, times of the others are written before the end, and a lost device ends the run."""
    path, original, written = tmp_path / "step.json", measure.method_of, []

    def broken(name, *rest):
        step, steps = original(name, *rest), []

        def breaking(clock):
            steps.append(1)
            if len(steps) == (6 if name == "guided" else 11):  # the second turn, and the seventh
                written.extend(json.loads(path.read_text())["rows"] if path.exists() else [])
                raise RuntimeError("an illegal memory access\nand more")
            step(clock)

        return breaking if name in ("guided", "fogzo") else step

    monkeypatch.setattr(measure, "method_of", broken)
    monkeypatch.setattr(measure, "alive", lambda _: not lost)
    chosen = [
        *SMALL,
        "--model",
        "mlp",
        "--methods",
        "guided",
        "fogzo",
        "eager",
        "--turns",
        "8",
        "--no-traffic",
    ]
    status = program.main([*chosen, "--json", str(path)])
    reason = "RuntimeError: an illegal memory access"
    found = json.loads(path.read_text())
    assert [one["method"] for one in found["failed"]] == (["guided"] if lost else ["guided", "fogzo"])
    assert {one["reason"] for one in found["failed"]} == {reason}
    if lost:
        assert status == LOST
        monkeypatch.setattr(measure, "method_of", original)
        assert program.main([*chosen, "--json", str(path), "--resume"]) == 1
        found = json.loads(path.read_text())
        assert [row["method"] for row in found["rows"]] == ["float", "fogzo", "eager"]
        return
    assert status == 1
    assert f"failed: guided: {reason}" in capsys.readouterr().out
    assert [row["method"] for row in found["rows"]] == ["float", "eager"]
    assert {len(row["seconds"]) for row in found["rows"]} == {8}
    assert [(row["method"], len(row["seconds"])) for row in written] == [
        ("float", 4), ("fogzo", 4), ("eager", 4),
    ]  # fmt: skip


# ---- what a step moves


def test_each_call_counts_the_bytes_of_its_lists():
    """Each list once, and once more where it is updated; nothing is counted when it has ended."""
    x, g, out = (torch.randn(6, 5) for _ in range(3))
    alpha, norm = torch.full((6, 1), 0.1), torch.ones(())
    how = {"grid": fk.Grid.uniform(2), "straight_through": fk.StraightThrough("identity")}
    noise = {"tensor_ids": [0], "one_minus_beta": 0.1, "seed": 1, "step": 0}
    clock = Clock(CPU)
    with recorded(clock) as found:
        fk.perturb_quantize_(out, None, x, g, alpha, norm, direction=0, **how, **noise)
        assert (found.calls, found.bytes) == (1, 4 * (3 * 30 + 6))
        losses = torch.ones(1), torch.zeros(1)
        fk.estimate_gradient_(g, *losses, alpha, norm, **how, **noise)
        assert (found.calls, found.bytes) == (2, 4 * (3 * 30 + 6) + 4 * (2 * 30 + 6))
        clock.timed(lambda: fk.quantize_(out.char(), x, alpha, grid=how["grid"]))
        assert found.bytes_in_passes == 5 * 30 + 4 * 6
        state = [torch.zeros(6, 5) for _ in range(2)]
        before = found.bytes
        fk.estimate_adamw_(
            x,
            g,
            *state,
            *losses,
            alpha,
            norm,
            lr=0.1,
            weight_decay=0.0,
            betas=(0.9, 0.99),
            eps=1e-8,
            optimizer_step=1,
            **how,
            **noise,
        )
        assert found.bytes - before == 4 * (7 * 30 + 6)
    assert set(found.seconds) == {
        "perturb_quantize_",
        "estimate_gradient_",
        "quantize_ in passes",
        "estimate_update_",
    }
    fk.quantize_(out, x, alpha, grid=how["grid"])
    assert found.calls == 3


def test_peak_is_what_is_held_at_once():
    def make():
        kept = torch.zeros(10_000)

        def step(clock):
            for _ in range(3):
                more = torch.zeros(5_000)
                del more
            kept.add_(1)

        return step

    assert peak_of(make, CPU) == 4 * 15_000


def test_garbage_of_an_earlier_method_does_not_count():
    def make_cycle():
        cycle = [torch.zeros(10_000)]
        cycle.append(cycle)
        return lambda clock: None

    def make():
        gc.collect()
        kept = torch.zeros(5_000)
        return lambda clock: kept.zero_()

    assert peak_of(make_cycle, CPU) == 4 * 10_000
    assert peak_of(make, CPU) == 4 * 5_000


def test_a_step_of_fogzo_needs_at_most_one_quantized_copy_more():
    """It is one more than the modules alone hold, with probes and without."""
    options = ("--hidden", "256", "--layers", "3", "--rows", "4")
    names = "modules", "ste", "guided", "fogzo", "eager"
    peaks = {name: peak_of(functools.partial(method, name, *options), CPU) for name in names}
    weights = 3 * 256 * 256
    slack = 64 * 1024  # losses, counters, tables
    for name in ("ste", "guided", "fogzo"):
        assert peaks[name] <= peaks["modules"] + 4 * weights + slack, name
    assert peaks["eager"] > peaks["fogzo"] + 4 * weights


def test_loops_do_what_they_say(monkeypatch):
    """FOGZO's is along the direction that it keeps; MeZO's weights move along the noise alone."""
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    batches = [(x, y)]

    def loss(model, x, y):
        return (model(x) - y).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    peer = Materialized(model, ["2"], lr=0.1)
    assert peer.names == ["0.weight"]
    kept = []
    drawn = lambda grads, kappa: kept.extend([torch.randn_like(g) for g in grads]) or kept  # noqa: E731
    monkeypatch.setattr(materialized, "directions", drawn)
    peer.step(loss, batches, lambda call: call())
    (v,) = kept
    ratio = model[0].weight.grad / v
    assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4)
    assert ratio.abs().max() > 0
    before = model[0].weight.detach().clone()
    mezo = Mezo(model, ["2"], lr=0.1)
    mezo.step(loss, batches, lambda call: call())
    torch.manual_seed(1)
    noise = torch.randn_like(before)
    moved = (model[0].weight - before) / noise
    assert torch.allclose(moved, moved.flatten()[0].expand_as(moved), atol=1e-4)


def outputs_and_gradients(model, x):
    y = model(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters())]


def test_lsq_by_hand_has_this_package_s_outputs_and_gradients():
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(64, 48)), torch.randn(8, 64)
    hand, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    prepare_lsq(hand, [])
    fk.quantize_model(ours, LSQ)
    (y, *grads), (our_y, *our_grads) = (outputs_and_gradients(model, x) for model in (hand, ours))
    assert torch.equal(y, our_y)
    assert len(grads) == 3
    for grad, our_grad in zip(grads, our_grads, strict=True):
        torch.testing.assert_close(grad.flatten(), our_grad.flatten())
        assert grad.count_nonzero() > 0


def test_int4_is_torchao_s_but_for_the_ends_of_groups():
    """The largest value of a group lies between two codes."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 48, bias=False))
    theirs, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    prepare_torchao(theirs, [])
    fk.quantize_model(ours, INT4)
    a, b = (model(torch.eye(64)).T for model in (theirs, ours))
    size = plain[0].weight.detach().abs().view(48, 2, 32)
    inner = (size < size.amax(-1, keepdim=True)).view(48, 64)
    assert torch.equal(theirs[0].weight, plain[0].weight)
    assert inner.sum() == 48 * 62
    torch.testing.assert_close(a[inner], b[inner], rtol=1e-5, atol=0)
    assert not torch.equal(a[inner], plain[0].weight[inner])


@pytest.mark.parametrize("skip", [["0"], []])
def test_layers_of_others_are_linear_and_not_skipped(skip):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    prepare_lsq(model, skip)
    assert [type(m) is nn.Linear for m in model] == [bool(skip), False]
    with pytest.raises(ValueError, match="model must have linear layers and no convolutions"):
        prepare_lsq(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), [])
