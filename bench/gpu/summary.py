"""Writes summary.md: each stage's outcome, and all results so far."""

from __future__ import annotations

import json
from typing import Any

from .session import Session
from .tools import METRICS, profiles

Row = dict[str, Any]
#: What makes two rows of backends comparable.
ALIKE = ("op", "latent", "grad", "out", "distribution", "tensors", "elements", "scale_length", "block")
REHEARSAL = "**A dry run on the CPU: its times say nothing.**"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return [*lines, *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)]


def loaded(session: Session, name: str) -> dict[str, Any]:
    path = session.results / name
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {"rows": [], "failed": []}
    return found


def short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def of_kernels(session: Session) -> list[str]:
    """Time and share of a copy's speed by backend, beside each other."""
    found = loaded(session, "kernels.json")
    by_case: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in found["rows"]:
        by_case.setdefault(tuple(row[name] for name in ALIKE), {})[row["backend"]] = row
    backends = list(dict.fromkeys(row["backend"] for row in found["rows"]))
    heads = ["op", "latent/grad/out", "noise", "tensors", "elements", "scale"]
    heads += [f"{name}: us, share of copy" for name in backends] + ["eager, compile: times as slow"]
    rows = []
    for case, of_backends in by_case.items():
        op, *dtypes, noise, tensors, elements, scale, _ = case
        power = f"2^{elements.bit_length() - 1}" if elements & (elements - 1) == 0 else str(elements)
        cells = [op, "/".join(map(short, dtypes)), noise, str(tensors), power, str(scale or "")]
        for name in backends:
            row = of_backends.get(name)
            cells.append(f"{1e6 * row['median_s']:.1f}, {row['share_of_copy']:.3f}" if row else "")
        ratios = [
            f"{row[f'ratio_{kind}']:.1f}"
            for kind in ("eager", "compile")
            for row in of_backends.values()
            if f"ratio_{kind}" in row
        ]
        rows.append([*cells, ", ".join(ratios)])
    lines = table(heads, rows) if rows else []
    lines += [""] * bool(lines)
    lines += [
        f"- failed: {one['backend']} {one['kind']} {one['op']} {one['dtypes']} {one['distribution']},"
        f" {one['tensors']} tensors of {one['elements']}: {one['reason']}"
        for one in found["failed"]
    ]
    return lines


def of_steps(session: Session) -> list[str]:
    found = loaded(session, "step.json")
    rows = [
        [row["method"], f"{1e3 * row['median_s']:.2f}", f"{row['of_float']:.3f}",
         f"{row['rest_of_float']:.3f}", str(row["launches"] or ""), f"{(row['peak_bytes'] or 0) / 1e6:.0f}"]
        for row in found["rows"]
    ]  # fmt: skip
    heads = ["method", "ms a step", "of a float step", "rest, of a float step", "launches", "peak MB"]
    lines = table(heads, rows) if rows else []
    return [*lines, *(f"- failed: {one['method']}: {one['reason']}" for one in found["failed"])]


def of_ops(session: Session) -> list[str]:
    """Calls that differ from the reference, or failed, with what differs."""
    lines = []
    for name, text in list(session.texts.items()):
        if name.startswith("ops "):
            wanted = [line for line in text.splitlines() if line.startswith(("differs:", "failed:", "  "))]
            lines += [f"- {name[4:]} {line}" if line[0] != " " else f"  {line}" for line in wanted[:200]]
    return lines


def summary(session: Session) -> str:
    facts = session.facts
    name = "Dry run on the CPU" if session.dry else facts.get("device", "No device yet")
    lines = [f"# {name}", ""]
    if facts:
        keys = ("commit", "sources", "date", "python", "torch", "triton", "cuda")
        lines += [", ".join(f"{key} {facts[key]}" for key in keys if facts.get(key)) + ".", ""]
        if not session.dry:
            speeds = "A copy moves {copy_gb_per_s:.0f} GB/s, a triad {triad_gb_per_s:.0f}.".format(**facts)
            lines += [speeds, ""]
        lines += [", ".join(f"{tool}: {said}" for tool, said in facts["tools"].items()) + ".", ""]
    lines += [REHEARSAL, ""] * session.dry
    states = [[o.stage, o.state, f"{o.seconds:.1f}", o.note] for o in session.outcomes]
    lines += table(["stage", "outcome", "seconds", "note"], states)
    spent = f"{session.budget - session.left():.0f} s of {session.budget:.0f}"
    lines += ["", f"{spent}: {session.under_way or 'nothing'} is under way.", ""]
    profiled = [
        [kernel, *(metrics.get(one, "") for one in METRICS)]
        for kernel, metrics in profiles(session.texts.get("ncu", ""))
    ]
    for title, body in (
        ("Ops that differ from the reference", of_ops(session)),
        ("Kernels", of_kernels(session)),
        ("Steps", of_steps(session)),
        ("Host time of a step", session.texts.get("host", "").splitlines()),
        ("Profiles", table(["kernel", *METRICS], profiled) if profiled else []),
        ("Tests that failed", [f"- {test}" for test in session.texts.get("tests", "").splitlines()]),
        ("Versions", ["```", session.info.strip(), "```"] if session.info else []),
    ):
        if body:
            lines += [f"## {title}", "", *body, ""]
    return "\n".join(lines)
