"""The machine code of the GPU kernels, compiled for GPUs that need not be there: Triton's, then CUDA's."""

import functools
import itertools
import json
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
from support.triton_code import triton_rows

from bench.cases import DTYPES, short
from bench.sass import cuda
from bench.sass.__main__ import main
from bench.sass.machine_code import Report, split
from bench.sass.report import Variant
from build_cuda import find_nvcc, nvcc_version
from cuda_units import digest, once
from fogzo_kernels.spec import noise, scale

ROOT = Path(__file__).parents[1]
KEYS = {
    "kernel", "arch", "latent", "grad", "out", "distribution", "signs", "scale",
    "instructions_per_element", "registers", "spill_bytes", "shared_bytes", "barriers", "load_bits",
    "store_bits", "margin",
}  # fmt: skip
BF16 = "bf16 bf16 bf16"
#: Instructions per element on sm_90, prologue and all. One Philox call per 8 elements costs about 10.
BUDGETS = {
    f"perturb_kernel {BF16} uniform one tensor": 25,
    f"perturb_kernel {BF16} rademacher one tensor": 25,
    f"perturb_kernel {BF16} triangular one tensor": 27,
    f"perturb_kernel {BF16} logistic one tensor": 31,
    f"perturb_kernel {BF16} gaussian one tensor": 31,
    f"perturb_kernel {BF16} uniform both tensor": 33,
    "estimate_kernel bf16 uniform tensor n=1": 18,
    "estimate_kernel bf16 rademacher tensor n=1": 18,
}
PERFORMANCE = ROOT / "docs/performance.md"
#: Rows of its tables of counts.
TABLE_ROWS = {
    "norm": "sumsq_kernel bf16 tensor",
    "perturb, one sign": f"perturb_kernel {BF16} {{}} one tensor",
    "perturb, one sign, float32 latents": "perturb_kernel fp32 bf16 bf16 {} one tensor",
    "perturb, both signs": f"perturb_kernel {BF16} {{}} both tensor",
    "estimate, n = 1": "estimate_kernel bf16 {} tensor n=1",
    "estimate, n = 4": "estimate_kernel bf16 {} tensor n=4",
    "estimate, AdamW, Q; float32 latents": "update_kernel fp32 bf16 bf16 {} tensor adamw",
    "the same, n = 4": "update_kernel fp32 bf16 bf16 {} tensor adamw n=4",
    "Hadamard, blocks of 128": "hadamard_kernel bf16 bf16 block=128",
}
#: Of CUDA alone: scales by row, as these have no other kernels.
CUDA_ROWS = {
    "CUDA: perturb, one sign, Hadamard 128": f"rotated_perturb_kernel {BF16} {{}} one row 128 shard",
    "CUDA: Hadamard 128 + quantize": "rotated_quantize_kernel bf16 bf16 row 128",
    "CUDA: estimate, Hadamard 128": "rotated_estimate_kernel bf16 {} row 128 n=1 shard",
}
#: Rows of the table of quantizers: Triton's kernel and CUDA's. Blocks are of 128, alphas of rows.
QUANTIZER_ROWS = {
    "Q": ("quantize_kernel bf16 bf16 tensor", "quantize_kernel bf16 bf16 row"),
    "LSQ, backward": ("learned_kernel bf16 bf16 bf16 row identity_clipped",) * 2,
    "LSQ, backward, float32": ("learned_kernel fp32 fp32 fp32 row identity_clipped",) * 2,
    "alphas from data, rms": ("measure_kernel bf16 rms",) * 2,
    "alphas from data, rms, float32": ("measure_kernel fp32 rms",) * 2,
    "alphas from data, absmax": ("measure_kernel bf16 absmax",) * 2,
    "H, Q": ("quantize_kernel bf16 bf16 row block=128", "rotated_quantize_kernel bf16 bf16 row 128"),
    "H, derivative, H": (
        "quantize_kernel bf16 bf16 bf16 row identity_trust block=128",
        "rotated_backward_kernel bf16 bf16 bf16 row identity_trust",
    ),
    **{
        f"perturb with H, {label}": (
            f"perturb_kernel {latent} bf16 bf16 uniform {signs} row block=128",
            f"rotated_perturb_kernel {latent} bf16 bf16 uniform {signs} row 128 shard",
        )
        for label, latent, signs in (
            ("one sign", "bf16", "one"), ("one sign, float32 latents", "fp32", "one"),
            ("both signs", "bf16", "both"),
        )
    },
    "estimate with H, n = 1": (
        "estimate_kernel bf16 uniform row n=1 block=128",
        "rotated_estimate_kernel bf16 uniform row 128 n=1 shard",
    ),
}  # fmt: skip
DISTRIBUTIONS = tuple(noise.DISTRIBUTIONS)
#: One of each way that the code can differ; the whole table is `python -m bench.sass`.
CHOSEN = {
    80: ["perturb_kernel fp32 fp32 fp32 gaussian both row shard",
         "estimate_kernel fp32 triangular row n=1 shard",
         "update_kernel fp32 bf16 bf16 uniform tensor adamw", "quantize_kernel bf16 bf16 tensor"],
    90: [*BUDGETS, "noise_kernel fp32 rademacher", "perturb_kernel fp16 fp16 fp16 uniform one row shard",
         "perturb_kernel bf16 bf16 int8 logistic one tensor",
         "perturb_kernel fp32 fp32 int8 uniform both row shard",
         "estimate_kernel bf16 gaussian tensor n=4", "estimate_kernel fp16 logistic row n=1 shard",
         f"perturb_kernel {BF16} uniform one tensor device", "estimate_kernel bf16 uniform tensor n=1 device",
         "update_kernel fp32 bf16 bf16 gaussian tensor adamw",
         f"update_kernel {BF16} uniform tensor sgd master",
         "update_kernel bf16 bf16 int8 uniform row adamw shard",
         "update_kernel fp32 fp32 fp32 logistic tensor nesterov", "estimate_kernel bf16 uniform tensor n=4 own",
         f"perturb_kernel {BF16} uniform both tensor own",
         "update_kernel fp32 bf16 bf16 uniform tensor adamw own",
         "quantize_kernel fp32 int8 tensor", "quantize_kernel fp32 fp32 fp32 row tanh"],
    100: ["perturb_kernel fp32 bf16 bf16 uniform one tensor", "estimate_kernel bf16 triangular tensor n=4",
          "update_kernel fp32 fp32 fp32 uniform tensor momentum", "noise_kernel fp32 gaussian"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        *((arch, names[i : i + 8]) for arch, names in CHOSEN.items() for i in range(0, len(names), 8)),
    ],
)
def test_streaming_kernels_stay_in_registers_and_in_budget(triton, arch, names):
    for name in names:
        row = triton_rows(arch)(name)
        assert set(row) >= KEYS
        assert (row["spill_bytes"], row["shared_bytes"], row["barriers"]) == (0, 0, 0), name
        assert row["load_bits"] == (None if "noise" in name else 128), name
        assert row["store_bits"] == (64 if "int8" in name else 128), name
        assert row["margin"] > (0.4 if "n=4" in name else 1), name  # n Philox calls for the same bytes
        assert 0 < row["loop_instructions_per_element"] < row["instructions_per_element"]
        if arch == 90:
            assert row["instructions_per_element"] <= BUDGETS.get(name, 85), name


def test_reductions_compile_without_spills(triton):
    names = ["sumsq_kernel bf16 tensor", "sumsq_kernel fp32 row", "sumsq_kernel bf16 row unaligned",
             "sum_kernel", "sum_kernel own", "coefficients_kernel", "coefficients_kernel device",
             "learned_sum_kernel",
             "update_coefficients_kernel adamw device", "measure_kernel bf16 rms", "join_kernel rms",
             "measure_kernel fp32 absmax", "measure_kernel fp16 absmean"]  # fmt: skip
    for name in names:
        row = triton_rows(90)(name)
        assert row["spill_bytes"] == 0, name
        if name.startswith(("sumsq", "measure")):
            assert row["load_bits"] == 128


#: Of learned scales on sm_90: instructions per element, and memory time over that of the busiest pipe. Rows of
#: 1024 cost sums of theirs more than tensors, those of any length a segmented sum over chunks.
LEARNED = {
    "learned_kernel fp32 fp32 fp32 tensor identity_clipped": (26, 3.0),
    "learned_kernel bf16 bf16 bf16 tensor identity": (28, 1.6),
    "learned_kernel fp32 fp32 fp32 row identity_clipped": (37, 2.5),
    "learned_kernel bf16 bf16 bf16 row identity_clipped": (39, 1.2),
    "learned_kernel bf16 bf16 bf16 group identity_clipped": (40, 1.1),
    "learned_kernel bf16 bf16 bf16 any identity_clipped": (48, 0.9),
    "learned_kernel fp32 fp32 fp32 row tanh": (53, 1.8),
}


@pytest.mark.parametrize("arch", [80, 90])
def test_learned_scales_stay_in_registers_and_in_budget(triton, arch):
    for name in LEARNED:
        row = triton_rows(arch)(name)
        assert row["spill_bytes"] == 0, name
        assert row["load_bits"] == 128, name
        if arch == 90:
            most, margin = LEARNED[name]
            assert row["instructions_per_element"] <= most, name
            assert row["margin"] >= margin, name


def test_the_transform_compiles_without_spills(triton):
    """It goes between threads, so it may use shared memory and barriers."""
    names = [
        f"hadamard_kernel {k}" for k in ("bf16 bf16 block=16", "bf16 bf16 block=1024", "fp32 fp32 block=16")
    ]
    for name in names:
        row = triton_rows(90)(name)
        assert (row["spill_bytes"], row["load_bits"], row["store_bits"]) == (0, 128, 128), name
        assert row["margin"] > 1, name


def table():
    """Cells of each row of the tables of counts, by the row's label."""
    lines = iter(PERFORMANCE.read_text().splitlines())
    found = {}
    for line in lines:
        if not line.startswith("| sm_90, instructions per element (margin) |"):
            continue
        assert cells_in(line)[1:] == [*DISTRIBUTIONS]
        next(lines)
        while (line := next(lines, "")).startswith("|"):
            label, *cells = cells_in(line)
            assert label not in found
            assert len(cells) == len(DISTRIBUTIONS), label
            found[label] = cells
    return found


def quantizer_table():
    """Cells of each row of the table of quantizers, by the row's label."""
    lines = PERFORMANCE.read_text().splitlines()
    start = lines.index("| sm_90, instructions per element (margin), alphas of rows | Triton | CUDA |") + 2
    rows = [cells_in(line) for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:])]
    return {label: cells for label, *cells in rows}


def test_the_table_of_quantizers_is_whole():
    assert list(quantizer_table()) == list(QUANTIZER_ROWS)


def quantizer_cell(row):
    return f"{row['instructions_per_element']:.1f} ({row['margin']:.2f})"


def cells_in(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def stated(label, rows):
    """Whether the row says what the compiler made; an op without noise has one cell for all distributions."""
    row = CUDA_ROWS.get(label) or TABLE_ROWS[label.removeprefix("CUDA: ")]
    names = list(dict.fromkeys(row.format(d) for d in DISTRIBUTIONS))
    cells = table()[label]
    if len(names) == 1:
        assert cells[1:] == ["no noise", *[""] * (len(DISTRIBUTIONS) - 2)]
        cells = cells[:1]
    found = [f"{row['instructions_per_element']:.1f} ({row['margin']:.2f})" for row in map(rows, names)]
    assert cells == found, label


def test_the_table_of_quantizers_states_what_triton_makes(triton):
    """For the Triton that it names; nothing spills."""
    if f"Triton {version('triton')}," not in PERFORMANCE.read_text():
        pytest.skip(f"the counts are for another Triton than {version('triton')}")
    for label, (name, _) in QUANTIZER_ROWS.items():
        row = triton_rows(90)(name)
        assert row["spill_bytes"] == 0, name
        assert quantizer_table()[label][0] == quantizer_cell(row), label


@pytest.mark.parametrize("label", TABLE_ROWS)
def test_the_table_states_what_triton_makes(triton, label):
    """For the Triton that it names."""
    if f"Triton {version('triton')}," not in PERFORMANCE.read_text():
        pytest.skip(f"the counts are for another Triton than {version('triton')}")
    stated(label, triton_rows(90))


def test_every_row_of_the_tables_is_checked():
    assert [*table()] == [*TABLE_ROWS, *(f"CUDA: {label}" for label in TABLE_ROWS), *CUDA_ROWS]


@pytest.mark.parametrize(("variant", "message"), [
    (Variant("noise_kernel", out="fp32", distribution="cauchy"), "no code for distribution cauchy"),
    (Variant("quantize_kernel", "fp32", "fp32", "fp32", scale="row", kind="cubic"),
     "no code for straight-through kind cubic"),
    (Variant("update_coefficients_kernel", kind="lion"), "no code for rule lion"),
])  # fmt: skip
def test_a_name_without_code_does_not_compile(triton, variant, message):
    from triton.errors import TritonError

    with pytest.raises(TritonError) as raised:
        triton.row(variant, 90)
    error = raised.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert message in str(error)


def test_the_loop_is_counted_once_per_tile():
    """A kernel in miniature: two in the prologue, a loop around a wide store with one inside, a rest."""
    lines = ["S2R R0, SR_TID.X", "MOV R1, R2", "FADD R3, R3, R4", "IMAD R6, R6, R7", "@P2 BRA 0x30",
             "STG.E.128 [R8], R4", "@!P0 BRA 0x20", "FMUL R1, R1, R1", "STG.E.U16 [R8], R4", "@P1 BRA 0x70",
             "EXIT", "NOP"]  # fmt: skip
    text = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    prologue, loop, code = split(text, 4)
    report = Report(1, 0, 0, prologue, loop, 0)
    assert prologue == {"S2R": 1, "MOV": 1}
    assert loop == {"FADD": 1, "IMAD": 4, "STG.E.128": 1, "BRA": 5}
    assert report.weighted(8) == prologue + Counter({op: 8 * n for op, n in loop.items()})
    assert (report.width("STG"), len(code)) == (128, 11)


def test_only_the_loops_that_run_are_counted():
    """Not that of another branch before, nor one inside for what the wide loop leaves."""
    lines = ["MOV R1, R2", "LDG.E.128 R4, [R8]", "BRA 0x10", "IADD3 R1, R1, R2", "MOV R3, R4",
             "LDG.E.128 R4, [R8]", "FFMA R5, R5, R5", "@!P0 BRA 0x50", "LDG.E.U16 R4, [R8]", "DFMA R5, R5, R5",
             "@!P0 BRA 0x80", "STG.E.64 [R8], R4", "@P1 BRA 0x40", "EXIT"]  # fmt: skip
    text = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    prologue, loop, _ = split(text, 4)
    assert prologue == {"MOV": 1, "IADD3": 1}
    assert loop == {"MOV": 1, "LDG.E.128": 4, "FFMA": 4, "BRA": 4 + 1, "STG.E.64": 1}


def test_stages_of_a_transform_are_counted_by_themselves():
    """A loop around a wide store with a loop that shuffles and one that does not; what divergent warps run."""
    lines = ["MOV R1, R2", "FADD R3, R3, R4", "IMAD R6, R6, R7", "@!P0 BRA 0x20", "BRA.DIV ~URZ, 0xb0",
             "SHFL.BFLY PT, R4, R5, R6", "@!P0 BRA 0x40", "STG.E.128 [R8], R4", "@P1 BRA 0x10",
             "STG.E.U16 [R8], R4", "EXIT", "WARPSYNC R9", "MOV R7, R9", "BRA 0x50"]  # fmt: skip
    text = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    prologue, loop, _ = split(text, 4, 3)
    assert prologue == {"MOV": 1}
    assert loop == {"FADD": 1, "IMAD": 4, "BRA": 4 + 3 + 1, "BRA.DIV": 3, "SHFL.BFLY": 3, "STG.E.128": 1}


def test_the_program_prints_a_table_and_writes_json(triton, tmp_path, capsys):
    path = tmp_path / "a" / "rows.json"
    main(["--arch", "90", "--backend", "triton", "--only", "noise_kernel", "--json", str(path)])
    out = capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert len(rows) == 5
    assert len({row["distribution"] for row in rows}) == 5
    assert all(set(row) >= KEYS for row in rows)
    assert out.count("noise_kernel") == 5


# ---- CUDA


#: nvcc takes two minutes for each.
ASKED = pytest.mark.everything
ARCHITECTURES = [pytest.param(80, marks=ASKED), 90, pytest.param(100, marks=ASKED)]


@functools.cache
def cuda_rows(arch):
    """By name. Compiled and counted once per state of the sources."""
    if (reason := cuda.unavailable()) is not None:
        pytest.skip(f"the CUDA kernels cannot be compiled: {reason}")
    folder = cuda.compile_all(arch)
    sources = digest((ROOT / "bench/sass").glob("*.py"))

    def make(path):
        path.write_text(json.dumps({str(variant): row for variant, row in cuda.rows(arch)}))

    return json.loads(once(folder / f"rows-{sources}.json", make).read_text())


@pytest.mark.slow_first  # nvcc compiles all kernels
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cuda_kernels_stay_in_registers_and_in_budget(arch):
    rows = cuda_rows(arch)
    assert len(rows) > 250
    for name, row in rows.items():
        assert set(row) >= KEYS
        assert row["spill_bytes"] == 0, name
        if name.startswith("rotated"):
            stays_in_registers_around_a_transform(name, row)
            continue
        if name.startswith(("sumsq", "sum_", "tensor_sums", "measure", "join", "learned")):
            wide = name.startswith(("sumsq", "measure")) or (
                name.startswith("learned_kernel") and "any" not in name
            )
            assert row["load_bits"] == (128 if wide else 64) or "any" in name, name
            continue
        between_warps = row["kernel"] == "hadamard_kernel" and row["block"] > 256
        waits = row["barriers"] and not between_warps
        assert (row["shared_bytes"] % 1024, waits) == (0, 0), name  # 1 KiB is the system's, on some
        if name.endswith("coefficients_kernel") or "any" in name:
            continue
        assert row["load_bits"] == (None if "noise" in name else 128), name
        assert row["store_bits"] == (64 if "int8" in name else 128), name
        if "n=4" not in name or arch >= 90:  # the model is of sm_90; four directions are bound by arithmetic
            assert row["margin"] > (0.4 if "n=4" in name else 1), name
        assert 0 < row["loop_instructions_per_element"] < row["instructions_per_element"]
    if arch == 90:
        for name, budget in BUDGETS.items():
            assert rows[name]["instructions_per_element"] <= budget, name


#: Kernels around a transform whose busiest pipe takes longer than memory, and by how much: the others do not.
SLOWER = {"tanh": 0.7, "both": 0.85, "n=4": 0.35, "estimate": 0.8}


def stays_in_registers_around_a_transform(name, row):
    """Those for all dtypes and blocks may have stages between warps, by shared memory."""
    if "any" in name or row["kernel"].startswith("rotated_learned"):
        assert row["shared_bytes"] <= 7168, name
        return
    assert (row["shared_bytes"] % 1024, row["barriers"]) == (0, 0), name
    assert (row["load_bits"], row["store_bits"]) == (128, 128), name
    least = min((SLOWER[word] for word in SLOWER if word in name), default=1)
    assert row["margin"] > least or row["arch"] < 90, name


def test_quantizers_leave_memory_the_limit():
    """Of bfloat16, by rows: a probe, its commonest noise, Q, alphas from data, LSQ's backward."""
    rows = cuda_rows(90)
    for label in ("CUDA: perturb, one sign, Hadamard 128", "CUDA: Hadamard 128 + quantize"):
        assert rows[CUDA_ROWS[label].format("uniform")]["margin"] >= 1.2, label
    for statistic in scale.STATISTICS:
        assert rows[f"measure_kernel bf16 {statistic}"]["margin"] >= 1.2, statistic
    assert rows["learned_kernel bf16 bf16 bf16 row identity_clipped"]["margin"] >= 1.5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ptxas_reports_no_spill(arch):
    """Neither stores nor loads nor a stack, for each kernel; and PTX is there for what comes later."""
    if (reason := cuda.unavailable()) is not None:
        pytest.skip(f"the CUDA kernels cannot be compiled: {reason}")
    found = cuda.spills(folder := cuda.compile_all(arch))
    assert len([name for name in found if "kernel" in name]) > 200
    assert not {name: n for name, n in found.items() if n}
    ptx = [path.read_text() for path in folder.glob("*.ptx")]
    assert all(f".target sm_{arch}" in text for text in ptx)
    assert len(ptx) == len(cuda.units())


def test_every_dtype_and_distribution_has_its_cuda_kernels():
    rows = cuda_rows(90).values()
    for dist in DISTRIBUTIONS:
        kernels = {row["kernel"] for row in rows if row["distribution"] == dist}
        around = {"perturb_kernel", "estimate_kernel", "update_kernel"}
        assert kernels == {"noise_kernel", *around, *(f"rotated_{name}" for name in around)}
    common = {tuple(map(short, types)) for types in DTYPES.values()}
    perturbed = {(r["latent"], r["grad"], r["out"]) for r in rows if r["kernel"] == "perturb_kernel"}
    assert perturbed == common | {("any", "any", "any")}


def test_the_table_states_what_nvcc_makes():
    rows = cuda_rows(90)
    named = re.search(r"nvcc (\d+\.\d+),", PERFORMANCE.read_text())
    if named is None or not nvcc_version(find_nvcc()).startswith(f"{named.group(1)}."):
        pytest.skip("the counts are for another nvcc")
    for label in [*(f"CUDA: {label}" for label in TABLE_ROWS), *CUDA_ROWS]:
        stated(label, rows.__getitem__)
    for label, (_, name) in QUANTIZER_ROWS.items():
        assert quantizer_table()[label][1] == quantizer_cell(rows[name]), label
