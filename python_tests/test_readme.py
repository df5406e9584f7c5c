"""The documents: every example runs by itself, every link leads somewhere, README stays short."""

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import run_code

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
WITH_EXAMPLES = {"README.md", "docs/usage.md", "docs/models.md", "docs/frontends.md", "docs/loops.md",
                 "docs/devices.md", "docs/export.md", "docs/how-it-works.md", "docs/migrate.md",
                 "docs/mixtures.md", "docs/quickstart.md"}  # fmt: skip
PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
LANGUAGES = {"python", "bibtex"}
#: What an example may need beside the package.
OPTIONAL = {"transformers", "accelerate", "lightning", "torchao", "compressed_tensors"}


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(path):
    """Language, line and text of each fenced block."""
    text = path.read_text()
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        yield found[1], text.count("\n", 0, found.start()) + 1, found[2]


EXAMPLES = [
    pytest.param(code, id=f"{name_of(path)}:{line}")
    for path in DOCUMENTS
    for language, line, code in blocks(path)
    if language == "python"
]
#: The first one trains.
FIRST = next(code for language, _, code in blocks(README) if language == "python")


def run(code, folder):
    """What it prints, in a process of its own.

    What wants to be started by torchrun is, as two processes.
    """
    if "# torchrun" in code:
        file = folder / "example.py"
        file.write_text(code)
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", file.name]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=env, text=True, stdout=-1, stderr=subprocess.STDOUT
        )
        status, output = done.returncode, done.stdout
    else:
        status, output = run_code(code, folder)
    missing = re.search(r"No module named '(\w+)'", output)
    if missing and missing[1] in OPTIONAL:
        pytest.skip(f"{missing[1]} is not installed")
    assert status == 0, output
    return output


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs_by_itself_and_says_something(code, tmp_path):
    output = run(code, tmp_path)
    assert output.strip()
    if code == FIRST:
        first, last, share = map(float, re.search(r"loss (\S+) -> (\S+); (\S+)%", output).groups())
        assert last < 0.7 * first
        assert 90 < share < 100


def last_losses(code, seeds=8):
    """Mean loss of the last steps of the first example, for each seed."""
    found = []
    for seed in range(seeds):
        names = {}
        exec(code.replace("torch.manual_seed(0)", f"torch.manual_seed({seed})"), names)
        found.append(statistics.mean(names["losses"][-50:]))
    return found


def test_the_first_example_ends_no_higher_than_straight_through():
    """By less than two standard errors over seeds, each of which has one task and one start for both."""
    assert FIRST.count("torch.manual_seed(0)") == FIRST.count("total_steps=500)") == 1
    plainly = FIRST.replace("total_steps=500)", "total_steps=500, kappa=0)")
    ours, plain = last_losses(FIRST), last_losses(plainly)
    apart = [a - b for a, b in zip(ours, plain, strict=True)]
    assert any(apart)
    assert statistics.mean(apart) < 2 * statistics.stdev(apart) / len(apart) ** 0.5


def test_examples_are_found():
    """None is missed for another spelling of its language, or for a fence that is not closed."""
    assert {param.id.rpartition(":")[0] for param in EXAMPLES} == WITH_EXAMPLES
    for path in DOCUMENTS:
        found = list(blocks(path))
        assert {language for language, _, _ in found} <= LANGUAGES, path
        fences = [line for line in path.read_text().splitlines() if line.lstrip().startswith("```")]
        assert len(fences) == 2 * len(found), path


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_links_lead_somewhere():
    found = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    inside = [(page, link) for page, link in found if not re.match(r"\w+:", link)]
    assert {page for page, _ in inside} >= {README, ROOT / "docs/usage.md", ROOT / "CHANGELOG.md"}
    assert [(name_of(page), link) for page, link in inside if not (page.parent / link).exists()] == []
