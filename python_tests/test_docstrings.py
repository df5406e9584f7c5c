"""The docstrings: every example runs as it stands, every public name has one, every argument is described."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import fogzo_kernels as fk
from fogzo_kernels.nn.quantized import QuantizedWeight

PACKAGE = Path(fk.__file__).parent
PUBLIC = ("fk", "functional", "presets", "export", "integrations.trainer", "integrations.lightning")
#: What an example may need beside the package.
OPTIONAL = {
    "accelerate", "compressed_tensors", "gguf", "lightning", "numpy", "safetensors", "torchao", "tqdm",
    "transformers",
}  # fmt: skip
#: Classes whose objects only the package makes: their constructors' arguments are nobody's business.
MADE_HERE = {"Attached", "Pass", "Report"}
#: Of quantized modules, the methods for users; the others serve the package.
FOR_USERS = {"codes", "effective_weight"}
MOST_LINES = 6


def examples():
    """Each docstring with an example, parsed; decorators do not hide it from here."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text, own = ast.get_docstring(node) or "", getattr(node, "name", "")
                if ">>>" in text:
                    yield pytest.param(text, name, getattr(node, "lineno", 1), id=f"{name}:{own}")


EXAMPLES = list(examples())


def skip_without(error):
    """Skip if the error says that an optional package is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name.partition(".")[0] in OPTIONAL:
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize(("text", "name", "line"), EXAMPLES)
def test_example_prints_what_it_says(text, name, line, backend, monkeypatch, tmp_path):
    """With nothing but torch and fk at hand, on any backend of the CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOGZO_BACKEND", backend)
    globs = {"torch": torch, "fk": fk, "__name__": "example"}
    parsed = doctest.DocTestParser().get_doctest(text, globs, name, name, line)
    assert sum(example.source.count("\n") for example in parsed.examples) <= MOST_LINES
    try:
        doctest.DebugRunner(verbose=False).run(parsed)
    except doctest.UnexpectedException as failed:
        skip_without(failed.exc_info[1])
        raise failed.exc_info[1] from None
    except doctest.DocTestFailure as failed:
        pytest.fail(f"{name}: {failed.example.source}must print\n{failed.example.want}got\n{failed.got}")


def entries(doc, section):
    """The names that a section of a docstring describes; ``a, b: text`` describes two."""
    found = re.search(rf"^{section}:\n((?:    .*\n|\n)*)", doc + "\n", re.MULTILINE)
    lines = re.findall(r"^    (\w+(?:, \w+)*): ", found[1], re.MULTILINE) if found else []
    return [name for line in lines for name in line.split(", ")]


def arguments(thing):
    """The names of a callable's arguments: all of them, and those that take any number."""
    own = [p for p in inspect.signature(thing).parameters.values() if p.name not in ("self", "cls")]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in own if p.kind not in several], [p.name for p in own if p.kind in several]


def faults_of(name, thing, *, with_example):
    """Yields what a docstring lacks or has too much."""
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    if not doc or doc.startswith(f"{name.rpartition('.')[2]}("):  # the latter a dataclass makes up
        yield f"{name} must have a docstring"
        return
    doc = inspect.cleandoc(doc)
    if not re.match(r"[A-Z`1].*[.:]$", doc.splitlines()[0]):
        yield f"{name} must begin with a sentence on one line"
    if with_example and "\nExample:\n    >>> " not in doc:
        yield f"{name} must have an Example"
    if isinstance(thing, property):
        return
    described, (needed, several) = entries(doc, "Args"), arguments(thing)
    if inspect.isclass(thing) and name in MADE_HERE:
        needed = []
    if len(set(described)) < len(described):
        yield f"{name} must describe each argument once"
    yield from (f"{name} must describe {x} in Args" for x in needed if x not in described)
    yield from (
        f"{name} must not describe {x}, which is no argument" for x in described if x not in needed + several
    )


def members(kind):
    """Yields public methods and properties of a class, those of this package's bases included."""
    for base in kind.__mro__:
        if base.__module__.startswith("fogzo_kernels"):
            for name, thing in vars(base).items():
                thing = getattr(thing, "__func__", thing)  # of class and static methods
                if name.startswith("_") or not (inspect.isfunction(thing) or isinstance(thing, property)):
                    continue
                if name in FOR_USERS or not issubclass(kind, QuantizedWeight):
                    yield name, thing


def faults_in(where):
    """Yields the faults of all public names of a module."""
    module = importlib.import_module(f"fogzo_kernels.{where}") if "." in where else getattr(fk, where, fk)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.ismodule(thing):
            continue
        yield from faults_of(name, thing, with_example=True)
        for member, of_class in members(thing) if inspect.isclass(thing) else ():
            shown = inspect.isfunction(of_class) and bool(arguments(of_class)[0])
            with_example = shown and not where.startswith("integrations")  # whose hooks another library calls
            yield from faults_of(f"{name}.{member}", of_class, with_example=with_example)


@pytest.mark.parametrize("where", PUBLIC)
def test_every_public_name_is_described(where):
    try:
        assert list(faults_in(where)) == []
    except ModuleNotFoundError as error:
        skip_without(error)
        raise


def test_examples_are_found():
    files = {param.values[1] for param in EXAMPLES}
    assert files >= {"train/fogzo.py", "spec/grid.py", "export/plain.py", "integrations/lightning.py"}
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert sum(param.values[0].count(">>>") for param in EXAMPLES) == text.count(">>> ") > 200


def described(a, b=1):
    """Do this.

    Args:
        a: one.
        c: no argument.
    """


def bare(a): ...


def test_faults_are_found():
    assert list(faults_of("described", described, with_example=True)) == [
        "described must have an Example",
        "described must describe b in Args",
        "described must not describe c, which is no argument",
    ]
    assert list(faults_of("bare", bare, with_example=False)) == ["bare must have a docstring"]


def test_any_optional_package_but_no_other_may_be_missing():
    with pytest.raises(pytest.skip.Exception, match=r"gguf\.constants is not installed"):
        skip_without(ModuleNotFoundError("", name="gguf.constants"))
    skip_without(ModuleNotFoundError("", name="fogzo_kernels.missing"))
