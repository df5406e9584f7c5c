"""Who may import whom, and other rules that keep the project small; an import walk holds them."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import fogzo_kernels as fk
from fogzo_kernels import backends

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fogzo_kernels"
# Floors, bottom first: what each may import of the floors below it, and its own modules, bottom first: a module
# imports of its floor what stands before it. A new module is given its place here.
FLOORS = {
    "spec": ((), "dtypes noise grid straight_through scale hadamard quantizer presets update schedule call"),
    "backends": (("spec",), "__init__ plans cells reference cpu cuda triton"),
    "ops": (("spec", "backends"), "__init__ checks listop memory transforms arguments alphas noise norm perturb"
            " estimate tail straight_through learned quantize hadamard"),
    "functional": (("spec", "ops"), ""),
    "nn": (("spec", "backends", "ops.checks", "ops.memory", "ops.transforms", "functional"),
           "__init__ packed saved scales sharded stale parallel inputs held quantized permuted linear"
           " products conv embedding transposed twins replaced rules sharing fast_path pretrained report"
           " convert"),
    "distributed": (("spec", "functional", "nn"), "packing fsdp tensor_parallel group __init__"),
    "train": (("spec", "backends", "ops.checks", "ops.arguments", "functional", "nn", "distributed"),
              "__init__ guards guards.uncompiled guards.derivatives guards.fingerprints replay guards.lost"
              " guards.gradients guards.graph_reads guards.unmoved_alphas losses settings device stats"
              " calls run step guards.closure fogzo"),
    "optim": (("spec", "ops.checks", "ops.arguments", "functional", "nn", "train"),
              "__init__ groups memory scaling fused adamw sgd"),
    "integrations": (("spec", "nn", "train"), "__init__ transformers trainer lightning"),
    "export": (("spec", "ops.checks", "functional", "nn", "distributed.packing", "integrations.transformers"),
               "files integers ao plain compressed llama __init__ __main__"),
    "__init__": (("spec", "backends", "functional", "nn", "train", "optim", "export"), ""),
    "info": (("__init__", "backends", "_C", "_cuda"), ""),
}  # fmt: skip
#: Of the Triton backend, bottom first.
ORDER_OF_TRITON = (
    "elements tables launch losses noise norm measure hadamard perturb estimate tail quantize learned __init__"
)
TRITON = ORDER_OF_TRITON.split()
#: What a backend may import of the package.
BACKENDS_MAY_IMPORT = ("spec", "backends.plans", "backends.cells")
# The language or compiled module of each backend, beside torch and the standard library.
OWN = {
    "reference": set(), "cpu": {"fogzo_kernels._C"}, "triton": {"triton"}, "cuda": {"fogzo_kernels._cuda"},
}  # fmt: skip
COMPILED = ("_C", "_cuda")


# ---- the walk


def imports(source, module, is_package=False):
    """Absolute names that a module imports, anywhere in it; ``from x import y`` gives x.y."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def imports_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    return imports(path.read_text(), module, is_package)


def modules_of(names):
    """The package's modules among those names, or that hold them; without its prefix."""
    return {module_of(n.split(".")[1:]) for n in names if n.split(".")[0] == "fogzo_kernels"}


def module_of(parts):
    name = ".".join(parts)
    if not parts:
        return "__init__"
    return name if name in COMPILED or file_of(name).exists() else module_of(parts[:-1])


def file_of(name):
    path = PACKAGE / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def files_of_backend(name):
    path = PACKAGE / "backends" / name
    return paths(path, "*.py") if path.is_dir() else [path.with_suffix(".py")]


def paths(folder, pattern):
    """Files anywhere below the folder; there is one."""
    found = sorted(folder.rglob(pattern))
    assert found, f"no {pattern} in {folder}"
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import triton.language as tl", "triton.language"),
        ("from torch import Tensor", "torch.Tensor"),
        ("from . import reference", "fogzo_kernels.backends.reference"),
        ("from .reference import fma", "fogzo_kernels.backends.reference.fma"),
        ("from .. import _C", "fogzo_kernels._C"),
        ("from ..nn import QuantLinear", "fogzo_kernels.nn.QuantLinear"),
        ("def f():\n    from .. import nn", "fogzo_kernels.nn"),
        ("if True:\n    import fogzo_kernels.nn", "fogzo_kernels.nn"),
        ("importlib.import_module('triton')", "triton"),
        ("__import__('triton')", "triton"),
    ],
)
def test_the_walk_sees_every_form(source, expected):
    assert expected in imports(source, "fogzo_kernels.backends.cpu")
    assert expected in imports(source, "fogzo_kernels.backends", is_package=True)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("fogzo_kernels", "__init__"),
        ("fogzo_kernels.Fogzo", "__init__"),
        ("fogzo_kernels.nn.linear.QuantLinear", "nn.linear"),
        ("fogzo_kernels.backends.select", "backends"),
        ("fogzo_kernels.backends.cpu.flat", "backends.cpu"),
        ("fogzo_kernels._C", "_C"),
    ],
)
def test_the_walk_finds_the_module_of_a_name(name, module):
    assert modules_of({name, "torch.nn"}) == {module}


# ---- who may import whom


def allowed(floor):
    """What the modules of a floor may import, by their names."""
    may, own = FLOORS[floor]
    modules = [m if m != "__init__" else floor for m in own.split()] or [floor]
    named = [m if m == floor else f"{floor}.{m}" for m in modules]
    return {name: (*may, *named[:i]) for i, name in enumerate(named)}


MAY_IMPORT = {name: may for floor in FLOORS for name, may in allowed(floor).items()}


def outside(found, may):
    """Of the modules, those that are neither allowed nor lie in a package that is."""
    return {m for m in found if not any(f"{m}.".startswith(f"{one}.") for one in may)}


def test_floors_import_only_lower_ones():
    below = {"_C", "_cuda"}
    for floor, (may, _) in FLOORS.items():
        assert {m.split(".")[0] for m in may} <= below, floor
        below.add(floor)


def test_every_module_has_its_place():
    found = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    found = {name.removesuffix(".__init__") for name in found if not name.startswith("backends.triton.")}
    assert found - {"spec", "backends.triton"} == set(MAY_IMPORT) - {"backends.triton"}


@pytest.mark.parametrize("name", [name for name in MAY_IMPORT if not name.startswith("backends.")])
def test_module_imports_only_what_it_may(name):
    assert not outside(modules_of(imports_of(file_of(name))), MAY_IMPORT[name])


def test_triton_is_built_from_the_bottom():
    assert {p.stem for p in (PACKAGE / "backends/triton").glob("*.py")} == set(TRITON)
    for i, name in enumerate(TRITON):
        found = modules_of(imports_of(PACKAGE / f"backends/triton/{name}.py"))
        own = {m.removeprefix("backends.triton.") for m in found if m.startswith("backends.triton.")}
        assert own <= set(TRITON[:i]), name


def test_no_argument_list_is_longer_than_12():
    """Except public functions, schemas and fakes, kernels: a long list is the sign of a missing noun."""
    found = {}
    for path in paths(PACKAGE, "*.py") + paths(ROOT / "bench", "*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                entry = any(
                    word in ast.unparse(d)
                    for d in node.decorator_list
                    for word in ("custom_op", "list_op", "register_fake", "jit")
                )
                public = node.name in fk.__all__ or node.name == "__init__"
                if count > 12 and not entry and not public:
                    found[f"{path.relative_to(ROOT)}:{node.name}"] = count
    assert not found


def test_ops_name_no_backend():
    """They take what select() gives, for a name that the caller chose."""
    for path in paths(PACKAGE / "ops", "*.py"):
        tree = ast.parse(path.read_text())
        used = {n.rsplit(".", 1)[1] for n in imports_of(path) if n.startswith("fogzo_kernels.backends.")}
        assert used <= {"Backend", "check_name", "select"}, path
        chosen = [
            n.args[0] for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "select"
        ]
        assert not [name for name in chosen if isinstance(name, ast.Constant)], path


@pytest.mark.parametrize("name", OWN)
def test_backend_imports_torch_its_language_and_the_constants(name):
    known = {"torch", *sys.stdlib_module_names}
    for path in files_of_backend(name):
        found = imports_of(path)
        inside = modules_of(found)
        own = {m for m in inside if f"{m}.".startswith(f"backends.{name}.")}
        compiled = {m.removeprefix("fogzo_kernels.") for m in OWN[name]}
        assert not outside(inside - own, (*BACKENDS_MAY_IMPORT, *compiled)), path
        others = {m.split(".")[0] for m in found} - {"fogzo_kernels"}
        assert others <= known | OWN[name], path


def test_every_backend_is_known():
    assert set(FLOORS["backends"][1].split()) - {"__init__", "plans", "cells"} == set(backends.OWN) == set(OWN)


def test_nobody_imports_the_reference():
    """It is the specification: code that leans on it would agree with it by construction."""
    for path in paths(PACKAGE, "*.py"):
        assert "backends.reference" not in modules_of(imports_of(path)), path


# ---- what an import loads


def loaded(statement):
    """Modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "FOGZO_BACKEND"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_loads_no_backend_and_use_loads_one():
    found = loaded("import fogzo_kernels")
    assert "fogzo_kernels.ops.perturb" in found
    assert "transformers" not in found
    assert not {f"fogzo_kernels.{name}" for name in COMPILED} & found
    assert not {f"fogzo_kernels.backends.{name}" for name in backends.OWN} & found
    if "triton" not in loaded("import torch"):  # a release of PyTorch may import it itself
        assert "triton" not in found
    used = loaded("import fogzo_kernels as fk; fk.noise(1, 'uniform', seed=1, backend='cpu')")
    assert "fogzo_kernels._C" in used
    assert not {"fogzo_kernels.backends.triton", "fogzo_kernels.backends.cuda", "fogzo_kernels._cuda"} & used
    assert "fogzo_kernels.backends.reference" not in used


# ---- C++


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)


def test_headers_of_the_contract_include_no_torch():
    """Only C++'s own headers, which have no suffix: any compiler and device can use them."""
    for name, own in (
        ("names.h", set()), ("philox.h", {"names.h"}), ("element.h", {"elementary.h"}),
        ("elementary.h", {"philox.h", "elementary_body.h"}), ("checks.h", set()),
    ):  # fmt: skip
        found = includes(ROOT / "csrc" / name)
        assert own <= set(found)
        assert not [h for h in found if h not in own and ("." in h or "/" in h)]
    assert includes(ROOT / "csrc/elementary_body.h") == []


def test_instruction_sets_are_turned_on_after_all_includes_from_outside():
    """Or the linker may take a shared inline function that not every processor can run."""
    own = ["../elementary_body.h", "vectors.h", "tiles.h", "cells.h", "hadamard.h", "learned.h", "fused.h",
           "estimate_fused.h", "quantize_fused.h", "learned_fused.h", "rotated.h"]  # fmt: skip
    for name in ("avx2", "avx512"):
        text = (ROOT / f"csrc/cpu/{name}.cpp").read_text()
        before, after = text.split("#pragma GCC target", 1)
        assert re.findall(r'#include ["<](.*?)[">]', before) == ["outside.h"]
        assert re.findall(r'#include ["<](.*?)[">]', after) == own
    for name in own[1:]:
        assert includes(ROOT / "csrc/cpu" / name) == []


def test_constants_of_the_cpu_are_named_once():
    """One in the kernels' unnamed namespace would hide that of kernels.h, which sizes what they are given."""
    declared = [
        name
        for path in [*(ROOT / "csrc").glob("*.h"), *paths(ROOT / "csrc/cpu", "*.h")]
        for name in re.findall(r"^constexpr [\w: ]+ (k\w+)\b", path.read_text(), re.MULTILINE)
    ]
    assert "kBlock" in declared
    assert [name for name, count in Counter(declared).items() if count > 1] == []


def test_devices_do_not_include_each_other():
    for path in paths(ROOT / "csrc", "c*/*"):
        other = {"cpu": "cuda", "cuda": "cpu"}[path.parent.name]
        assert not [h for h in includes(path) if f"{other}/" in h], path


def test_cuda_includes_no_torch():
    """One build serves every release; only hardware.cuh knows CUDA's headers, only module.cpp pybind11."""
    for path in paths(ROOT / "csrc/cuda", "*.*"):
        outside = {h for h in includes(path) if ("." in h or "/" in h) and not (path.parent / h).exists()}
        own = {
            "hardware.cuh": {"cuda_runtime.h", "on_host.h"}, "launch.cuh": {"on_host_launch.h"},
            "module.cpp": {"pybind11/pybind11.h", "pybind11/stl.h"},
        }  # fmt: skip
        assert outside <= own.get(path.name, set()), path


# ---- size and words


def test_no_file_is_longer_than_450_lines():
    folders = (PACKAGE, ROOT / "csrc", ROOT / "python_tests", ROOT / "bench")
    paths = [p for folder in folders for p in folder.rglob("*.*")] + list(ROOT.glob("*.py"))
    sources = [p for p in paths if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    assert {".py", ".cpp", ".h"} <= {p.suffix for p in sources}
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources}
    assert not {path: n for path, n in lengths.items() if n > 450}


@pytest.mark.parametrize("name", fk.__all__)
def test_public_name_has_a_docstring(name):
    thing = getattr(fk, name)
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert own
    assert not own.startswith(f"{name}(")  # what a dataclass without one makes up


def test_all_names_what_is_public():
    for name, module in (("functional", fk.functional), ("__init__", fk)):
        imported = {n.rsplit(".", 1)[1] for n in imports_of(file_of(name)) if n.startswith("fogzo_kernels.")}
        if name == "__init__":
            imported = imported - {"functional", "*", "export"} | set(fk.functional.__all__)
        assert imported == set(module.__all__)
        assert len(module.__all__) == len(set(module.__all__))
