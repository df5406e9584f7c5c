"""Write the tables of the documents from result files: no number there is typed.

A table stands between ``<!-- report: NAME -->`` and ``<!-- end of report -->``, with the machine, versions,
commit and date of its file. ``--check`` writes nothing, and fails where a document is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .evidence import ablation, differences, explanation, mlp, peers
from .executed import pipes_table, sectors_table
from .step import __main__ as step
from .step.measure import Row
from .step.report import PAIRS

ROOT = Path(__file__).parents[1]
RESULTS = "bench/results/epyc-2-cores"
ON_XEON = "bench/results/xeon-2-cores"
EXECUTED = "bench/results/executed.json"
ABLATION, ABLATION_AGAIN = (f"{ON_XEON}/{name}.json" for name in ("ablation", "ablation-again"))
BEGIN, END = "<!-- report: {} -->", "<!-- end of report -->"
Found = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A table: in which document, of which result files, and how it is made of them."""

    document: str
    files: tuple[str, ...]
    table: Callable[..., str]


def provenance(section: Section, found: list[Found]) -> str:
    """A line for each file, linked from where the document lies."""
    up = "../" * section.document.count("/")
    lines = []
    for name, one in zip(section.files, found, strict=True):
        m = one["machine"]
        threads = f", {m['threads']} thread{'s' * (m['threads'] > 1)}" if "threads" in m else ""
        threads += f", {m['kernels']} kernels" if "kernels" in m else ""
        when = f"{origin(m)}, {m['date']}" if "commit" in m else "before commits were noted"
        lines.append(
            f"[{Path(name).name}]({up}{name}): {m['device']}{threads}, Python {m['python']}, PyTorch"
            f" {m['torch']}; {when}"
        )
    return "\n".join(f"{line}." for line in lines)


def origin(machine: dict[str, Any]) -> str:
    """The commit, or where git was not at hand the hash of the sources (bench/machine.py)."""
    if machine["commit"] == "unknown" and "sources" in machine:
        return f"sources {machine['sources']}"
    return f"commit {machine['commit']}"


# ---- tables


def of_mlp(found: Found, sentences: slice = slice(None)) -> str:
    results = [
        mlp.Result(**{**one, "job": mlp.Job(**{k: v for k, v in one["job"].items() if k != "label"})})
        for one in found["runs"]
    ]
    said = "\n".join(f"- {line}" for line in mlp.words(results).splitlines()[sentences])
    return f"{mlp.table(results)}\n\n{said}"


def of_demo(found: Found) -> str:
    """Guided noise and FOGZO against STE."""
    return of_mlp(found, slice(3))


def of_ablation(table: Callable[[differences.Found], str]) -> Callable[[Found], str]:
    """What makes one of its tables of a file."""
    return lambda found: table(differences.Found(ablation.results_of(found)))


def of_explanation(found: Found) -> str:
    return explanation.table(ablation.explained_of(found))


def of_steps(*found: Found) -> str:
    """Ratios to the first method's time, a column for each setting; memory and bytes in the first setting."""
    columns: dict[str, dict[str, Found]] = {}
    for one in found:
        threads = one["machine"]["threads"]
        for row in one["rows"]:
            setting = [f"{name.replace('_', '-')} {row[name]}" for name in step.AXES if name in row]
            head = ", ".join([f"{threads} thread{'s' * (threads > 1)}", *setting])
            columns.setdefault(head, {})[row["method"]] = row
    first = next(iter(columns.values()))
    base = next(iter(first))
    heads = [f"{head}: of {base}" for head in columns]
    lines = [f"| | {' | '.join(heads)} | peak MB | calls | MB by ops |", "|---" * (4 + len(heads)) + "|"]

    def ratio(rows: dict[str, Found], one: str, other: str) -> str:
        if not {one, other} <= rows.keys():
            return ""
        return f"{Row(one, rows[one]['seconds']).against(Row(other, rows[other]['seconds'])):.2f}"

    for method, row in first.items():
        ours = ["", ""]  # others call no ops of this package
        if row["bytes"] is not None:
            ours = [f"{row['calls']:g}", f"{(row['bytes'] + row['bytes_in_passes']) / 1e6:.1f}"]
        times, peak = [ratio(rows, method, base) for rows in columns.values()], row["peak_bytes"]
        lines.append(f"| {' | '.join([method, *times, f'{peak / 1e6:.1f}', *ours])} |")
    for one, other in PAIRS:
        times = [ratio(rows, one, other) for rows in columns.values()]
        if any(times):
            lines.append(f"| {' | '.join([f'{one}, of {other}', *times])} | | | |")
    return "\n".join(lines)


#: Ops of the benchmark, as tables have them.
OPS = {
    "perturb": "perturb", "estimate": "estimate, n = 1", "quantize": "Q", "sgd": "estimate, SGD",
    "adamw": "estimate, AdamW", "learned": "LSQ, backward", "measure": "rms",
}  # fmt: skip
LATENTS = ("float32", "bfloat16")


def case_of(row: Found) -> tuple[str, str, int, int, str]:
    """Op, noise, scale and block, and dtype of its tensors."""
    dtype = row["latent"] if row["latent"] in LATENTS else row["grad"]  # the estimate has no latents
    return row["op"], row["distribution"], row["scale_length"], row["block"], dtype


def name_of(op: str, noise: str, scale: int, block: int) -> str:
    parts = [OPS[op], "" if noise == "none" else noise, f"H {block}" if block else ""]
    return ", ".join(filter(None, [*parts, f"a scale for every {scale}" if scale else ""]))


def of_kernels(*found: Found) -> str:
    """Shares of the triad, a column for each file and dtype."""
    heads = [f"{one['machine']['kernels']}, {dtype}" for one in found for dtype in LATENTS]
    lines = [f"| share of triad | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    by_case = [{case_of(row): row["share_of_triad"] for row in one["rows"]} for one in found]
    for case in dict.fromkeys(case_of(row)[:4] for row in found[0]["rows"]):
        shares = [rows.get((*case, dtype)) for rows in by_case for dtype in LATENTS]
        cells = ["" if share is None else f"{share:.2f}" for share in shares]
        lines.append(f"| {' | '.join([name_of(*case), *cells])} |")
    return "\n".join(lines)


def of_baselines(found: Found) -> str:
    """Shares of the triad, and times as fast as what users write without this package."""
    lines = [
        "| share of triad; times as fast as eager, in place, compiled | float32 | bfloat16 |",
        "|---|---|---|",
    ]
    by_case = {case_of(row): row for row in found["rows"]}
    for case in dict.fromkeys(case[:4] for case in by_case):
        rows = [by_case[(*case, dtype)] for dtype in LATENTS]
        cells = [
            f"{r['share_of_triad']:.2f}; "
            + ", ".join(f"{r[f'ratio_{kind}']:.0f}x" for kind in ("eager", "loop", "compile"))
            for r in rows
        ]
        lines.append(f"| {' | '.join([name_of(*case), *cells])} |")
    return "\n".join(lines)


def of_products(values: Found, codes: Found) -> str:
    """Times of the same steps with products of values and of int8 codes."""
    lines = ["| | values, ms | int8 codes, ms | times as fast |", "|---|---|---|---|"]
    by_method = {row["method"]: row for row in codes["rows"]}
    for row in values["rows"]:
        a, b = 1e3 * row["median_s"], 1e3 * by_method[row["method"]]["median_s"]
        lines.append(f"| {row['method']} | {a:.0f} | {b:.0f} | {a / b:.2f} |")
    return "\n".join(lines)


def of_peers(found: Found) -> str:
    return peers.table(found["rows"])


def of_pipes(found: Found) -> str:
    return pipes_table(found["rows"])


def of_sectors(found: Found) -> str:
    return sectors_table(found["rows"])


SECTIONS = {
    "steps": Section(
        "docs/performance.md", (f"{ON_XEON}/step.json", f"{ON_XEON}/step-1-thread.json"), of_steps
    ),
    "products": Section(
        "docs/performance.md", (f"{RESULTS}/step-values.json", f"{RESULTS}/step-codes.json"), of_products
    ),
    "peers": Section("docs/evidence.md", (f"{RESULTS}/peers.json",), of_peers),
    "baselines": Section("docs/performance.md", (f"{RESULTS}/perturb.json",), of_baselines),
    "kernels": Section(
        "docs/performance.md", (f"{RESULTS}/kernels.json", f"{RESULTS}/kernels-avx2.json"), of_kernels
    ),
    "quantizers": Section("docs/performance.md", (f"{RESULTS}/quantizers.json",), of_kernels),
    "executed": Section("docs/performance.md", (EXECUTED,), of_pipes),
    "sectors": Section("docs/performance.md", (EXECUTED,), of_sectors),
    "mnist": Section("docs/evidence.md", (f"{ON_XEON}/mnist.json",), of_demo),
    "mnist-thousands": Section("docs/evidence.md", (f"{RESULTS}/mnist-thousands.json",), of_mlp),
    **{
        f"ablation-{name}": Section("docs/evidence.md", (ABLATION,), of_ablation(table))
        for name, table in (
            ("counts", differences.counts_of),
            ("steps", differences.at_equal_steps),
            ("time", differences.at_equal_time),
            ("losses", differences.losses_of),
            ("others", differences.others_of),
            ("rates", differences.rates_of),
        )
    },
    "ablation-again": Section("docs/evidence.md", (ABLATION_AGAIN,), of_ablation(differences.at_equal_steps)),
    "explanation": Section("docs/evidence.md", (ABLATION,), of_explanation),
}


# ---- documents


def rendered(text: str, name: str, body: str) -> str:
    """The document with this body in its place.

    Raises:
        ValueError: it has no such place, or two.
    """
    begin = BEGIN.format(name)
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"a document must have one place {begin} ... {END}, got {len(pattern.findall(text))}")
    return pattern.sub(lambda _: f"{begin}\n{body}\n{END}", text)


def documents(root: Path = ROOT) -> dict[Path, str]:
    """What each document is to say."""
    texts: dict[Path, str] = {}
    for name, section in SECTIONS.items():
        found = [json.loads((root / file).read_text()) for file in section.files]
        path = root / section.document
        body = f"{section.table(*found)}\n\n{provenance(section, found)}"
        texts[path] = rendered(texts.get(path, path.read_text()), name, body)
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    odd = {path: text for path, text in documents().items() if path.read_text() != text}
    for path, text in odd.items():
        if args.check:
            print(
                f"{path.relative_to(ROOT)} is not what the result files say: python -m bench.report",
                file=sys.stderr,
            )
        else:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return int(args.check and bool(odd))


if __name__ == "__main__":
    sys.exit(main())
