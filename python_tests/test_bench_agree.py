"""Calls that `make gpu` compares with the reference and shows to sanitizers: what they find."""

import os
from pathlib import Path

import pytest
import torch
from support.tolerances import M_TOLERANCE

import fogzo_kernels as fk
from bench import agree, cases, comparison, sanitize
from bench.calls import M_TOLERANCE as ALLOWED
from bench.calls import calls, combinations

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_calls_have_every_op_dtype_and_distribution():
    found = list(combinations())
    for op, spec in cases.OPS.items():
        mine = [one for one in found if one.op == op]
        assert {one.distribution for one in mine} == (set(cases.DISTRIBUTIONS) if spec.noise else {"none"})
        names = [tuple(one.names().values()) for one in mine]
        dtypes = [cases.Case(op, name, "", 1, 1).names() for name in cases.DTYPES]
        assert set(names) == {tuple(one.values()) for one in dtypes}
    for subset in (False, True):
        names = [call.name for call in calls(subset)]
        assert len(set(names)) == len(names)
        words = {name.split()[0].rstrip(",") for name in names}
        assert words >= {*cases.OPS, "noise", "derivative", "Hadamard"}
    assert 20 <= len(names) <= 30


def test_the_subset_runs(capsys):
    sanitize.main(["--device", "cpu", "--backend", "cpu", "--subset"])
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(list(calls(True)))} calls finished"


def test_tolerances_are_those_of_the_tests():
    for backend in ("triton", "cuda"):
        assert {name: m for name, m in M_TOLERANCE[backend].items() if m} == ALLOWED


def test_a_backend_agrees_with_the_reference():
    place = comparison.Place(CPU, "cpu")
    assert [(call.name, text) for call in calls() for text in agree.compared(call, place)] == []


#: What each op of a broken backend writes into; what is wrong is one element.
BROKEN = {
    "perturb_quantize_": "perturb", "estimate_gradient_": "estimate", "estimate_adamw_": "adamw",
    "estimate_sgd_": "sgd", "quantize_": "quantize", "measure_alphas_": "measure", "hadamard_": "Hadamard",
    "straight_through_backward_": "derivative", "learned_backward_": "learned", "guide_norm": "norm",
    "noise": "noise",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_one_wrong_element_is_found(name, monkeypatch):
    original = getattr(fk, name)

    def broken(*args, **given):
        found = original(*args, **given)
        if given["backend"] == "cpu":
            out = found if isinstance(found, torch.Tensor) else args[args[0] is None]
            t = out if isinstance(out, torch.Tensor) else max(out, key=torch.Tensor.numel)
            t.view(-1)[-1] += 1 if t.dtype is torch.int8 else 0.01 + 0.02 * t.view(-1)[-1].abs()
        return found

    monkeypatch.setattr(fk, name, broken)
    place = comparison.Place(CPU, "cpu")
    wrong = {call.name for call in calls(True) if agree.compared(call, place)}
    assert any(one.startswith(BROKEN[name]) for one in wrong), wrong


def test_a_difference_is_measured_by_its_rule():
    a = torch.tensor([1.0, float("nan"), float("inf"), 4.0])
    b = torch.tensor([1.0, float("nan"), float("inf"), 5.0])
    assert comparison.difference([a, a], [a, a], comparison.EQUAL) is None
    text = comparison.difference([a, a], [a, b], comparison.EQUAL)
    assert text == "[1] element 3: 4, the reference 5; 1 of 8 differ"
    assert comparison.difference([a], [b], comparison.Rule(relative=0.2)) is None
    assert comparison.difference([a], [b], comparison.Rule(of_largest=0.19)) is not None
    assert comparison.difference([a], [b], comparison.Rule(absolute=[torch.ones(4)])) is None
    assert comparison.difference([a], [a[[1, 0, 2, 3]]], comparison.Rule(relative=9.0)) is not None
    assert comparison.difference([a], [b], comparison.Rule(share=1e-3)) is None  # the one at a tie
    assert comparison.difference([a, a], [b, b], comparison.Rule(share=1e-3)) is not None


def test_processes_go_on_behind_a_call_that_ends_them(tmp_path, monkeypatch, capfd):
    """A process that dies, one whose device is lost, a call that raises and one that differs."""
    (tmp_path / "faulty.py").write_text(
        "import os, runpy, sys, torch, fogzo_kernels as fk\n"
        "from bench import agree\n"
        "original = agree.compared\n"
        "def compared(check, place):\n"
        "    kind = {'perturb bf16 uniform': 'dies', 'sgd bf16 uniform': 'raises', 'norm bf16 none': 'lost',\n"
        "            'quantize bf16 none': 'differs'}.get(check.name)\n"
        "    if kind == 'dies': os._exit(139)\n"
        "    if kind == 'differs': return ['plus[0] element 1']\n"
        "    if kind: agree.alive = lambda _: kind != 'lost'; raise RuntimeError(kind)\n"
        "    return original(check, place)\n"
        "agree.compared = compared\n"
        "sys.exit(agree.main(sys.argv[2:]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    chosen = ["--backend", "cpu", "--device", "cpu", "--subset", "--through", "faulty"]
    assert agree.main(chosen) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines == [
        "failed: norm bf16 none: RuntimeError: lost",
        "failed: perturb bf16 uniform: its process ended with status 139",
        "failed: sgd bf16 uniform: RuntimeError: raises",
        "differs: quantize bf16 none",
        "  plus[0] element 1",
        f"{len(list(calls(True))) - 4} calls agree with the reference, 1 differ, 3 failed",
    ]
