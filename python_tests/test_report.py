"""The tables of the documents are those of the result files."""

import functools
import json
import shutil

import pytest

from bench import base, machine, report


def test_documents_are_up_to_date():
    assert report.main(["--check"]) == 0


def test_a_changed_number_is_seen(tmp_path, monkeypatch, capsys):
    """In a document or in a file; it is written again as it was."""
    for section in report.SECTIONS.values():
        for name in (section.document, *section.files):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text((report.ROOT / name).read_text())
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report.documents, "__defaults__", (tmp_path,))
    assert report.main(["--check"]) == 0
    path = tmp_path / "docs/performance.md"
    before = path.read_text()
    path.write_text(before.replace("| ste | 1.00;", "| ste | 0.99;"))
    assert report.main(["--check"]) == 1
    assert "docs/performance.md is not what the result files say" in capsys.readouterr().err
    assert report.main([]) == 0
    assert path.read_text() == before
    file = tmp_path / report.SECTIONS["steps"].files[0]
    found = json.loads(file.read_text())
    found["rows"][1]["of_ste"] += 1
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


def test_a_commit_is_measured_beside_this_checkout(monkeypatch, capsys):
    """Nothing of it is left behind, in the folder of temporary files or in git's list of trees."""
    turns, measured = [], functools.cache(base.measure)  # once for each side, which takes long
    monkeypatch.setattr(base, "PROGRAMS", TINY)
    monkeypatch.setattr(base, "measure", lambda tree: turns.append(tree) or measured(tree))
    assert report.main(["--base", "HEAD", "--rounds", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "| | base, ms | this, ms | times as fast | range |"
    whats = [line.split(" | ")[0].removeprefix("| ") for line in said[2:]]
    assert whats == ["quantize, cpu, none, float32, -, float32", "step, ste", "step, fogzo"]
    other = turns[0]
    assert turns == [other, base.ROOT] * 2
    assert not other.exists()
    assert str(other) not in base.git("worktree", "list")  # which may show trees of other programs


def test_ratios_are_of_turns_beside_each_other():
    found = base.table([{"a": 2.0}, {"a": 6.0}, {"a": 3.0}], [{"a": 1.0, "b": 1.0}, {"a": 2.0}, {"a": 2.0}])
    assert found.splitlines()[2:] == [
        "| a | 3000.000 | 2000.000 | 2.00 | 1.50 to 3.00 |",
        "| b | not there | 1000.000 | | |",
    ]


def test_an_unknown_commit_is_named():
    with pytest.raises(SystemExit, match="rev-parse --verify no-such-commit"):
        report.main(["--base", "no-such-commit"])


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
