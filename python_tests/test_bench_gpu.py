"""`make gpu`, of which all that needs no GPU runs here, and what it runs the sanitizers on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cases, gpu, sanitize

ROOT = Path(__file__).parents[1]


def test_sanitize_covers_every_op_dtype_and_distribution(capsys):
    found = list(sanitize.combinations())
    for op, spec in cases.OPS.items():
        mine = [one for one in found if one.op == op]
        assert {one.distribution for one in mine} == (set(cases.DISTRIBUTIONS) if spec.noise else {"none"})
        names = [tuple(one.names().values()) for one in mine]
        dtypes = [cases.Case(op, name, "", 1, 1).names() for name in cases.DTYPES]
        assert set(names) == {tuple(one.values()) for one in dtypes}
    sanitize.main(["--device", "cpu", "--backend", "reference"])
    out = capsys.readouterr().out
    assert "calls finished" in out
    assert {line.split()[0] for line in out.splitlines()} >= set(cases.OPS)


def test_dry_run_reports_every_stage(tmp_path, capsys, monkeypatch):
    """But for the build, which would replace the module that this process has loaded."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tests run over processes
    stages = ["info", "tests", "sanitize", "kernels", "step", "profile"]
    code = gpu.main(["--dry-run", "--results", str(tmp_path), "--stages", *stages])
    text = (tmp_path / "summary.md").read_text()
    assert code == 0, text
    states = dict(line.strip("| ").split(" | ")[:2] for line in text.splitlines() if line.startswith("| "))
    skipped = ["tests", *(f"{tool} cpu" for tool in gpu.TOOLS), "profile triton", "profile cuda"]
    assert {name: states[name] for name in skipped} == dict.fromkeys(skipped, "skipped")
    assert {states[name] for name in ("info", "ops cpu", "kernels", "step")} == {"passed"}
    for name in ("kernels", "step"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    files = {path.name for path in tmp_path.iterdir()}
    assert files <= set(gpu.FILES)
    assert len(gpu.FILES) <= 13
    assert str(ROOT) not in text
    assert "summary.md" in capsys.readouterr().out


def test_without_a_gpu_one_sentence():
    if shutil.which("make") is None:
        pytest.skip("make is not there")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert gpu.NO_GPU in result.stderr


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    def fails(session):
        session.stage("first", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 20, "build.log")

    def hangs(session):
        code = "import subprocess as s; print('begun', flush=True); s.run(['sleep', '60'])"
        session.stage("second", [sys.executable, "-c", code], 5, "tests.log")

    monkeypatch.setattr(gpu, "STAGES", {**gpu.STAGES, "build": fails, "tests": hangs})
    assert gpu.main(["--dry-run", "--results", str(tmp_path), "--stages", "build", "tests", "profile"]) == 1
    text = (tmp_path / "summary.md").read_text()
    assert "| first | failed |" in text
    assert "why" in (tmp_path / "build.log").read_text()
    assert "stopped at its limit of 5 s" in text
    assert "begun" in (tmp_path / "tests.log").read_text()
    assert "| profile triton | skipped |" in text
    assert "| profile cuda | skipped |" in text


@pytest.mark.parametrize(
    ("status", "text", "state"),
    [
        (0, "86 calls finished\n========= ERROR SUMMARY: 0 errors", "passed"),
        (9, "86 calls finished\n========= ERROR SUMMARY: 3 errors", "failed"),
        (0, "========= ERROR SUMMARY: 0 errors", "failed"),
        (1, "========= Error: Device not supported. Please refer to ...", "skipped"),
        (124, "perturb bf16 uniform", "cut"),
    ],
)
def test_verdict_of_a_tool(status, text, state):
    assert gpu.verdict(status, text, 1.0, "finished")[0] == state


def test_no_time_left_skips(tmp_path):
    session = gpu.Session(tmp_path, deadline=0.0)
    gpu.STAGES["build"](session)
    gpu.STAGES["kernels"](session)  # of two backends
    assert [(o.state, o.note) for o in session.outcomes] == [("skipped", "no time left")] * 3


def test_a_backend_that_was_not_built_is_skipped_with_its_reason(tmp_path, monkeypatch):
    said = """["REASON:cpu:it runs on the CPU only", 'REASON:triton:None', 'REASON:cuda:it is not built; so']"""
    monkeypatch.setattr(gpu, "execute", lambda *_: (0, said))
    session = gpu.Session(tmp_path, deadline=0.0)
    assert gpu.usable(session, "kernels") == ["triton"]
    assert [(o.stage, o.state, o.note) for o in session.outcomes] == [
        ("kernels cuda", "skipped", "it is not built; so")
    ]


def test_slug():
    assert gpu.slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"
