"""The texts of errors and warnings, read from the source of the package."""

import ast
import re
from pathlib import Path

import fogzo_kernels

PACKAGE = Path(fogzo_kernels.__file__).parent
GAP = "..."  # stands for what a message fills in
GAPS = re.compile(r"\.{4,}")  # some that adjoin, or a gap beside a full stop or a range


def messages(kind=None, under=""):
    """Yield file and text of each message in a part of the package.

    Args:
        kind: ``"warning"``, the name of an exception, or None for all, with texts of names and functions.
        under: how the file's path in the package begins.
    """
    files = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    constants = {name: node for tree in files.values() for name, node in _constants(tree)}
    for path, tree in files.items():
        where = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(tree) if where.startswith(under) else ():
            argument = _argument(node, kind)
            for text in () if argument is None else _texts(argument, constants | dict(_constants(tree))):
                yield where, GAPS.sub(GAP, text)


def _constants(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _argument(node, kind):
    """What makes the message of an exception or of ``warnings.warn``, or any text that a name has or a
    function returns."""
    if isinstance(node, ast.Return | ast.Assign) and kind is None:
        return node.value
    if not (isinstance(node, ast.Call) and node.args):
        return None
    called = {"warnings.warn": "warning"}.get(name := ast.unparse(node.func), name)
    known = called == "warning" or called.endswith("Error")
    return node.args[0] if known and kind in (None, called) else None


def _texts(node, constants):
    """Every text that an expression may give, with a gap for each part that is not constant."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), ast.Constant | ast.JoinedStr):
        return _texts(constants[node.id], constants)
    if isinstance(node, ast.FormattedValue):
        plain = isinstance(node.value, ast.Name) and node.conversion < 0 and node.format_spec is None
        return _texts(node.value, constants) if plain else [GAP]
    if isinstance(node, ast.JoinedStr):
        return _joined([_texts(value, constants) for value in node.values])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([_texts(node.left, constants), _texts(node.right, constants)])
    if isinstance(node, ast.IfExp):
        return _texts(node.body, constants) + _texts(node.orelse, constants)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return [text.replace("{}", GAP) for text in _texts(node.func.value, constants)]
    return [GAP]


def _joined(parts):
    texts = [""]
    for part in parts:
        texts = [text + more for text in texts for more in part]
    return texts
