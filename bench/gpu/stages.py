"""The stages, in their order: the most useful results come first, after whatever they need."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from ..lost import LOST
from .session import EXECUTOR, TIMEOUT, Ended, Session, last_line
from .tools import SECTIONS, verdict, without

BACKENDS = ("triton", "cuda")
FOUND_NONE = "PyTorch finds no CUDA GPU"  # as bench.machine says it
TOOLS = ("memcheck", "racecheck")
PROFILED = ("perturb", "estimate", "adamw", "norm")
PROFILE_SECONDS = 20  # at most for one op under ncu
WORKERS = 12  # processes, where there are cores for them
RESTARTS = 12  # of one stage, after what ended its process
#: A LLaMA of 31 M quantized weights, 8,192 tokens in 4 micro-batches.
STEP = (
    "--model", "llama", "--hidden", "512", "--layers", "12", "--rows", "16", "--context", "512", "--dtype",
    "bf16", "--turns", "12", "--methods", "lsq", "eager", "modules", "ste", "guided", "fogzo",
)  # fmt: skip
SMALL_STEP = (
    "--model", "mlp", "--hidden", "16", "--layers", "1", "--rows", "8", "--turns", "4", "--methods", "fogzo",
    "--backend", "triton",
)  # fmt: skip
HOST, SMALL_HOST = ("--layers", "10", "100", "300", "--rounds", "8"), ("--layers", "2", "4", "--rounds", "1")
#: Of bench.kernels: what each stage measures, and what a dry run does instead.
LARGE = (
    "--sizes", "2^28", "--tensors", "1", "--dtypes", "bf16", "fp32", "--distributions", "uniform",
    "--no-baselines",
)  # fmt: skip
LISTS = (
    "--ops", "perturb", "adamw", "estimate", "norm", "quantize", "learned", "--sizes", "2^24", "2^28",
    "--tensors", "1", "300", "--scale-length", "0", "128", "--dtypes", "bf16", "--distributions", "uniform",
    "--no-baselines",
)  # fmt: skip
BASELINES = (
    "--ops", "perturb", "estimate", "adamw", "quantize", "learned", "--sizes", "2^28", "--tensors", "1",
    "--dtypes", "bf16", "--distributions", "uniform", "--baselines", "eager", "compile",
)  # fmt: skip
OTHERS = ("--sizes", "2^28", "--tensors", "1", "--dtypes", "bf16", "int8", "mixed", "--no-baselines")
REHEARSED = (
    "--rehearse", "--sizes", "2^12", "--dtypes", "bf16", "--distributions", "uniform", "--ops", "perturb",
    "adamw", "norm", "--baselines", "eager",
)  # fmt: skip
#: Files of tests that run on the GPU, those that only a GPU can pass first.
TESTS = (
    "gpu", "vectors", "agreement", "special_values", "ops", "update", "learned", "measure", "hadamard",
    "transform", "optim", "fogzo",
)  # fmt: skip
DRY_EVERY = 5  # of the subset of calls, a dry run makes one in so many
OVERRUN = 4.0  # seconds before its limit at which bench.kernels begins nothing more


class NoGpuError(Exception):
    """There is nothing to run on."""


def info(session: Session) -> None:
    """Versions, and which backends run here."""
    found = session.stage("info", session.module("fogzo_kernels.info"), 30.0)
    session.info = found.text
    for name, said in re.findall(r"^  (\w+) +(available|unavailable: .+)$", found.text, re.MULTILINE):
        session.backends[name] = said.removeprefix("available") and said.removeprefix("unavailable: ")


def usable(session: Session, stage: str) -> list[str]:
    """The backends that run here; the others are noted as skipped, with their reason."""
    if not session.backends:  # the stage that builds was not asked for
        info(session)
    for backend in BACKENDS:
        if reason := session.backends.get(backend, "unknown: python -m fogzo_kernels.info did not say"):
            session.note(f"{stage} {backend}", "skipped", note=reason)
    return [backend for backend in BACKENDS if session.backends.get(backend) == ""]


def cores() -> int:
    return max(min((os.cpu_count() or 1) - 2, WORKERS), 1)


# ---- machine, build, comparison


def machine(session: Session, limit: float) -> None:
    """Versions, tools, the speed of a copy and a triad: shares are of copies that were measured beside them."""
    size = ["--bytes", str(2**20)] if session.dry else []
    command = session.module("bench.machine", *session.device, *size)
    found = session.run("machine", command, limit)
    if FOUND_NONE in found.text:
        raise NoGpuError
    lines = [line for line in found.text.splitlines() if line.startswith("{")]
    session.facts = json.loads(lines[-1]) if lines else {}
    session.finish("machine", found, limit, lambda _: "copy {copy_gb_per_s:.0f} GB/s".format(**session.facts))


def build(session: Session, limit: float) -> None:
    """In place, so that nothing is installed, and for this GPU alone; Triton's kernels compile beside it."""
    end = time.monotonic() + limit

    def native() -> None:
        if session.dry:  # reads pyproject.toml, finds compilers; to build would replace what this process runs
            session.stage(
                "build", [sys.executable, "setup.py", "--name"], limit, note=lambda _: "compiles nothing"
            )
            return
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        capability = session.facts.get("capability", "")[3:]
        target = {"TORCH_CUDA_ARCH_LIST": f"{capability[:-1]}.{capability[-1]}"} if capability else {}
        found = session.stage("build", command, limit, **target)
        if found.status and end - time.monotonic() > 10:
            rest = end - time.monotonic()
            session.stage("build without CUDA", command, rest, FOGZO_BUILD_CUDA="0", **target)

    session.beside(native, lambda: compare(session, "triton", limit))
    info(session)


def compare(session: Session, backend: str, limit: float) -> None:
    """Every op against the reference; in a dry run some of them."""
    options = ["--subset", "--every", str(DRY_EVERY), "--through", *EXECUTOR] if session.dry else []
    processes = 1 if session.dry else cores()
    command = [sys.executable, "-m", "bench.agree", "--backend", backend, *session.device,
               "--processes", str(processes), *options]  # fmt: skip
    found = session.stage(f"ops {backend}", command, limit, note=last_line)
    session.texts[f"ops {backend}"] = found.text


def ops(session: Session, limit: float) -> None:
    """CUDA's; Triton's were compared beside the build."""
    for backend in usable(session, "ops"):
        if backend != "triton":
            compare(session, backend, limit)


# ---- benchmarks


def kernels(session: Session, name: str, backend: str, limit: float, arguments: tuple[str, ...]) -> None:
    """Rows of bench.kernels, added to those that are there; a process that is lost is followed by another."""
    path, small = session.results / "kernels.json", REHEARSED if session.dry else ()
    limit = min(limit, session.left())
    if limit < 5:
        return session.note(name, "skipped", note="no time left")
    end, seconds, found = time.time() + limit, 0.0, Ended(TIMEOUT, "", 0.0)
    for _ in range(RESTARTS):
        if end - time.time() < 5:
            break
        command = session.module(
            "bench.kernels",
            "--backend",
            backend,
            *session.device,
            *arguments,
            *small,
            "--json",
            str(path),
            "--resume",
            "--until",
            f"{end - OVERRUN:.0f}",
            "--budget",
            "inf",
        )
        found = session.run(name, command, end - time.time())
        seconds += found.seconds
        if not (found.status == LOST or (found.status not in (0, TIMEOUT) and begun(session))):
            break
    session.finish(name, found._replace(seconds=seconds), limit, measured)


def begun(session: Session) -> bool:
    """Whether the last process ended while it measured."""
    path = session.results / "kernels.json"
    return path.exists() and json.loads(path.read_text())["begun"] is not None


def measured(text: str) -> str:
    found = re.findall(r"^measured .*$", text, re.MULTILINE)
    return found[-1] if found else last_line(text)


def large(session: Session, limit: float) -> None:
    """One tensor, larger than any cache: Triton first, as most users run it."""
    for backend in usable(session, "large"):
        share = 2 / 3 if backend == "triton" else 1 / 3
        drawn = backend == "triton" and importlib.util.find_spec("matplotlib")
        plot = ("--plot", str(session.results / "kernels.png")) if drawn else ()
        kernels(session, f"large {backend}", backend, limit * share, (*LARGE, *plot))


def lists(session: Session, limit: float) -> None:
    """300 tensors, a smaller tensor, groups of 128."""
    backends = usable(session, "lists")
    for backend in backends:
        arguments = (*LISTS, "--tensors", "1", "8") if session.dry else LISTS
        kernels(session, f"lists {backend}", backend, limit / len(backends), arguments)


def step(session: Session, limit: float) -> None:
    """A whole step, of this package and of others, against float training."""
    limit = min(limit, session.left())
    if limit < 5:
        return session.note("step", "skipped", note="no time left")
    end, seconds, found = time.monotonic() + limit, 0.0, Ended(TIMEOUT, "", 0.0)
    for _ in range(RESTARTS):
        if end - time.monotonic() < 5:
            break
        command = session.module(
            "bench.step",
            *session.device,
            *(SMALL_STEP if session.dry else STEP),
            "--json",
            str(session.results / "step.json"),
            "--resume",
        )
        found = session.run("step", command, end - time.monotonic())
        seconds += found.seconds
        if found.status != LOST:
            break
    session.texts["step"] = found.text
    session.finish("step", found._replace(seconds=seconds), limit, lambda _: "")


def host(session: Session, limit: float) -> None:
    """What a step costs the host, against the number of layers."""
    limit = min(limit, session.left())
    if limit < 5:
        return session.note("host", "skipped", note="no time left")
    command = session.module("bench.step.host", *session.device, *(SMALL_HOST if session.dry else HOST))
    found = session.run("host", command, limit)
    session.texts["host"] = "\n".join(line for line in found.text.splitlines() if line.startswith("|"))
    session.finish("host", found, limit, lambda _: "")


# ---- profile, tests, memory


def profile(session: Session, limit: float) -> None:
    """ncu, one op a call: what one of them does to the device or the clock does not reach the next."""
    ncu, end = None if session.dry else shutil.which("ncu"), time.monotonic() + min(limit, session.left())
    for backend in usable(session, "profile"):
        for op in PROFILED[:1] if ncu is None else PROFILED:
            name = f"profile {backend} {op}"
            size = ["--elements", str(2**12)] if session.dry else []
            command = session.module(
                "bench.profiled", "--backend", backend, "--ops", op, *session.device, *size
            )
            rest = min(PROFILE_SECONDS, end - time.monotonic())
            if rest < 5:
                session.note(name, "skipped", note="no time left")
            elif ncu is None:
                found = session.run(name, command, rest, "ncu.txt")
                session.note(name, *without(found, "ncu"))
            else:
                sections = [word for section in SECTIONS for word in ("--section", section)]
                options = [ncu, "--clock-control", "none", "--profile-from-start", "off", *sections]
                found = session.run(name, [*options, *command], rest, "ncu.txt")
                session.note(name, *verdict(*found, "DRAM Throughput"))
                session.texts["ncu"] = session.texts.get("ncu", "") + found.text


def tests(session: Session, limit: float) -> None:
    """What runs on the GPU of the suite; in a dry run what only a GPU shows, which skips."""
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n) is None])"
    names = ["pytest", "hypothesis", "numpy", "scipy", "xdist"]
    told = session.run("tests", [sys.executable, "-c", code, *names], 30)
    missing = re.findall(r"'(\w+)'", last_line(told.text))
    if needed := [name for name in missing if name != "xdist"]:
        return session.note("tests", "skipped", told.seconds, f"not there: {', '.join(needed)}")
    limit = min(limit, session.left())
    if limit < 15:
        return session.note("tests", "skipped", note="no time left")
    serial = session.dry or "xdist" in missing
    spread = [] if serial else ["-n", str(cores()), "--maxschedchunk", "1"]
    what = [f"python_tests/test_{name}.py" for name in TESTS[: 1 if session.dry else None]]
    command = [
        sys.executable, "-m", "pytest", *spread, "-v", "--tb=short", "-p", "no:cacheprovider", "--color=no",
        "--continue-on-collection-errors", "--durations=10", "-k", "triton or cuda", *what,
    ]  # fmt: skip
    found = session.run("tests", command, limit, "tests.txt", gently=True)
    failed = sorted(set(re.findall(r"FAILED (python_tests/\S+)", found.text)))
    session.texts["tests"] = "\n".join(failed)
    if found.status == TIMEOUT:
        passed = found.text.count(" PASSED")
        note = f"stopped at its limit of {limit:.0f} s: {passed} passed, {len(failed)} failed"
        state = "failed" if failed else "cut"
    else:
        note, state = last_line(found.text), "failed" if found.status else "passed"
    note += " (serially: pytest-xdist is not there)" * ("xdist" in missing)
    session.note("tests", state, found.seconds, note)


def memory(session: Session, limit: float) -> None:
    """The subset of calls under compute-sanitizer; their kernels were compiled for the comparison."""
    check(session, TOOLS[0], limit)


def check(session: Session, tool: str, limit: float) -> None:
    sanitizer = None if session.dry else shutil.which("compute-sanitizer")
    backends = usable(session, tool)
    end = time.monotonic() + min(limit, session.left())
    for i, backend in enumerate(backends):
        name, rest = f"{tool} {backend}", (end - time.monotonic()) / (len(backends) - i)
        few = ["--every", str(DRY_EVERY)] if session.dry else []
        command = session.module("bench.sanitize", "--subset", *few, "--backend", backend, *session.device)
        if rest < 5:
            session.note(name, "skipped", note="no time left")
        elif sanitizer is None:
            found = session.run(name, command, rest, "memcheck.txt")
            session.note(name, *without(found, "compute-sanitizer"))
        else:
            options = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
            if tool == "memcheck":  # PyTorch asks for driver functions that need not be there
                options += ["--report-api-errors", "no"]
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found = session.run(name, [*options, *command], rest, "memcheck.txt", **environment)
            session.note(name, *verdict(*found, "calls finished"))


def rest(session: Session, limit: float) -> None:
    """In the time that is left: baselines, races, other noise and dtypes."""
    backends = usable(session, "rest")
    if backends:
        kernels(session, f"baselines {backends[0]}", backends[0], session.left() - 8, BASELINES)
    if not session.dry and session.left() > 20:
        check(session, TOOLS[1], session.left() / 2)
    for backend in backends if not session.dry else []:
        if session.left() > 15:
            kernels(session, f"others {backend}", backend, session.left() - 3, OTHERS)


class Stage(NamedTuple):
    work: Callable[[Session, float], None]
    seconds: float  # of a budget of 540


STAGES = {
    "machine": Stage(machine, 30), "build": Stage(build, 100), "ops": Stage(ops, 25),
    "large": Stage(large, 90), "lists": Stage(lists, 55), "step": Stage(step, 80),
    "host": Stage(host, 25),
    "profile": Stage(profile, 60), "tests": Stage(tests, 90), "memory": Stage(memory, 30),
    "rest": Stage(rest, 540),
}  # fmt: skip
