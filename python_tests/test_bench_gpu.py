"""`make gpu`: a dry run of all of it, and what becomes of stages that fail, hang or lose the device."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MISSING

from bench import machine
from bench.calls import calls
from bench.gpu import __main__ as program
from bench.gpu import session as sessions
from bench.gpu import stages, summary, tools

ROOT = Path(__file__).parents[1]


def python(*words):
    return [sys.executable, "-c", *words]


# ---- the whole


@pytest.mark.slow_first
@pytest.mark.parametrize("every", [stages.DRY_EVERY, pytest.param(1, marks=pytest.mark.everything)])
def test_dry_run_goes_through_every_stage(every, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages, "DRY_EVERY", every)
    code = program.main(["--dry-run", "--results", str(tmp_path), "--budget", "1500"])
    text = (tmp_path / "summary.md").read_text()
    assert code == 0, text
    states = dict(line.strip("| ").split(" | ")[:2] for line in text.splitlines() if line.startswith("| "))
    here = [backend for backend in stages.BACKENDS if backend not in MISSING]
    passed = ["machine", "build", "info", "step", "host", "tests", f"baselines {here[0]}"]
    passed += [f"{name} {backend}" for name in ("ops", "large", "lists") for backend in here]
    skipped = [f"{name} {backend}" for name in ("large", "lists", "memcheck") for backend in MISSING]
    skipped += [f"{name} {backend}" for name in ("memcheck",) for backend in here]
    skipped += [f"profile {backend} perturb" for backend in here]
    assert {name: states.get(name) for name in passed} == dict.fromkeys(passed, "passed")
    assert {name: states.get(name) for name in skipped} == dict.fromkeys(skipped, "skipped")
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["backend"] for row in found["rows"]} == set(here)
    assert {row["tensors"] for row in found["rows"]} == {1, 8}
    assert {row["scale_length"] for row in found["rows"]} == {0, 128}
    assert any("ratio_eager" in row for row in found["rows"])
    assert (found["machine"]["rehearsal"], found["failed"], found["begun"]) == (True, [], None)
    assert [row["method"] for row in json.loads((tmp_path / "step.json").read_text())["rows"]] == [
        "float",
        "fogzo",
    ]
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(files) == set(sessions.FILES)
    assert len(files) <= 8
    assert max(files.values()) < 2**20
    assert summary.REHEARSAL in text
    assert "## Host time of a step\n\n| method |" in text
    assert f"sources {machine.sources()}" in text
    for path in (ROOT, sys.prefix, tmp_path):
        assert str(path) not in text
    log, count = (tmp_path / "log.txt").read_text(), len(range(0, len(list(calls(subset=True))), every))
    for backend in here:
        assert f"ops {backend}: {count} calls agree with the reference, 0 differ, 0 failed" in log
    assert count > 4
    assert "summary.md" in capsys.readouterr().out


def test_without_a_gpu_one_sentence():
    if shutil.which("make") is None:
        pytest.skip("make is not there")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    folder = ROOT / "build/no-gpu"
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", f"RESULTS={folder}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert program.NO_GPU in result.stderr
    assert not folder.exists()


def test_a_budget_that_is_no_number_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("BUDGET", "120")
    assert program.parse([]).budget == 120
    monkeypatch.setenv("BUDGET", "long")
    with pytest.raises(SystemExit):
        program.parse([])
    assert "invalid float value: 'long'" in capsys.readouterr().err


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    texts = []

    def fails(session, limit):
        session.stage("first", python("print('why'); raise SystemExit(3)"), 60)

    def raises(session, limit):
        texts.append((tmp_path / "summary.md").read_text())
        raise ValueError("of the program")

    def hangs(session, limit):
        texts.append((tmp_path / "summary.md").read_text())
        code = "import subprocess as s; print('begun', flush=True); s.run(['sleep', '60'])"
        session.stage("third", python(code), 5, "tests.txt")

    for name, work in (("machine", fails), ("build", raises), ("ops", hangs)):
        monkeypatch.setitem(stages.STAGES, name, stages.Stage(work, 60))
    (tmp_path / "step.json").write_text("of an earlier run")
    chosen = ["--dry-run", "--results", str(tmp_path), "--stages", "machine", "build", "ops", "tests"]
    start = time.monotonic()
    assert program.main([*chosen, "--budget", "25"]) == 1
    assert time.monotonic() - start < 40
    assert "| first | failed |" in texts[0]
    assert "build is under way" in texts[0]
    assert "| build | failed | 0.0 | ValueError: of the program |" in texts[1]
    text = (tmp_path / "summary.md").read_text()
    assert "why" in (tmp_path / "log.txt").read_text()
    assert "| third | cut | 5." in text
    assert "stopped at its limit of 5 s" in text
    assert "begun" in (tmp_path / "tests.txt").read_text()
    assert "| tests | " in text
    assert not (tmp_path / "step.json").exists()


def test_a_run_that_is_ended_leaves_its_summary_and_no_process(tmp_path):
    """What a command's hard limit does, if it says so before."""
    code = (
        "import sys\nfrom bench.gpu import __main__ as program, stages\n"
        "def work(session, limit):\n"
        "    one = [sys.executable, '-c', 'import time; print(\"begun\", flush=True); time.sleep(77)']\n"
        "    session.beside(lambda: session.stage('one', one, 60), lambda: session.stage('two', one, 60))\n"
        "stages.STAGES['build'] = stages.Stage(work, 60)\n"
        "program.main(['--dry-run', '--results', sys.argv[1], '--stages', 'build'])\n"
    )
    process = subprocess.Popen(python(code, str(tmp_path)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    seen = 0
    for line in process.stdout:
        seen += "begun" in line and "$" not in line
        if seen == 2:
            break
    process.terminate()
    rest = process.stdout.read()
    assert process.wait(timeout=20) == 143, rest
    assert "build is under way" in (tmp_path / "summary.md").read_text()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "time.sleep(77)" not in left.replace(code, "")


def test_logs_come_line_by_line_and_end_at_their_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sessions, "LOG_BYTES", 1000)
    session = sessions.Session(tmp_path, 60.0, summary.summary)
    seen = []
    original = session.say
    monkeypatch.setattr(session, "say", lambda *given: seen.append(time.monotonic()) or original(*given))
    code = (
        "import time; print('one', flush=True); time.sleep(0.5); print('two', flush=True)\n"
        "print('x' * 1000); print('y' * 1000)"
    )
    found = session.run("stage", python(code), 20)
    assert found.text.startswith("one\ntwo\nxxx")
    assert seen[2] - seen[1] > 0.4
    text = (tmp_path / "log.txt").read_text()
    assert "stage: two" in text
    assert text.endswith("the rest is left out\n")
    assert "yyy" not in text
    assert "yyy" in capsys.readouterr().out


def test_what_is_asked_to_end_says_what_it_has_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "GRACE", 5)
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('found')"
    found = sessions.Session(tmp_path, 60.0, summary.summary).run("stage", python(code), 10, gently=True)
    assert (found.status, found.text) == (sessions.TIMEOUT, "found\n")


def test_without_time_left_stages_are_skipped(tmp_path):
    session = sessions.Session(tmp_path, 0.0, summary.summary, backends=dict.fromkeys(stages.BACKENDS, ""))
    for name in ("ops", "large", "step", "host", "profile", "memory", "rest"):
        stages.STAGES[name].work(session, -1.0)
    assert len(session.outcomes) == 10
    assert {(o.state, o.note) for o in session.outcomes} == {("skipped", "no time left")}


def test_a_backend_that_does_not_run_is_skipped_with_its_reason(tmp_path):
    session = sessions.Session(
        tmp_path, 60.0, summary.summary, backends={"triton": "", "cuda": "not built; so"}
    )
    assert stages.usable(session, "large") == ["triton"]
    assert [(o.stage, o.state, o.note) for o in session.outcomes] == [
        ("large cuda", "skipped", "not built; so")
    ]


# ---- a device that is lost, packages and tools that are missing


class Scripted(sessions.Session):
    """Answers in the place of processes; what is asked is kept."""

    def run(self, stage, command, limit, log="log.txt", gently=False, **environment):
        self.asked = [*getattr(self, "asked", []), command]
        self.given = {**getattr(self, "given", {}), stage: environment}
        status, text, files = self.answers.pop(stage if isinstance(self.answers, dict) else 0)
        for name, content in files.items():
            (self.results / name).write_text(content)
        return sessions.Ended(status, text, 1.0)


def scripted(folder, *answers):
    session = Scripted(folder, 100.0, summary.summary, backends=dict.fromkeys(stages.BACKENDS, ""))
    session.answers = list(answers)
    return session


def rows(begun=None):
    return {"kernels.json": json.dumps({"rows": [], "failed": [], "begun": begun})}


def test_benchmarks_go_on_after_a_process_that_is_lost(tmp_path):
    done = (1, "measured 4 rows; left out 0 timings; 2 failed", rows())
    session = scripted(tmp_path, (3, "lost", rows()), (1, "hangs", rows({"op": "norm"})), done)
    stages.kernels(session, "large triton", "triton", 60.0, stages.LARGE)
    assert len(session.asked) == 3
    assert all("--resume" in command for command in session.asked)
    assert [(o.state, o.note) for o in session.outcomes] == [
        ("failed", "measured 4 rows; left out 0 timings; 2 failed")
    ]
    session = scripted(tmp_path, (1, "ImportError: no such module", {}))
    (tmp_path / "kernels.json").unlink()
    stages.kernels(session, "large triton", "triton", 60.0, stages.LARGE)
    assert session.outcomes[0].note == "ImportError: no such module"
    session = scripted(tmp_path, (3, "lost", {}), (0, "| float |", {}))
    stages.step(session, 60.0)
    assert (len(session.asked), session.outcomes[0].state) == (2, "passed")


def test_a_build_that_fails_is_followed_by_one_without_cuda(tmp_path, monkeypatch):
    session = scripted(tmp_path)
    session.facts = {"capability": "sm_90", "tools": {}, "copy_gb_per_s": 4.0, "triad_gb_per_s": 3.0}
    info = "  triton     available\n  cuda       unavailable: it is not built; so\n"
    session.answers = {
        "build": (1, "nvcc fatal", {}), "build without CUDA": (0, "", {}), "info": (0, info, {}),
        "ops triton": (1, "differs: norm bf16 none\n  norm[0]\n227 calls agree, 1 differ", {}),
    }  # fmt: skip
    stages.build(session, 60.0)
    assert session.given["build"] == {"TORCH_CUDA_ARCH_LIST": "9.0"}
    assert session.given["build without CUDA"]["FOGZO_BUILD_CUDA"] == "0"
    assert session.backends == {"triton": "", "cuda": "it is not built; so"}
    assert {o.stage: o.state for o in session.outcomes} == {
        "build": "failed",
        "build without CUDA": "passed",
        "ops triton": "failed",
        "info": "passed",
    }
    assert "- triton differs: norm bf16 none" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("missing", "state", "note"),
    [
        ("['pytest', 'xdist']", "skipped", "not there: pytest"),
        ("['hypothesis']", "skipped", "not there: hypothesis"),
        ("['xdist']", "passed", "9 passed in 1s (serially: pytest-xdist is not there)"),
        ("[]", "passed", "9 passed in 1s"),
    ],
)
def test_tests_without_their_packages_are_skipped_or_run_on_one_process(missing, state, note, tmp_path):
    session = scripted(tmp_path, (0, missing, {}), (0, "=== 9 passed in 1s ===", {}))
    stages.tests(session, 60.0)
    assert [(o.state, o.note) for o in session.outcomes] == [(state, note)]
    if state == "passed":
        assert ("-n" in session.asked[1]) == (missing == "[]")


def test_tests_that_failed_before_the_limit_are_named(tmp_path):
    said = "[gw0] [ 1%] PASSED python_tests/test_a.py::a\n[gw1] [ 2%] FAILED python_tests/test_a.py::b[cuda]\n"
    session = scripted(tmp_path, (0, "[]", {}), (sessions.TIMEOUT, said, {}))
    stages.tests(session, 60.0)
    assert session.outcomes[0].note == "stopped at its limit of 60 s: 1 passed, 1 failed"
    assert "- python_tests/test_a.py::b[cuda]" in summary.summary(session)
    for name in stages.TESTS:
        assert (ROOT / f"python_tests/test_{name}.py").exists()


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
def test_the_output_of_a_tool_decides_its_verdict(status, text, state):
    assert tools.verdict(status, text, 1.0, "finished")[0] == state


NCU = """==PROF== Connected to process 41
[41] python@127.0.0.1
  void fogzo::cuda::perturb_kernel<(fogzo::Distribution)0>(fogzo::cuda::Perturb) (4096, 1, 1)x(128, 1, 1), \
Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    SM Frequency                    Ghz         1.75
    Memory Throughput                 %        91.20
    DRAM Throughput                   %        90.93
    Duration                         us     1,103.20
    Compute (SM) Throughput           %        61.00
    ----------------------- ----------- ------------

    OPT   This kernel has  2 uneven waves, and a long advice with a number at its end  12

    Section: Launch Statistics
    Registers Per Thread             register/thread              40
  sum_kernel (1, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us         4.10
"""


def test_profiles_are_read(tmp_path):
    assert tools.profiles(NCU) == [
        (
            "perturb_kernel",
            {
                "DRAM Throughput": "90.93 %",
                "Duration": "1,103.20 us",
                "Compute (SM) Throughput": "61.00 %",
                "Registers Per Thread": "40 register/thread",
            },
        ),
        ("sum_kernel", {"Duration": "4.10 us"}),
    ]
    session = sessions.Session(tmp_path, 60.0, summary.summary, texts={"ncu": NCU})
    wanted = "| perturb_kernel | 1,103.20 us | 90.93 % | 61.00 % | 40 register/thread |  |"
    assert wanted in summary.summary(session)


def test_each_op_is_profiled_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    session = scripted(tmp_path, *[(0, NCU, {})] * 7, (124, "", {}))
    stages.profile(session, 90.0)
    assert [o.state for o in session.outcomes] == ["passed"] * 7 + ["cut"]
    assert [command[command.index("--ops") + 1] for command in session.asked] == [*stages.PROFILED] * 2
    session = scripted(tmp_path, *[(0, "23 calls finished", {})] * 2)
    stages.memory(session, 60.0)
    assert [o.state for o in session.outcomes] == ["passed"] * 2
    assert session.asked[0][:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"]


def test_summary_shows_rows_of_both_backends_and_what_differs(tmp_path):
    row = {
        "op": "perturb", "latent": "bfloat16", "grad": "bfloat16", "out": "int8", "distribution": "uniform",
        "tensors": 1, "elements": 2**28, "scale_length": 0, "block": 0, "median_s": 4e-4, "share_of_copy": 0.9,
    }  # fmt: skip
    failed = {"backend": "cuda", "kind": "fogzo", "reason": "why", "dtypes": "bf16", **row}
    found = {
        "rows": [{**row, "backend": "triton", "ratio_eager": 9.0}, {**row, "backend": "cuda"}],
        "failed": [failed],
    }
    (tmp_path / "kernels.json").write_text(json.dumps(found))
    text = "differs: norm bf16 none\n  norm[0] element 0: 1, the reference 2; 1 of 1 differ\n9 calls agree\n"
    session = sessions.Session(tmp_path, 60.0, summary.summary, texts={"ops cuda": text})
    said = summary.summary(session)
    assert "| perturb | bf16/bf16/int8 | uniform | 1 | 2^28 |  | 400.0, 0.900 | 400.0, 0.900 | 9.0 |" in said
    assert "- failed: cuda fogzo perturb bf16 uniform, 1 tensors of 268435456: why" in said
    assert "- cuda differs: norm bf16 none\n    norm[0] element 0: 1, the reference 2" in said
    assert "9 calls agree" not in said
