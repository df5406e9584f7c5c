"""The tables of the documents are those of the result files."""

import functools
import json
import os
import shutil

import pytest

from bench import base, machine, report


def test_documents_are_up_to_date():
    assert report.main(["--check"]) == 0


def test_a_changed_number_is_seen(tmp_path, monkeypatch, capsys):
    """In a document or in a file; it is written again as it was."""
    shown = {name: one for name, one in report.SECTIONS.items() if one.document == "docs/performance.md"}
    monkeypatch.setattr(report, "SECTIONS", shown)  # without the ablation's tables, which take long
    for section in shown.values():
        for name in (section.document, *section.files):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text((report.ROOT / name).read_text())
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report.documents, "__defaults__", (tmp_path,))
    assert report.main(["--check"]) == 0
    path = tmp_path / "docs/performance.md"
    before = path.read_text()
    path.write_text(before.replace("| float | 1.00 |", "| float | 0.99 |"))
    assert report.main(["--check"]) == 1
    assert "docs/performance.md is not what the result files say" in capsys.readouterr().err
    assert report.main([]) == 0
    assert path.read_text() == before
    file = tmp_path / report.SECTIONS["steps"].files[0]
    found = json.loads(file.read_text())
    found["rows"][1]["seconds"] = found["rows"][0]["seconds"]
    file.write_text(json.dumps(found))
    assert report.main(["--check"]) == 1


@pytest.mark.parametrize("text", ["none", "<!-- report: a -->\nx\n<!-- end of report -->\n" * 2])
def test_a_table_has_one_place(text):
    with pytest.raises(ValueError, match="a document must have one place <!-- report: a -->"):
        report.rendered(text, "a", "body")


def test_what_stands_around_a_table_stays():
    text = "before\n<!-- report: a -->\nold\n<!-- end of report -->\nafter <!-- report: b -->"
    assert report.rendered(text, "a", "| \\1 |") == text.replace("old", "| \\1 |")


def test_no_cell_of_the_ops_is_empty():
    """Rows of all dtypes are found, also of ops without latents."""
    for name in ("kernels", "quantizers", "baselines"):
        section = report.SECTIONS[name]
        found = [json.loads((report.ROOT / file).read_text()) for file in section.files]
        assert "|  |" not in section.table(*found)


# ---- two commits in one run


TINY = {
    "bench.kernels": [
        "--backend", "cpu", "--sizes", "2^10", "--tensors", "1", "--ops", "quantize", "--dtypes", "fp32",
        "--distributions", "uniform", "--no-baselines",
    ],
    "bench.step": [
        "--model", "mlp", "--hidden", "8", "--layers", "1", "--rows", "4", "--no-traffic", "--methods", "fogzo",
        "--turns", "1",
    ],
}  # fmt: skip
HERE = str(base.ROOT)


@pytest.fixture
def built(tmp_path, monkeypatch):
    """The folder of built modules, with those of this checkout in place of each commit's."""

    def build(tree, words, **variables):
        builds.append(tree)
        for module in base.modules_of(base.ROOT):
            shutil.copy(module, tree / "fogzo_kernels")

    builds, run = [], base.run
    monkeypatch.setattr(base, "BUILT", tmp_path / "base")
    monkeypatch.setattr(base, "check_built", lambda tree: None)  # fresh checkouts have odd times
    monkeypatch.setattr(base, "run", lambda tree, words, **v: (build if v else run)(tree, words, **v))
    return builds


def test_a_commit_is_measured_beside_this_checkout(monkeypatch, capsys, built):
    """Nothing of it is left behind, in the folder of temporary files or in git's list of trees."""
    turns, measured = [], functools.cache(lambda tree: real(tree, TINY))  # once for each side, which takes long
    real = base.measure
    monkeypatch.setattr(base, "measure", lambda tree, _: turns.append(tree) or measured(tree))
    assert base.main(["HEAD", "--rounds", "2", "--limit", "1e9"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "| | base, ms | this, ms | of base | in rounds | |"
    whats = [line.split(" | ")[0].removeprefix("| ") for line in said[2:-1]]
    assert whats == ["quantize, cpu, none, float32/-/float32, 1024 elements", "step, float", "step, fogzo"]
    assert said[-1] == "0 of 3 rows lost more than 1e+09 %: none"
    other = turns[0]
    assert turns == [other, base.ROOT] * 2
    assert not other.exists()
    assert str(other) not in base.git("worktree", "list")  # which may show trees of other programs


def test_a_commit_is_built_once(monkeypatch, built):
    trees = []
    monkeypatch.setattr(base, "measure", lambda tree, _: trees.append(base.modules_of(tree)) or {"a": 1.0})
    assert base.main(["HEAD", "HEAD", "--rounds", "1"]) == 0
    assert len(built) == 1
    assert [[module.name for module in found] for found in trees] == [
        [module.name for module in base.modules_of(base.ROOT)]
    ] * 2


def test_a_row_that_lost_is_marked_and_changes_the_exit_status(monkeypatch, capsys, built):
    times = iter([{"a": 1.0, "b": 1.0}, {"a": 1.06, "b": 1.04}] * 6)
    monkeypatch.setattr(base, "measure", lambda tree, _: next(times))
    assert base.main([HERE, HERE, "--rounds", "2"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[2:] == [
        "| a | 1000.000 | 1060.000 | 1.06 | 1.06 to 1.06 | LOST |",
        "| b | 1000.000 | 1040.000 | 1.04 | 1.04 to 1.04 |  |",
        "1 of 2 rows lost more than 5 %: a",
    ]
    assert next(times, None) is None  # three times as many rounds as were asked for


def test_rounds_go_on_until_nothing_seems_lost(monkeypatch, capsys, built):
    times = iter([{"a": 1.0}, {"a": 1.5}] * 2 + [{"a": 1.0}, {"a": 1.0}] * 9)
    monkeypatch.setattr(base, "measure", lambda tree, _: next(times))
    assert base.main([HERE, HERE, "--rounds", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "| a | 1000.000 | 1000.000 | 1.00 | 1.00 to 1.50 |  |"
    assert len(list(times)) == 2 * 8


def test_options_after_two_dashes_are_those_of_the_ops(monkeypatch, built):
    asked = []
    monkeypatch.setattr(base, "measure", lambda _, programs: asked.append(programs) or {"a": 1.0})
    base.main([HERE, "--rounds", "1", "--", "--ops", "perturb", "--sizes", "2^24"])
    assert list(asked[0]) == ["bench.kernels"]
    assert asked[0]["bench.kernels"][-4:] == ["--ops", "perturb", "--sizes", "2^24"]


def test_one_slow_round_is_no_loss():
    """Neither of the base nor of the other side: the least time and most rounds must say so."""
    base_times, ours = [{"a": 1.0}, {"a": 1.0}, {"a": 1.0}], [{"a": 1.0}, {"a": 9.0}, {"a": 9.0}]
    table, lost = base.compare(base_times, ours, 1.05)
    assert table.splitlines()[2:] == ["| a | 1000.000 | 1000.000 | 1.00 | 1.00 to 9.00 |  |"]
    assert lost == []
    assert base.compare([{"a": 0.1}, {"a": 1.0}, {"a": 1.0}], [{"a": 1.0}] * 3, 1.05)[1] == []
    assert base.compare(base_times, [{"a": 1.1}] * 3, 1.05)[1] == ["a"]


def test_a_new_row_has_nothing_to_lose():
    table, lost = base.compare([{"a": 2.0}], [{"a": 1.0, "b": 1.0}], 1.05)
    assert table.splitlines()[2:] == [
        "| a | 2000.000 | 1000.000 | 0.50 | 0.50 to 0.50 |  |",
        "| b | not there | 1000.000 | | | |",
    ]
    assert lost == []


def test_an_unknown_commit_is_named():
    with pytest.raises(SystemExit, match="rev-parse --verify no-such-commit"):
        base.main(["no-such-commit"])


def test_a_folder_whose_sources_are_newer_than_its_module_is_refused(tmp_path):
    for name in ("csrc/cpu", "fogzo_kernels"):
        (tmp_path / name).mkdir(parents=True)
    source, module = tmp_path / "csrc/cpu/a.h", tmp_path / "fogzo_kernels/_C.so"
    source.touch()
    with pytest.raises(SystemExit, match=r"must be built, as csrc/cpu/a\.h is newer"):
        base.check_built(tmp_path)
    module.touch()
    os.utime(source, (1.0, 1.0))
    base.check_built(tmp_path)
    os.utime(source, (2e12, 2e12))
    with pytest.raises(SystemExit, match="must be built"):
        base.main([str(tmp_path), "--rounds", "1"])


# ---- where results are from


def test_sources_are_known_without_git(tmp_path, monkeypatch):
    shutil.copytree(report.ROOT / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "build_cuda.py", "cuda_units.py"):
        shutil.copy(report.ROOT / name, tmp_path)
    shutil.copytree(
        report.ROOT / "fogzo_kernels",
        tmp_path / "fogzo_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    assert machine.sources(tmp_path) == machine.sources()
    path = tmp_path / "csrc/element.h"
    path.write_text(path.read_text() + "\n")
    assert machine.sources(tmp_path) != machine.sources()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("COMMIT", "abc1234")
    assert machine.commit() == "abc1234"
    monkeypatch.delenv("COMMIT")
    assert machine.commit() == "unknown"


def test_a_result_without_a_commit_names_its_sources():
    known = {"commit": "abc1234", "sources": "0123456789ab"}
    assert report.origin(known) == "commit abc1234"
    assert report.origin({**known, "commit": "unknown"}) == "sources 0123456789ab"
    assert report.origin({"commit": "unknown"}) == "commit unknown"


def test_steps_of_several_settings_have_a_column_each():
    """And files of other threads; pairs of methods have a line below."""

    def found(threads, axes):
        methods = (("float", 2.0, None), ("torchao", 4.0, None), ("ste", 3.0, 4))
        rows = [
            {**axis, "method": method, "seconds": [seconds] * 4, "calls": calls, "bytes": calls}
            | {"peak_bytes": 2e6, "bytes_in_passes": 1e6}
            for axis in axes
            for method, seconds, calls in methods
        ]
        return {"machine": {"threads": threads}, "rows": rows}

    axes = [{"micro_batches": 4}, {"micro_batches": 1}]
    assert report.of_steps(found(2, axes), found(1, [{}])).splitlines() == [
        "| | 2 threads, micro-batches 4: of float | 2 threads, micro-batches 1: of float | 1 thread: of float"
        " | peak MB | calls | MB by ops |",
        "|---|---|---|---|---|---|---|",
        "| float | 1.00 | 1.00 | 1.00 | 2.0 |  |  |",
        "| torchao | 2.00 | 2.00 | 2.00 | 2.0 |  |  |",
        "| ste | 1.50 | 1.50 | 1.50 | 2.0 | 4 | 1.0 |",
        "| ste, of torchao | 0.75 | 0.75 | 0.75 | | | |",
    ]
