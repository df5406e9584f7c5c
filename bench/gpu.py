"""Everything that needs a GPU, in one command: build, test, check memory, measure, profile.

``make gpu`` runs it with the Python that is there and downloads nothing. Each stage has a time limit, and
the next one starts whatever became of it. Results go to one folder: summary.md first. The exit code is
0 if nothing failed, 1 if something did, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_GPU = (
    "make gpu must have a CUDA GPU that PyTorch can use, found none;"
    " python -m bench.gpu --dry-run runs on the CPU as far as it goes"
)
FILES = (
    "summary.md", "build.log", "tests.log", "sanitize.log", "kernels.txt", "kernels.json", "kernels.png",
    "kernels-cuda.txt", "kernels-cuda.json", "kernels-cuda.png", "step.txt", "step.json", "ncu.txt",
)  # fmt: skip
BACKENDS = ("triton", "cuda")
TESTS = (
    "vectors",
    "agreement",
    "update",
    "optim",
    "gpu",
    "cuda",
    "triton",
    "fogzo",
)  # those that run on the GPU
TOOLS = ("memcheck", "racecheck", "initcheck")
SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats",
)  # fmt: skip
LIMITS = {
    "build": 150,
    "info": 40,
    "tests": 180,
    "sanitize": 60,
    "tool": 40,
    "step": 60,
    "profile": 30,
}  # seconds
MEASURE = 240  # seconds that the stages before the benchmarks leave to them and to the profile
#: A LLaMA of 31 M quantized weights, 8,192 tokens in 4 micro-batches.
STEP = (
    "--model", "llama", "--hidden", "512", "--layers", "12", "--rows", "16", "--context", "512", "--dtype",
    "bf16", "--turns", "12", "--methods", "fogzo", "one-by-one", "forward", "forward-half", "eager",
)  # fmt: skip
OVERRUN = 25  # seconds: the timing under way at its end, the plot
REFUSED = (
    "Device not supported", "ERR_NVGPUCTRPERM", "Failed to initialize the profiler", "LibraryNotLoaded",
)  # fmt: skip
WORKERS = 8  # test processes


@dataclass
class Outcome:
    stage: str
    state: str  # passed, failed, skipped or cut
    seconds: float = 0.0
    note: str = ""


@dataclass
class Session:
    """One run: where it writes, until when, what became of it so far."""

    results: Path
    deadline: float
    dry: bool = False
    outcomes: list[Outcome] = field(default_factory=list)

    def left(self, reserved: float = 0.0) -> float:
        return self.deadline - time.monotonic() - reserved

    def note(self, stage: str, state: str, seconds: float = 0.0, note: str = "") -> None:
        self.outcomes.append(Outcome(stage, state, seconds, note))
        print(f"{stage:20s} {state:8s} {seconds:6.1f} s  {note}", flush=True)

    def run(self, command: list[str], limit: float, log: str, **environment: str) -> tuple[int, str, float]:
        """Exit status (124: it ran past its limit), output and seconds; the output is added to the log."""
        start = time.monotonic()
        code, text = execute(command, limit, {**own_environment(), "PYTHONUNBUFFERED": "1", **environment})
        said = f"$ {' '.join(command)}\n{text}\n[exit status {code}]\n\n"
        for path, name in (
            (sys.executable, "python"),
            (self.results, "results"),
            (ROOT, "."),
            (sys.prefix, "..."),
        ):
            said = said.replace(str(path), name)
        with (self.results / log).open("a") as file:
            file.write(said)
        return code, text, time.monotonic() - start

    def stage(
        self, name: str, command: list[str], limit: float, log: str, note: Callable[[str], str] = str,
        **environment: str,
    ) -> tuple[int, str]:  # fmt: skip
        """Run a command that passes with exit status 0."""
        if limit < 5:
            self.note(name, "skipped", note="no time left")
            return 124, ""
        code, text, seconds = self.run(command, limit, log, **environment)
        said = f"stopped at its limit of {limit:.0f} s" if code == 124 else note(text)
        self.note(name, "failed" if code else "passed", seconds, said)
        return code, text


def own_environment() -> dict[str, str]:
    """This process's, without what would keep Triton off the GPU or name another backend."""
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FOGZO_BACKEND")}


def execute(command: list[str], limit: float, environment: dict[str, str]) -> tuple[int, str]:
    """Run in a process group of its own, of which nothing is left after the limit."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return 127, str(error)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip("= ")[:200]


# ---- stages


def build(session: Session) -> None:
    """In place, so that nothing is installed; the CUDA kernels for this machine's GPU alone."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    limit = min(LIMITS["build"], session.left(MEASURE))
    environment = {} if session.dry or limit < 5 else cuda_environment()
    session.stage("build", command, limit, "build.log", lambda _: "", **environment)


def cuda_environment() -> dict[str, str]:
    """Builds the CUDA module where nvcc is there, and only what this GPU runs."""
    code = "import torch; print('CAPABILITY:%d.%d' % torch.cuda.get_device_capability())"
    _, text = execute([sys.executable, "-c", code], 120, own_environment())
    found = re.search(r"^CAPABILITY:(\S+)$", text, re.MULTILINE)
    return {"TORCH_CUDA_ARCH_LIST": found.group(1)} if found else {}


def info(session: Session) -> None:
    limit = min(LIMITS["info"], session.left(MEASURE))
    _, text = session.stage("info", module("fogzo_kernels.info"), limit, "build.log", lambda _: "")
    print(text, flush=True)


def tests(session: Session) -> None:
    if session.dry:
        return session.note("tests", "skipped", note="dry run: make test runs them on the CPU")
    paths = [f"python_tests/test_{name}.py" for name in TESTS]
    found = [path for path in paths if (ROOT / path).exists()]
    workers = str(min(os.cpu_count() or 1, WORKERS))
    command = module("pytest", "-n", workers, "-q", "--durations=10", *found)
    limit = min(LIMITS["tests"], session.left(MEASURE))
    session.stage("tests", command, limit, "tests.log", last_line)
    if missing := sorted(set(paths) - set(found)):
        session.note("tests", "skipped", note=f"not there: {', '.join(missing)}")


def usable(session: Session, stage: str) -> list[str]:
    """The backends that run on the GPU; the others are noted as skipped, with their reason."""
    code = "import fogzo_kernels as fk; print([f'REASON:{n}:{r}' for n, r in fk.available_backends().items()])"
    _, text = execute([sys.executable, "-c", code], 120, own_environment())
    reasons = dict(re.findall(r"REASON:(\w+):(.*?)[\"'][,\]]", text))
    for backend in BACKENDS:
        if reasons.get(backend, "None") != "None":
            session.note(f"{stage} {backend}", "skipped", note=reasons[backend])
    return [backend for backend in BACKENDS if reasons.get(backend, "None") == "None"]


def sanitize(session: Session) -> None:
    """The ops alone first, which also compiles their kernels; then under each tool."""
    for backend in ["cpu"] if session.dry else usable(session, "sanitize"):
        sanitize_backend(session, backend)


def sanitize_backend(session: Session, backend: str) -> None:
    device = ["--device", "cpu"] if session.dry else []
    command = module("bench.sanitize", "--backend", backend, *device)
    limit = min(LIMITS["sanitize"], session.left(MEASURE))
    code, _ = session.stage(f"ops {backend}", command, limit, "sanitize.log", last_line)
    sanitizer = shutil.which("compute-sanitizer")
    for tool in TOOLS:
        limit = min(LIMITS["tool"], session.left(MEASURE))
        reason = (
            "dry run" if session.dry
            else "compute-sanitizer is not there" if sanitizer is None
            else "the ops failed without it" if code
            else "no time left" if limit < 5
            else None
        )  # fmt: skip
        name = f"{tool} {backend}"
        if reason:
            session.note(name, "skipped", note=reason)
            continue
        options = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        if tool == "memcheck":  # PyTorch asks for driver functions that need not be there
            options += ["--report-api-errors", "no"]
        status, text, seconds = session.run(
            [*options, *command], limit, "sanitize.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        session.note(name, *verdict(status, text, seconds, "finished"))


def verdict(status: int, text: str, seconds: float, proof: str) -> tuple[str, float, str]:
    """State, seconds and note of a tool: it passed only if the program under it came to its end."""
    lines = text.splitlines()
    refusals = [line.strip("= ") for line in lines if any(word in line for word in REFUSED)]
    summaries = [line.strip("= ") for line in lines if "SUMMARY" in line]
    if status == 124:
        return "cut", seconds, f"not done in {seconds:.0f} s"
    if status == 0 and proof in text:
        return "passed", seconds, (summaries or [""])[-1]
    if refusals:
        return "skipped", seconds, f"refused: {refusals[0][:160]}"
    return "failed", seconds, (summaries or [last_line(text)])[-1]


def kernels(session: Session) -> None:
    """A table for each backend: the baselines, which are the same, with the first alone."""
    reserved = profiles(session) + LIMITS["step"]
    if session.dry:
        arguments = [
            "--backend", "cpu", "--device", "cpu", "--quick", "--sizes", "2^12", "--tensors", "1",
            "--distributions", "uniform", "--dtypes", "bf16", "int8",
        ]  # fmt: skip
        return kernels_of(session, "kernels", min(session.left(OVERRUN + 5), 15.0), arguments)
    for backend in usable(session, "kernels") if session.left() > 5 else BACKENDS:
        first = backend == BACKENDS[0]
        left = session.left((2 if first else 1) * (OVERRUN + 5) + reserved)
        name, rest = ("kernels", []) if first else (f"kernels-{backend}", ["--no-baselines"])
        kernels_of(session, name, left * (0.65 if first else 1.0), ["--backend", backend, *rest])


def kernels_of(session: Session, name: str, budget: float, arguments: list[str]) -> None:
    files = [
        "--json",
        str(session.results / f"{name}.json"),
        "--plot",
        str(session.results / f"{name}.png"),
    ]
    command = module("bench.kernels", "--budget", f"{max(budget, 0):.0f}", *files, *arguments)
    session.stage(name, command, budget + OVERRUN, f"{name}.txt", measured)


def measured(text: str) -> str:
    found = re.search(r"^measured .*$", text, re.MULTILINE)
    return found.group() if found else last_line(text)


def step(session: Session) -> None:
    """A whole step, FOGZO against plain STE."""
    small = ["--device", "cpu", "--model", "mlp", "--hidden", "64", "--turns", "4", "--methods", "fogzo"]
    limit = min(LIMITS["step"], session.left() - profiles(session))
    files = ["--json", str(session.results / "step.json")]
    command = module("bench.step", *files, *(small if session.dry else STEP))
    session.stage("step", command, limit, "step.txt", lambda _: "")


def profiles(session: Session) -> int:
    """Seconds for the profile of each backend."""
    return LIMITS["profile"] * len(BACKENDS) if not session.dry and shutil.which("ncu") else 0


def profile(session: Session) -> None:
    for backend in BACKENDS if session.dry or session.left() < 15 else usable(session, "profile"):
        profile_backend(session, backend)


def profile_backend(session: Session, backend: str) -> None:
    ncu, limit, name = shutil.which("ncu"), min(LIMITS["profile"], session.left()), f"profile {backend}"
    reason = "dry run" if session.dry else "ncu is not there" if ncu is None else None
    reason = reason or ("no time left" if limit < 15 else None)
    if reason:
        return session.note(name, "skipped", note=reason)
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = [str(ncu), "--clock-control", "none", "--profile-from-start", "off", *sections]
    command = [*options, *module("bench.profiled", "--backend", backend)]
    status, text, seconds = session.run(command, limit, "ncu.txt")
    session.note(name, *verdict(status, text, seconds, "DRAM Throughput"))


STAGES = {
    "build": build, "info": info, "tests": tests, "sanitize": sanitize, "kernels": kernels,
    "step": step, "profile": profile,
}  # fmt: skip


# ---- the whole


def gpu_name() -> str | None:
    """As PyTorch calls it; None without a GPU. Asked in a process of its own, which frees the GPU again."""
    code = "import torch; print('GPU:' + torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    _, text = execute([sys.executable, "-c", code], 120, own_environment())
    found = re.search(r"^GPU:(.+)$", text, re.MULTILINE)
    return found.group(1) if found else None


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def summary(session: Session, name: str, seconds: float) -> str:
    lines = [f"# {name}", "", "| stage | outcome | seconds | note |", "|---|---|---|---|"]
    lines += [
        f"| {o.stage} | {o.state} | {o.seconds:.1f} | {o.note.replace('|', '/')} |" for o in session.outcomes
    ]
    lines += ["", f"{seconds:.0f} s in all.", ""]
    for file, title in (
        ("build.log", "Versions"),
        ("kernels.txt", "Kernels"),
        ("kernels-cuda.txt", "CUDA kernels"),
        ("step.txt", "Steps"),
    ):
        path = session.results / file
        text = path.read_text() if path.exists() else ""
        if title == "Versions":
            text = text[text.find("fogzo_kernels ") :] if "fogzo_kernels " in text else ""
        if text:
            lines += [f"## {title}", "", "```", text.strip(), "```", ""]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--results", type=Path, help="folder, by default bench/results/<GPU>")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds in all, by default 570")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, as far as it goes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    start = time.monotonic()
    name = "dry run on the CPU" if args.dry_run else gpu_name()
    if name is None:
        print(NO_GPU, file=sys.stderr)
        return 2
    folder = (
        Path(tempfile.mkdtemp(prefix="fogzo-gpu-")) if args.dry_run else ROOT / "bench/results" / slug(name)
    )
    results = (args.results or folder).resolve()
    results.mkdir(parents=True, exist_ok=True)
    for file in FILES:  # nothing of an earlier run may pass for this one's
        (results / file).unlink(missing_ok=True)
    session = Session(results, start + args.limit, args.dry_run)
    try:
        for stage in args.stages:
            STAGES[stage](session)
    finally:
        text = summary(session, name, time.monotonic() - start)
        (results / "summary.md").write_text(text)
        print(f"wrote {results}/summary.md", flush=True)
    return int(any(outcome.state == "failed" for outcome in session.outcomes))


if __name__ == "__main__":
    sys.exit(main())
