"""The kernel benchmark: what it counts, compares and reports; no timing."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fogzo_kernels as fk
from bench import baselines, cases, findings, kernels, timing

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--backend", "reference", "--quick", "--sizes", "2^9", "--tensors", "1"]


def case(op, dtypes="fp32", distribution="uniform", tensors=1, elements=2**12):
    return cases.Case(op, dtypes, distribution if cases.OPS[op].noise else "none", tensors, elements)


# ---- what is measured


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("norm", [2, 2, 4, 2, 2, 4]),
        ("perturb", [6, 8, 12, 5, 6, 9]),
        ("perturb_both", [8, 10, 16, 6, 8, 10]),
        ("estimate", [4, 4, 8, 4, 4, 8]),
        ("estimate_n4", [4, 4, 8, 4, 4, 8]),
        ("adamw", [24, 28, 32, 23, 24, 29]),
        ("sgd", [16, 20, 24, 15, 16, 21]),
        ("quantize", [4, 6, 8, 3, 4, 5]),
        ("measure", [2, 4, 4, 2, 2, 4]),
        ("learned", [6, 8, 12, 6, 6, 12]),
    ],
)
def test_bytes_per_element_follow_from_the_dtypes(op, expected):
    names = "bf16", "mixed", "fp32", "int8", "fp16", "int8-fp32"
    assert [*cases.DTYPES] == [*names]
    assert [case(op, dtypes).bytes_per_element for dtypes in names] == expected


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_bytes_are_those_of_the_operands(op, dtypes):
    """Of what the op writes, and of what it reads, counted on the operands it is given."""
    one = case(op, dtypes)
    o = cases.operands(one, CPU)
    size = {
        name: sum(t.nbytes for t in getattr(o, name))
        for name in ("latents", "grads", "plus", "minus", "first", "second")
    }
    reads = size["latents"] + size["grads"] + size["first"] + size["second"]
    writes = size["plus"] + size["minus"] + size["first"] + size["second"]
    writes += size["grads"] if op.startswith(("estimate", "learned")) else 0
    writes += size["latents"] if op in ("adamw", "sgd") else 0
    assert one.bytes == reads + writes


@pytest.mark.parametrize("total", [2**15, 2**20, 2**24 + 8, 10**6 + 1])
def test_mixed_sizes_add_up_to_the_total(total):
    sizes = cases.mixed_sizes(total)
    assert sum(sizes) == total
    assert len(sizes) == 300
    assert min(sizes) > 0
    assert sum(n % 8 != 0 for n in sizes) in (12, 13)
    assert sizes == cases.mixed_sizes(total)
    if total >= 2**20:
        assert max(sizes) > 20 * sorted(sizes)[150]


def test_streams_move_the_bytes_that_they_are_asked_for(monkeypatch):
    streams, asked = timing.Streams(CPU, timing.QUICK), {}
    call = streams.call

    def recorded(kind, numel):
        asked[kind] = numel
        return call(kind, numel)

    monkeypatch.setattr(streams, "call", recorded)
    streams.timed(12_000)
    for kind, arrays in timing.STREAMS.items():
        assert asked[kind] * 4 * arrays == 12_000
        assert call(kind, 7)().numel() == 7


def test_shares_are_of_turns():
    """Each sample stands between those that it is compared with: a machine that slows down slows all."""
    turns = []
    own = [lambda: turns.append("own")], timing.Rounds(sets=1, calls=1, cache="cold")
    found = timing.Streams(CPU, timing.Effort(seconds=0, least=5, most=5, sets=1)).beside(own, 120)
    assert turns == ["own"] * 6  # one of them before the first turn
    assert [len(one.seconds) for one in found] == [5, 5, 5]
    slower = [
        timing.Measurement(2.0, 1.0, 3.0, seconds, "host", "cold") for seconds in ([1, 2, 90], [2, 4, 180])
    ]
    assert slower[1].of(slower[0]) == 2


def test_a_row_has_the_shares_of_its_turns(monkeypatch):
    own, copy, triad = (
        timing.Measurement(9.0, 9.0, 9.0, seconds, "host", "cold")
        for seconds in ([2, 4, 8], [1, 2, 4], [3, 6, 12])
    )
    monkeypatch.setattr(kernels, "measure_unit", lambda *_: ([own, copy, triad], None, None))
    args = kernels.parse(SMALL)
    unit = kernels.units_of(args)[0][0]
    row = kernels.row_of(unit, args, timing.QUICK, timing.Streams(CPU, timing.QUICK))
    assert (row["share_of_copy"], row["share_of_triad"]) == (0.5, 1.5)


def test_equal_lists_need_a_multiple_of_the_tensors():
    case = cases.Case("perturb", "fp32", "uniform", 10, 1000, equal=True)
    o = cases.operands(case, torch.device("cpu"))
    assert {t.numel() for t in o.latents + o.grads + o.plus} == {100}
    with pytest.raises(ValueError, match="elements must be a multiple of 7 tensors, got 1000"):
        cases.sizes_of(cases.Case("perturb", "fp32", "uniform", 7, 1000, equal=True))


def test_group_scales_and_blocks_must_divide_the_list(tmp_path, capsys):
    groups = cases.operands(cases.Case("norm", "fp32", "none", 1, 96, scale_length=32), torch.device("cpu"))
    assert [alpha.shape for alpha in groups.alphas] == [(3,)]
    with pytest.raises(ValueError, match=r"elements must be multiples of the scale length 32, got \[100\]"):
        cases.operands(cases.Case("norm", "fp32", "none", 1, 100, scale_length=32), torch.device("cpu"))
    chosen = ["--ops", "norm", "--dtypes", "fp32", "--scale-length", "32", "--equal", "--budget", "inf"]
    assert kernels.main([*SMALL, *chosen, "--json", str(tmp_path / "k.json")]) == 0
    (row,) = json.loads((tmp_path / "k.json").read_text())["rows"]
    assert (row["scale_length"], row["equal"]) == (32, True)
    assert "measured 1 rows; left out 0 timings; 0 failed" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"elements must be multiples of the block 64, got \[96\]"):
        cases.operands(cases.Case("quantize", "fp32", "none", 1, 96, block=64), torch.device("cpu"))


def test_rows_have_the_share_of_one_scale_and_of_no_transform(tmp_path, capsys):
    """Speed over that of one scale, and over that without a transform, of the same run."""
    scales = ["--scale-length", "0", "64", "--block", "0", "32"]
    chosen = ["--ops", "quantize", "measure", "--dtypes", "fp32", *scales]
    many = [*SMALL, *chosen, "--baselines", "eager", "--tensors", "1", "--budget", "inf"]
    assert kernels.main([*many, "--json", str(tmp_path / "k.json")]) == 0
    rows = json.loads((tmp_path / "k.json").read_text())["rows"]
    time = {(row["op"], row["scale_length"], row["block"]): row["median_s"] for row in rows}
    assert sorted(time) == [("measure", s, 0) for s in (0, 64)] + [
        ("quantize", s, b) for s in (0, 64) for b in (0, 32)
    ]
    for row in rows:
        op, scale, block = row["op"], row["scale_length"], row["block"]
        one, none = time[op, 0, block] / time[op, scale, block], time[op, scale, 0] / time[op, scale, block]
        assert row.get("share_of_one_scale") == (pytest.approx(one) if scale else None)
        assert row.get("share_of_no_transform") == (pytest.approx(none) if block else None)
        assert ("ratio_eager" in row) == (not scale and not block)
    assert "one, none: speed over that" in capsys.readouterr().out


def test_mixed_sizes_names_too_few_elements():
    with pytest.raises(ValueError, match="300 tensors must have at least 19200 elements, got 1024"):
        cases.mixed_sizes(1024)


def test_lists_are_aligned_and_apart():
    sizes = [5, 8, 1000, 3]
    _, tensors = cases.flat_list(sizes, torch.bfloat16, CPU)
    assert [t.numel() for t in tensors] == sizes
    starts = [t.data_ptr() for t in tensors]
    assert all((p - starts[0]) % cases.ALIGNMENT == 0 for p in starts)
    assert all(p + t.nbytes <= q for (p, q), t in zip(pairwise(starts), tensors[:-1], strict=True))


def test_cases_leave_out_what_is_the_same():
    found = list(cases.cases(cases.OPS, cases.DTYPES, cases.DISTRIBUTIONS, [1], [64]))
    count = {op: sum(one.op == op for one in found) for op in cases.OPS}
    assert count["norm"] == 3  # dtypes of gradients
    assert count["estimate"] == 3 * 5
    assert count["perturb"] == 6 * 5
    assert count["quantize"] == 6
    assert count["measure"] == 3  # dtypes of latents


@pytest.mark.parametrize("bytes_moved", [100, 10**5, 10**7, 10**9])
def test_sets_exceed_the_cache_or_say_so(bytes_moved):
    plan = timing.rounds(bytes_moved, CPU)
    assert plan.calls >= 1
    assert (plan.sets * bytes_moved >= 2 * timing.cache_bytes(CPU)) == (plan.cache == "cold")
    assert plan.sets == timing.MAX_SETS or plan.cache == "cold"


def test_samples_go_round_over_all_sets():
    turns = []
    calls = [lambda i=i: turns.append(i) for i in range(3)]
    effort = timing.Effort(seconds=0, least=4, most=4)
    found = timing.measure(calls, timing.Rounds(sets=3, calls=2, cache="cold"), CPU, effort)
    assert turns == [0, 1, 2, *(i % 3 for i in range(8))]
    assert len(found.seconds) == 4
    assert found.q25 <= found.median <= found.q75


# ---- the baselines compute the same


def noises(one, sizes):
    """The contract's noise in the order in which the baselines draw it."""
    for i, size in enumerate(sizes):
        for direction in range(one.spec.directions):
            yield fk.noise(
                size, one.distribution, seed=cases.SEED, step=cases.STEP, direction=direction, tensor_id=i
            )


def same_noise(monkeypatch, one, sizes, rounds=1):
    found = [u for _ in range(rounds) for u in noises(one, sizes)]
    turn = iter(found)
    monkeypatch.setattr(baselines, "draw", lambda like, _: next(turn).to(like.dtype))
    monkeypatch.setattr(baselines, "draw_", lambda buffer, _: buffer.copy_(next(turn)))


@pytest.mark.parametrize("kind", baselines.KINDS)
@pytest.mark.parametrize("op", cases.OPS)
def test_baselines_equal_the_op(monkeypatch, kind, op):
    """In float32, given the same noise; values of codes but for the few that lie at a tie."""
    one, sizes, loop = case(op, tensors=3), [3000, 1001, 95], kind == "loop"
    expected, o = (cases.operands(one, CPU, sizes=sizes) for _ in range(2))
    ours = cases.call(one, expected, "reference")()
    same_noise(monkeypatch, one, sizes, rounds=2 if loop and op == "perturb_both" else 1)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with torch.no_grad():
        result = baselines.baseline(kind, one, [o])[0]()
    if op == "norm":
        torch.testing.assert_close(result, ours)
        return
    if op == "measure":
        for found, right in zip(o.alphas if loop else result, expected.alphas, strict=True):
            torch.testing.assert_close(found.view(1), right)
        return
    if op.startswith("estimate"):
        for found, right in zip(o.grads if loop else result, expected.grads, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * right.abs().max().item())
        return
    if op == "learned":
        sums = [alpha_grad.view(()) for alpha_grad in ours]
        torch.testing.assert_close(result[-3:], sums, rtol=1e-4, atol=1e-6)
        assert all(map(torch.equal, o.grads if loop else result, expected.grads))
        return
    names = ["latents"] if kind == "eager" else ["latents", "first", "second"]  # PyTorch keeps its own state
    for name in names:
        torch.testing.assert_close(getattr(o, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
    values = [*o.plus, *o.minus] if loop else [*result[::2], *result[1::2]] if len(result) == 6 else result
    right = [*expected.plus, *expected.minus]
    different = sum((a - b).abs().gt(1e-6).sum().item() for a, b in zip(values, right, strict=True))
    assert different <= 2
    assert len({x for t in right for x in t.tolist()}) == cases.GRID.levels


@pytest.mark.parametrize("distribution", cases.DISTRIBUTIONS)
@pytest.mark.parametrize("place", ["out", "in"])
def test_baselines_draw_what_they_should(distribution, place, generator):
    torch.manual_seed(generator.initial_seed())
    count = 200_000
    like = torch.empty(count)
    u = (baselines.draw if place == "out" else baselines.draw_)(like, distribution).double()
    ours = fk.noise(count, distribution, seed=1, backend="reference").double()
    assert abs(u.mean()) < 6 / math.sqrt(count)  # 6 standard deviations
    fourth = (ours**4).mean().item()
    assert abs((u**2).mean() - 1) < 6 * math.sqrt((fourth - 1) / count) + 1e-3
    assert (u**4).mean().item() == pytest.approx(fourth, rel=0.15)  # the shape


def test_there_is_a_baseline_for_every_distribution():
    assert [*baselines.DRAWS] == [*cases.DISTRIBUTIONS]


@pytest.mark.parametrize("dtypes", ["bf16", "mixed", "int8"])
@pytest.mark.parametrize("kind", ["eager", "loop"])
def test_baselines_keep_dtypes(dtypes, kind):
    for op in cases.OPS:
        one = case(op, dtypes, "logistic", elements=256)
        o = cases.operands(one, CPU)
        with torch.no_grad():
            result = baselines.baseline(kind, one, [o])[0]()
        if kind == "eager" and cases.OPS[op].out:
            assert {t.dtype for t in result} == {cases.DTYPES[dtypes][2]}


# ---- the program


def test_run_writes_sane_rows(tmp_path, capsys):
    path, picture = tmp_path / "k.json", tmp_path / "k.png"
    chosen = ["--dtypes", "bf16", "int8", "--distributions", "uniform", "gaussian"]
    code = kernels.main([*SMALL, *chosen, "--budget", "inf", "--json", str(path), "--plot", str(picture)])
    found = json.loads(path.read_text())
    assert code == 0, found["failed"]
    assert found["failed"] == []
    assert found["left_out"] == []
    assert picture.stat().st_size > 10_000
    assert {"device", "torch", "triton", "python"} <= set(found["machine"])
    # norm, then 2 distributions for both, for gradients, for both, then quantize, measure and learned
    assert len(found["rows"]) == 1 + 2 * (2 * 2) + 2 * 2 + 2 * (2 * 2) + 2 + 1 + 1
    for row in found["rows"]:
        assert row["elements"] == 512
        assert row["backend"] == "reference"
        assert 0 < row["q25"] <= row["median_s"] <= row["q75"]
        assert row["share_of_copy"] > 0
        assert row["share_of_triad"] > 0
        assert row["elements_per_s"] == pytest.approx(512 / row["median_s"])
        assert row["gb_per_s"] == pytest.approx(512 * row["bytes_per_element"] / row["median_s"] / 1e9)
        assert row["ratio_eager"] == pytest.approx(row["eager_s"] / row["median_s"])
        assert row["ratio_loop"] > 0
        assert "compile_s" not in row
    out = capsys.readouterr().out
    assert f"measured {len(found['rows'])} rows; left out 0 timings; 0 failed" in out


def test_no_budget_says_what_is_left_out(tmp_path, capsys):
    path = tmp_path / "k.json"
    arguments = [*SMALL, "--ops", "norm", "sgd", "--dtypes", "fp32", "--budget", "0", "--json", str(path)]
    assert kernels.main(arguments) == 0
    found = json.loads(path.read_text())
    assert found["rows"] == []
    assert len(found["left_out"]) == 3 * (1 + 5)
    assert {row["reason"] for row in found["left_out"]} == {"no time left"}
    out = capsys.readouterr().out
    for kind in ("fogzo", "eager", "loop"):
        assert f"left out, no time left: {kind}: norm 1, sgd 5" in out


def test_what_cannot_be_measured_is_left_out_with_a_reason():
    chosen = ["--device", "cpu", "--sizes", "2^16", "2^10", "--ops", "norm", "--dtypes", "bf16"]
    units, left_out = kernels.units_of(kernels.parse(chosen))
    assert [unit.kind for unit in units[:4]] == ["fogzo", "eager", "loop", "fogzo"]
    assert units[0].case.elements == 2**16
    assert [unit.kind for unit in units].count("compile") == 1
    reasons = [row["reason"] for row in left_out]
    assert "too few elements for 300 tensors" in reasons
    assert "torch.compile: one tensor of the first size only" in reasons


def test_the_most_important_come_first():
    units, _ = kernels.units_of(kernels.parse(["--device", "cpu"]))
    first = units[: len(cases.OPS)]
    assert {unit.case.op for unit in first} == set(cases.OPS)
    for unit in first:
        assert unit.kind == "fogzo"
        assert (unit.case.tensors, unit.case.elements) == (1, 2**22)
        assert unit.case.names() == cases.Case(unit.case.op, "bf16", "", 1, 1).names()


def test_an_op_that_fails_is_reported_and_changes_the_exit_status(monkeypatch, tmp_path, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(fk, "quantize_", broken)
    arguments = [*SMALL, "--ops", "quantize", "norm", "--dtypes", "fp32", "--no-baselines"]
    assert kernels.main([*arguments, "--json", str(tmp_path / "k.json")]) == 1
    found = json.loads((tmp_path / "k.json").read_text())
    assert [row["op"] for row in found["rows"]] == ["norm"]
    assert found["failed"][0]["reason"] == "RuntimeError: no such kernel"
    said = "failed: fogzo quantize fp32 none 1 tensors 2^9: RuntimeError: no such kernel"
    assert said in capsys.readouterr().out


def test_a_run_goes_on_with_the_rows_of_another(monkeypatch, tmp_path):
    """What is there is not measured again; rows of other backends stay; what ended a process has failed."""
    path = tmp_path / "k.json"
    chosen = [*SMALL, "--ops", "norm", "measure", "quantize", "--dtypes", "fp32", "--budget", "inf"]
    chosen += ["--json", str(path), "--resume"]
    assert kernels.main([*chosen, "--no-baselines", "--ops", "norm"]) == 0
    first = json.loads(path.read_text())
    first["begun"] = findings.named(
        findings.Unit(case("measure", elements=2**9), "fogzo"), "reference", "begun"
    )
    first["rows"].append({**first["rows"][0], "backend": "another"})
    first["left_out"] = [
        findings.named(findings.Unit(case("quantize", elements=2**9), "fogzo"), "reference", "x")
    ]
    path.write_text(json.dumps(first))
    measured, original = [], kernels.measure_unit
    monkeypatch.setattr(kernels, "measure_unit", lambda u, *rest: measured.append(u) or original(u, *rest))
    assert kernels.main([*chosen, "--baselines", "eager"]) == 1
    assert [(unit.case.op, unit.kind) for unit in measured] == [
        ("quantize", "fogzo"), ("norm", "eager"), ("quantize", "eager"),
    ]  # fmt: skip
    found = json.loads(path.read_text())
    rows = {(row["backend"], row["op"]): row for row in found["rows"]}
    assert [*rows] == [("reference", "norm"), ("another", "norm"), ("reference", "quantize")]
    assert rows["another", "norm"] == first["rows"][1]
    assert rows["reference", "norm"]["median_s"] == first["rows"][0]["median_s"]
    assert "ratio_eager" in rows["reference", "norm"]
    (failed,) = found["failed"]
    assert (failed["op"], failed["reason"]) == ("measure", "the process ended while it was measured")
    assert [row["op"] for row in found["left_out"]] == ["measure"]  # its baseline
    assert found["begun"] is None
    assert [*tmp_path.iterdir()] == [path]


def test_rows_are_written_as_they_come_and_a_lost_device_ends_the_run(monkeypatch, tmp_path, capsys):
    path, counts = tmp_path / "k.json", []

    def broken(*_, **__):
        held = json.loads(path.read_text())
        counts.append((len(held["rows"]), held["begun"]["op"]))
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(fk, "quantize_", broken)
    monkeypatch.setattr(kernels, "alive", lambda _: False)
    chosen = [*SMALL, "--ops", "norm", "quantize", "measure", "--dtypes", "fp32", "--no-baselines"]
    assert kernels.main([*chosen, "--json", str(path)]) == 3
    assert counts == [(1, "quantize")]
    assert [row["op"] for row in json.loads(path.read_text())["failed"]] == ["quantize"]
    assert "the device was lost: RuntimeError: an illegal memory access" in capsys.readouterr().out
    assert kernels.main([*chosen, "--json", str(path), "--resume"]) == 1
    assert [row["op"] for row in json.loads(path.read_text())["rows"]] == ["norm", "measure"]


@pytest.mark.parametrize("op", ["estimate", "estimate_n4", "adamw", "sgd"])
def test_losses_come_with_counters(op):
    """As in training, where they cost time."""
    one = case(op, elements=64)
    o = cases.operands(one, CPU)
    o.losses_plus.fill_(float("nan"))
    cases.call(one, o, "reference")()
    assert o.counters.tolist() == [one.spec.directions, 0, 0]


def test_groups_that_do_not_cut_a_list_are_left_out():
    arguments = ["--device", "cpu", "--sizes", "2^20", "--tensors", "1", "300", "--scale-length", "0", "128"]
    units, left_out = kernels.units_of(kernels.parse([*arguments, "--ops", "adamw", "--dtypes", "bf16"]))
    assert {(u.case.tensors, u.case.scale_length) for u in units} == {(1, 0), (1, 128), (300, 0)}
    reason = "the tensors' sizes are no multiples of scale length and block"
    assert {row["tensors"] for row in left_out if row["reason"] == reason} == {300}


def test_times_of_backends_for_a_gpu_on_the_cpu_are_refused():
    for backend in ("triton", "cuda"):
        with pytest.raises(
            SystemExit, match=f"backend {backend} must have a CUDA device: its times on the CPU"
        ):
            kernels.main(["--device", "cpu", "--backend", backend])
    with pytest.raises(SystemExit, match=r"backend must be one of .*, got 'fast'"):
        kernels.main(["--device", "cpu", "--backend", "fast"])


def test_sizes_are_read_and_written_as_powers_of_two():
    assert [kernels.size_of(text) for text in ("2^10", "1000")] == [1024, 1000]
    assert [kernels.power(n) for n in (1024, 1000)] == ["2^10", "1000"]
