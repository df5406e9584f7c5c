"""What several files of the project say, they say alike: versions, packages, lists of tests."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

import fogzo_kernels as fk
from tools.check_site import broken
from tools.package import NEEDED, OF_THE_TREE

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()
WHEELS = (ROOT / ".github/workflows/wheels.yml").read_text()
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


def packages(name):
    """Of a list in the Makefile."""
    return re.search(rf"^{name}_PACKAGES := (.*)$", MAKEFILE, re.MULTILINE)[1].split()


#: The pages that say how to install the package.
INSTALLED_BY = (ROOT / "README.md", ROOT / "docs/install.md")


def test_one_python_version():
    minor = int(re.fullmatch(r">=3\.(\d+)", PROJECT["project"]["requires-python"])[1])
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{minor}"
    assert PROJECT["tool"]["mypy"]["python_version"] == f"3.{minor}"
    assert f"v >= (3, {minor})" in MAKEFILE
    for page in INSTALLED_BY:
        assert re.findall(r"Python 3\.(\d+) or newer", page.read_text()) == [str(minor)]
    assert re.search(r"CIBW_BUILD: cp3(\d+)-\*", WHEELS)[1] == str(minor)
    for workflow in ("ci.yml", "wheels.yml", "docs.yml"):
        text = (ROOT / ".github/workflows" / workflow).read_text()
        assert set(re.findall(r'python-version: "(.*)"', text)) == {f"3.{minor}"}


def test_one_oldest_torch():
    (oldest,) = re.findall(r"^torch>=(.+)$", "\n".join(PROJECT["project"]["dependencies"]), re.MULTILINE)
    assert f"torch>={oldest}" in PROJECT["build-system"]["requires"]
    assert f'"torch>={oldest}"' in WHEELS
    assert re.search(r'^TORCH_TARGET = "(.*)"', (ROOT / "setup.py").read_text(), re.MULTILINE)[1] == oldest
    assert re.search(r"^OLDEST_TORCH := (.*)\.0$", MAKEFILE, re.MULTILINE)[1] == oldest
    for page in INSTALLED_BY:
        assert f"PyTorch {oldest} or newer" in page.read_text()
    assert "make test-oldest" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_the_oldest_torch_runs_tests_that_are_there():
    names = re.search(r"^OLDEST_TESTS := (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    assert [name for name in names if not (ROOT / f"python_tests/test_{name}.py").exists()] == []
    assert set(names).isdisjoint(OF_THE_TREE)


#: What setuptools 61 takes under [project], which is the first to read it; before 77 a license is a table.
KNOWN_TO_SETUPTOOLS_61 = {
    "name", "version", "description", "readme", "requires-python", "classifiers", "dependencies",
    "optional-dependencies", "dynamic",
}  # fmt: skip


def test_any_setuptools_reads_the_project():
    assert "setuptools>=61" in PROJECT["build-system"]["requires"]
    assert '"setuptools>=61"' in WHEELS
    for page in INSTALLED_BY:
        assert '"setuptools>=61"' in page.read_text()
    assert set(PROJECT["project"]) <= KNOWN_TO_SETUPTOOLS_61
    assert PROJECT["project"]["dynamic"] == ["license"]


def test_metadata_names_the_license(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "FOGZO_BUILD_CUDA": "0"}, check=True)
    (written,) = tmp_path.glob("*.egg-info/PKG-INFO")
    new = int(metadata.version("setuptools").split(".")[0]) >= 77
    lines = written.read_text().splitlines()
    assert ("License-Expression: MIT" if new else "License: MIT") in lines
    assert "License-File: LICENSE" in lines


@pytest.mark.parametrize(
    "name",
    ["demo", "triton", "transformers", "loops", "export", "llama-cpp", "test", "lint", "docs", "package"],
)
def test_make_installs_what_the_extra_names(name):
    extra = [re.match(r"[\w-]+", package)[0] for package in EXTRAS[name]]
    assert packages(name) == [package for package in extra if package != "fogzo_kernels"]


def test_every_package_is_pinned():
    base = re.search(r"^\t\$\(PIP\) (torch .*)$", MAKEFILE, re.MULTILINE)[1].split()
    lists = [packages(name) for name in EXTRAS]
    assert {package for one in (base, *lists) for package in one} == set(PINNED)
    assert set(NEEDED) <= set(PINNED)


def test_the_wheel_is_tested_without_the_tests_of_the_tree():
    assert sorted(re.findall(r"--ignore tests/test_(\w+)\.py", WHEELS)) == sorted(OF_THE_TREE)
    assert [name for name in OF_THE_TREE if not (ROOT / f"python_tests/test_{name}.py").exists()] == []


def test_tests_of_the_benchmarks_are_tests_of_the_tree():
    """Where the wheel is tested, they would fail to import."""
    tests = {path.stem.removeprefix("test_"): path.read_text() for path in ROOT.glob("python_tests/test_*.py")}
    shared = {path.stem: path.read_text() for path in ROOT.glob("python_tests/support/*.py")}
    of_bench = [
        name for name, text in shared.items() if re.search(r"^(from|import) (bench|tools)\b", text, re.M)
    ]
    imported = "|".join(["bench", "tools", *(rf"support\.{name}" for name in of_bench)])
    found = {n for n, text in tests.items() if re.search(rf"^\s*(from|import) ({imported})\b", text, re.M)}
    assert len(found) > 5
    assert found <= set(OF_THE_TREE)


def test_the_reference_has_each_public_name_once():
    text = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
    single = re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)", text, re.MULTILINE)
    files = sorted((ROOT / "fogzo_kernels/integrations").glob("[!_]*.py"))
    libraries = {
        f"integrations.{file.stem}": re.search(r"^__all__.* = \[(.*)\]$", file.read_text(), re.M)[1]
        for file in files
    }
    others = [
        f"fogzo_kernels.{where}.{name}"
        for where, names in libraries.items()
        for name in re.findall(r"\w+", names)
    ]
    assert sorted([*single, *fk.functional.__all__, "presets"]) == sorted([*fk.__all__, *others])
    modules = re.findall(r"^\.\. automodule:: fogzo_kernels\.(\S+)$", text, re.MULTILINE)
    assert sorted(modules) == sorted(["functional", "presets", "export", *libraries])


def test_broken_links_of_a_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html#y"/><a href="#x"/><a href="https://c/d"/>')
    (tmp_path / "b.html").write_text('<a href="a.html#x"/><a href="a.html#z"/><img src="c.png"/>')
    assert broken(tmp_path) == [
        "a.html: b.html#y leads to no id",
        "b.html: a.html#z leads to no id",
        "b.html: c.png leads to no file",
    ]


def test_no_test_imports_another():
    folder = ROOT / "python_tests"
    found = [p.name for p in folder.rglob("*.py") if re.search(r"^\s*(from|import) test_", p.read_text(), re.M)]
    assert found == []


def item(name):
    marker = "slow_first" if name.isupper() else None
    return SimpleNamespace(name=name, get_closest_marker=lambda asked: asked if asked == marker else None)


@pytest.mark.parametrize(
    ("collected", "ordered"), [("abXcYd", "XaYbcd"), ("XY", "XY"), ("aXY", "XaY"), ("ab", "ab")]
)
def test_long_tests_start_first_each_beside_a_short_one(collected, ordered):
    items = [item(name) for name in collected]
    conftest.long_first(items)
    assert "".join(one.name for one in items) == ordered
