"""Who may import whom, and other rules that keep the project small."""

import ast
import inspect
import itertools
import os
import posixpath
import re
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import fogzo_kernels as fk
from fogzo_kernels import backends

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fogzo_kernels"
#: The floors of the package, bottom first, and what each may import beside itself. Within a floor any order
#: will do that has no circle. ``distributed`` gives ``nn`` its views, so ``nn`` does not import it.
FLOORS = {
    "_C": "",
    "_cuda": "",
    "spec": "",
    "backends": "spec _C _cuda",
    "ops": "spec backends",
    "functional": "spec ops",
    "nn": "spec backends ops functional",
    "distributed": "spec backends ops functional nn",
    "train": "spec backends ops functional nn distributed",
    "optim": "spec ops functional nn train",
    "integrations": "spec nn train",
    "export": "spec ops functional nn distributed.packing integrations.transformers",
    "__init__": "spec backends functional nn train optim export",
    "info": "__init__ backends _C _cuda",
}
COMPILED = {"_C", "_cuda"}
#: The language or compiled module of each backend, beside torch and the standard library.
OWN = {"reference": set(), "cpu": {"_C"}, "triton": {"triton"}, "cuda": {"_cuda"}}


# ---- the walk


def imports(source, module, types=True):
    """Absolute names that a module imports, anywhere in it; ``from x import y`` gives x.y.

    ``types`` says whether imports under TYPE_CHECKING count. A package's own module is ``x.__init__``.
    """
    package, names, nodes = f"fogzo_kernels.{module}".rpartition(".")[0], set(), [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types
        nodes += node.orelse if for_types else ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            names |= {resolve_name(n.value, package) for n in node.args[:1] if isinstance(n, ast.Constant)}
    return names


def module_of(name, modules):
    """The module of the package that holds an absolute name; None where another package does."""
    top, *parts = name.split(".")
    starts = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    paths = [m for start in starts for m in (start, f"{start}.__init__".lstrip(".")) if m in modules]
    return paths[0] if top == "fogzo_kernels" else None


def graph(sources, types=True):
    """The modules that each module imports; of texts by name: ``"nn.a"``, ``"nn.__init__"``, ``"__init__"``."""
    edges = {m: {module_of(n, sources) for n in imports(text, m, types)} for m, text in sources.items()}
    return {module: others - {None, module} for module, others in edges.items()}


def closure(edges):
    """The nodes that each node reaches."""
    reached = {node: set(others) for node, others in edges.items()}
    for middle, node in itertools.product(edges, edges):
        if middle in reached[node]:
            reached[node] |= reached[middle]
    return reached


def circles(edges):
    """The sets of nodes that reach each other."""
    to = closure(edges)
    return sorted({tuple(sorted(m for m in to[n] if n in to[m])) for n in edges if n in to[n]})


def violations(sources):
    """Imports that the floors forbid, and circles of modules.

    An import inside a function counts as any other. One under TYPE_CHECKING counts between floors, but not
    within one, where it may name the type of a caller.
    """
    wrong = [f"{module} lies on no floor" for module in sources if module.split(".")[0] not in FLOORS]
    for module, others in graph(sources).items():
        may = {module.split(".")[0], *FLOORS.get(module.split(".")[0], "").split()}
        outside = [other for other in sorted(others) if not may & {other, other.split(".")[0]}]
        wrong += [f"{module} imports {other}" for other in outside]
    return wrong + [f"circle: {' '.join(circle)}" for circle in circles(graph(sources, types=False))]


def texts(folder, pattern):
    """The text of each file below a folder, by its path from there; there is one."""
    files = {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob(pattern))}
    assert files, f"no {pattern} in {folder}"
    return files


SOURCES = {path[:-3].replace("/", "."): text for path, text in texts(PACKAGE, "*.py").items()}
SOURCES |= dict.fromkeys(COMPILED, "")
CSRC = texts(ROOT / "csrc", "*.*")
GRAPH = graph(SOURCES)


# ---- planted imports are found

FOLDERS = [floor for floor in FLOORS if not floor.startswith("_")]
MODULES = [f"{floor}.{name}" for floor in FOLDERS for name in ("__init__", "a", "b")]
UP = ["train.a imports optim.a"]
SMALL = dict.fromkeys([*MODULES, "__init__", *COMPILED], "")


@pytest.mark.parametrize("end", ["a", "__init__"])
@pytest.mark.parametrize(("floor", "other"), [*itertools.permutations([*FOLDERS, "__init__"], 2)])
def test_an_import_that_the_floors_forbid_is_found(floor, other, end):
    importer = floor if floor == "__init__" else f"{floor}.b"
    imported = other if other == "__init__" else f"{other}.{end}"
    name = f"fogzo_kernels.{imported}".removesuffix(".__init__")
    allowed = other in FLOORS[floor].split() and list(FLOORS).index(other) < list(FLOORS).index(floor)
    expected = [] if allowed else [f"{importer} imports {imported}"]
    assert violations(SMALL | {importer: f"from {name} import x"}) == expected


@pytest.mark.parametrize(
    ("planted", "wrong"),
    [
        ({"train.a": "from ..optim.a import x"}, UP), ({"train.a": "from ..optim import a"}, UP),
        ({"train.a": "from ..optim.a import *"}, UP), ({"train.a": "import fogzo_kernels.optim.a as one"}, UP),
        ({"train.a": "def f():\n    from ..optim import a"}, UP),
        ({"train.a": "if 1: import fogzo_kernels.optim.a"}, UP),
        ({"train.a": "__import__('fogzo_kernels.optim.a')"}, UP),
        ({"train.a": "importlib.import_module('fogzo_kernels.optim.a')"}, UP),
        ({"train.a": "import_module('..optim.a', __package__)"}, UP),
        ({"train.a": "if TYPE_CHECKING:\n    from ..optim.a import X"}, UP),
        ({"train.a": "from ..optim import x"}, ["train.a imports optim.__init__"]),
        ({"train.a": "from .. import optim"}, ["train.a imports optim.__init__"]),
        ({"train.a": "from .. import x"}, ["train.a imports __init__"]),
        ({"train.a": "import fogzo_kernels"}, ["train.a imports __init__"]),
        ({"nn.a": "from .b import x", "nn.b": "from .a import x"}, ["circle: nn.a nn.b"]),
        ({"nn.a": "from . import b", "nn.b": "def f():\n    from . import a"}, ["circle: nn.a nn.b"]),
        ({"nn.a": "from . import x", "nn.__init__": "from .a import x"}, ["circle: nn.__init__ nn.a"]),
        ({"nn.a": "from ..nn import x", "nn.__init__": "from . import b", "nn.b": "from .a import x"},
         ["circle: nn.__init__ nn.a nn.b"]),
        ({"nn.a": "from .b import x", "nn.b": "if TYPE_CHECKING:\n    from .a import X"}, []),
        ({"extra.a": ""}, ["extra.a lies on no floor"]),
    ],
)  # fmt: skip
def test_every_form_and_every_circle_is_found(planted, wrong):
    assert violations(SMALL | planted) == wrong


# ---- who may import whom


def test_the_package_keeps_its_floors_and_has_no_circle():
    assert violations(SOURCES) == []


def test_ops_are_called_through_functional():
    """Above it, only the ops' helpers are imported from where they lie."""
    ops = {m for m in GRAPH["functional"] if m.startswith("ops.")}
    assert "ops.quantize" in ops
    assert not [m for m in GRAPH if m.split(".")[0] not in ("ops", "functional") and GRAPH[m] & ops]


def test_no_argument_list_is_longer_than_12():
    """Except public functions, schemas and fakes, kernels: a long list is the sign of a missing noun."""
    for path, text in [*texts(PACKAGE, "*.py").items(), *texts(ROOT / "bench", "*.py").items()]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                decorators = " ".join(map(ast.unparse, node.decorator_list))
                entry = re.search("custom_op|list_op|register_fake|jit", decorators)
                public = node.name in fk.__all__ or node.name == "__init__"
                assert count <= 12 or entry or public, f"{path}: {node.name}"


def test_ops_name_no_backend():
    """They take what select() gives, for a name that the caller chose."""
    for module in (m for m in SOURCES if m.startswith("ops.")):
        used = {n for n in imports(SOURCES[module], module) if n.startswith("fogzo_kernels.backends.")}
        allowed = {"Backend", "check_name", "select", "Held", "generations", "native"}
        assert {n.rsplit(".", 1)[1] for n in used} <= allowed, module
        assert not re.search(r"\bselect\(\s*[\"']", SOURCES[module]), module


@pytest.mark.parametrize("name", backends.OWN)
def test_a_backend_imports_torch_its_language_and_what_backends_share(name):
    """Neither another backend nor how one is selected."""
    mine = [m for m in SOURCES if f"{m}.".startswith(f"backends.{name}.")]
    assert mine
    known = {"torch", "fogzo_kernels", *sys.stdlib_module_names, *OWN[name]}
    for module in mine:
        inside = {m for m in GRAPH[module] - set(mine) if m.split(".")[0] == "backends"}
        assert not {m for m in inside if m.split(".")[1] in (*OWN, "__init__")}, module
        assert GRAPH[module] & COMPILED <= OWN[name], module
        assert {n.split(".")[0] for n in imports(SOURCES[module], module)} <= known, module


def test_nobody_imports_the_reference():
    """It is the specification: code that leans on it would agree with it by construction."""
    assert not [m for m in GRAPH if "backends.reference" in GRAPH[m]]


# ---- what an import loads


def loaded(statement):
    """Modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "FOGZO_BACKEND"}
    command, options = [sys.executable, "-c", code], {"cwd": ROOT, "env": environment, "text": True}
    return set(subprocess.run(command, capture_output=True, check=True, **options).stdout.split())


def test_import_loads_no_backend_and_use_loads_one():
    imported = loaded("import fogzo_kernels")
    assert "fogzo_kernels.ops.perturb" in imported
    others = [*COMPILED, *(f"backends.{name}" for name in backends.OWN)]
    assert not {"transformers", *(f"fogzo_kernels.{name}" for name in others)} & imported
    slow = {"triton", "sympy", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"}
    assert not slow & imported - loaded("import torch")  # a release of PyTorch may import it itself
    used = loaded("import fogzo_kernels as fk; fk.noise(1, 'uniform', seed=1, backend='cpu')")
    assert "fogzo_kernels._C" in used
    assert not {"fogzo_kernels.backends.triton", "fogzo_kernels.backends.cuda", "fogzo_kernels._cuda"} & used
    assert "fogzo_kernels.backends.reference" not in used


# ---- C++


def includes(text):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', text, re.MULTILINE)


def include_graph(files):
    """The files that each file includes; of texts by path."""
    edges = {}
    for path, text in files.items():
        places = [posixpath.join(posixpath.dirname(path), name) for name in includes(text)]
        edges[path] = {posixpath.normpath(place) for place in places} & files.keys()
    return edges


def declared_ahead(files):
    """Functions that a header declares and another header of its folder defines, if it has no includes.

    Such a header is pasted into a kernel's file: what it declares comes after it there, and needs it.
    """
    function = r"^(?! |return |using |typedef )[\w:<>,&* ]*[ &*](\w+)\([^;{}()]*\)\s*(;|\{|noexcept\s*\{)"
    headers = {p: re.sub("//.*", "", text) for p, text in files.items() if p.endswith((".h", ".cuh"))}
    functions = {p: re.findall(function, text, re.MULTILINE) for p, text in headers.items()}
    declared = {p: {name for name, end in functions[p] if end == ";"} for p in functions}
    defined = {p: {name for name, end in functions[p] if end != ";"} for p in functions}
    pairs = [(p, q) for p, q in itertools.permutations(headers, 2) if Path(p).parent == Path(q).parent]
    pairs = [(p, q) for p, q in pairs if not includes(files[p])]
    ahead = [(p, name, q) for p, q in pairs for name in declared[p] & defined[q] - defined[p]]
    return sorted(f"{path} declares {name} of {other}" for path, name, other in ahead)


def test_a_circle_of_headers_is_found_by_includes_and_by_what_they_declare():
    files = {"d/a.h": '#include "../b.h"', "b.h": '# include "d/c.h"', "d/c.h": '#include "a.h"'}
    assert circles(include_graph(files | {"e.h": '#include "b.h"'})) == [("b.h", "d/a.h", "d/c.h")]
    ahead, later = "int f(int x,\n      int y); // below", "template <class T>\nint f(int x, int y) {\n}"
    assert declared_ahead({"d/a.h": ahead, "d/b.h": later}) == ["d/a.h declares f of d/b.h"]


def test_headers_have_no_circle():
    assert "element.h" in include_graph(CSRC)["cpu/kernels.h"]
    assert circles(include_graph(CSRC)) == []
    assert declared_ahead(CSRC) == []


def test_csrc_includes_itself_and_named_libraries():
    """CUDA's part includes no torch, so that one build serves every release; nothing includes the tests."""
    libraries = {
        "module.cpp": "pybind11/",
        "cuda/module.cpp": "pybind11/",
        "cuda": "cuda_runtime.h",
        "cpu": "torch/ immintrin.h cpuid.h",
    }
    for path, text in CSRC.items():
        allowed = tuple(libraries.get(path, libraries.get(posixpath.dirname(path), "")).split())
        names = [name for name in includes(text) if "." in name and not name.startswith(allowed)]
        assert not [name for name in names if not (ROOT / "csrc" / path).parent.joinpath(name).exists()], path


def test_headers_include_their_own_folder_and_the_contract():
    """The contract's, at the top, know no device, and no device knows another."""
    for path, others in include_graph(CSRC).items():
        folders = {posixpath.dirname(other) for other in others} - {"", posixpath.dirname(path)}
        assert not folders or path == "module.cpp", path


def test_instruction_sets_are_turned_on_after_all_includes_from_outside():
    """Or the linker may take a shared inline function that not every processor can run."""
    for name in ("avx2", "avx512"):
        before, after = CSRC[f"cpu/{name}.cpp"].split("#pragma GCC target", 1)
        reached = closure(include_graph(CSRC | {"cpu/before": before, "cpu/after": after}))
        late = {"cpu/after": after} | {h: CSRC[h] for h in reached["cpu/after"] - reached["cpu/before"]}
        assert "cpu/tiles.h" in late
        for path, text in late.items():
            folder = (ROOT / "csrc" / path).parent
            assert all((folder / included).exists() for included in includes(text)), path
            assert "namespace fogzo" not in text or "namespace {" in text or path == "cpu/after", path


def test_constants_of_the_cpu_are_named_once():
    """One in the kernels' unnamed namespace would hide that of kernels.h, which sizes what they are given."""
    headers = [text for path, text in CSRC.items() if path.endswith(".h") and not path.startswith("cuda")]
    pattern = re.compile(r"^constexpr [\w: ]+ (k\w+)\b", re.MULTILINE)
    declared = [name for text in headers for name in set(pattern.findall(text))]
    assert declared
    assert sorted(declared) == sorted(set(declared))


# ---- size and words


def test_no_file_is_longer_than_450_lines():
    folders = ("fogzo_kernels", "csrc", "python_tests", "bench")
    files = [*ROOT.glob("*.py"), *(p for folder in folders for p in (ROOT / folder).rglob("*.*"))]
    sources = [p for p in files if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    assert {".py", ".cpp", ".h"} <= {p.suffix for p in sources}
    assert not [str(p) for p in sources if len(p.read_text().splitlines()) > 450]


@pytest.mark.parametrize("name", fk.__all__)
def test_public_name_has_a_docstring(name):
    thing = getattr(fk, name)
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert own
    assert not own.startswith(f"{name}(")  # what a dataclass without one makes up


def test_all_names_what_is_public():
    for name, module in (("functional", fk.functional), ("__init__", fk)):
        inside = [n for n in imports(SOURCES[name], name) if n.startswith("fogzo_kernels.")]
        imported = {n.rsplit(".", 1)[1] for n in inside}
        if name == "__init__":
            imported = imported - {"functional", "*", "export"} | set(fk.functional.__all__)
        assert sorted(imported) == sorted(module.__all__)
