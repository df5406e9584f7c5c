"""One run of ``make gpu``: processes under limits, logs that are written as they come, the summary."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
#: All that may lie in the results; a file of an earlier run may not pass for one of this.
FILES = (
    "summary.md", "log.txt", "tests.txt", "ncu.txt", "memcheck.txt", "kernels.json", "step.json", "kernels.png",
)  # fmt: skip
LOG_BYTES = 12 * 2**20  # of one log; what comes later is left out
#: What runs a module in a dry run, in the place of a device.
EXECUTOR = ("ptx",)
TIMEOUT = 124  # exit status of a process that was stopped at its limit
GRACE = 8  # seconds for a process that was asked to end, to say what it has found


@dataclass
class Outcome:
    stage: str
    state: str  # passed, failed, skipped or cut
    seconds: float = 0.0
    note: str = ""


class Ended(NamedTuple):
    """A process: its exit status, output and seconds."""

    status: int
    text: str
    seconds: float


@dataclass
class Session:
    """Where it writes, until when, what became of it so far."""

    results: Path
    budget: float
    summary: Callable[[Session], str]
    dry: bool = False
    start: float = field(default_factory=time.monotonic)
    outcomes: list[Outcome] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # of the machine
    backends: dict[str, str] = field(default_factory=dict)  # "" for one that runs, or the reason why not
    info: str = ""
    texts: dict[str, str] = field(default_factory=dict)  # output of stages, for the summary
    under_way: str = ""
    processes: set[subprocess.Popen[str]] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)
    sizes: dict[str, int] = field(default_factory=dict)

    def left(self) -> float:
        return self.start + self.budget - time.monotonic()

    def note(self, stage: str, state: str, seconds: float = 0.0, note: str = "") -> None:
        """What became of a stage; the summary says so at once."""
        with self.lock:
            self.outcomes.append(Outcome(stage, state, seconds, note))
            self.say("log.txt", stage, f"{state} after {seconds:.1f} s{': ' * bool(note)}{note}")
            self.write()

    def write(self) -> None:
        """The summary."""
        with self.lock:
            (self.results / "summary.md").write_text(self.summary(self))

    def say(self, log: str, stage: str, line: str) -> None:
        """A line, into the log and on the screen."""
        line = f"{time.monotonic() - self.start:6.1f} {stage}: {line}\n"
        with self.lock:
            size = self.sizes.get(log, 0)
            if size <= LOG_BYTES:
                self.sizes[log] = size + len(line.encode(errors="replace"))
                with (self.results / log).open("a", errors="replace") as file:
                    file.write(line if self.sizes[log] <= LOG_BYTES else "the rest is left out\n")
            sys.stdout.write(line)
            sys.stdout.flush()

    def shown(self, text: str) -> str:
        """Without the folders of this machine."""
        for path, name in (
            (sys.executable, "python"),
            (self.results, "results"),
            (ROOT, "."),
            (sys.prefix, "..."),
        ):
            text = text.replace(str(path), name)
        return text

    # ---- processes

    def module(self, name: str, *arguments: str) -> list[str]:
        """How a module is run on the device."""
        return [sys.executable, "-m", *(EXECUTOR if self.dry else ()), name, *arguments]

    @property
    def device(self) -> list[str]:
        return ["--device", "cpu" if self.dry else "cuda"]

    def environment(self) -> dict[str, str]:
        """This process's, without what would keep Triton off the GPU or name another backend."""
        found = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FOGZO_BACKEND")}
        found |= {"PYTHONUNBUFFERED": "1"}
        if self.dry:
            paths = [str(ROOT), str(ROOT / "python_tests"), os.environ.get("PYTHONPATH", "")]
            found |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        return found

    def run(
        self,
        stage: str,
        command: Sequence[str],
        limit: float,
        log: str = "log.txt",
        gently: bool = False,
        **environment: str,
    ) -> Ended:
        """Run in a process group of its own. The limit ends the whole group.

        Args:
            gently: interrupt it first, so that it says what it has found so far.
        """
        start, lines = time.monotonic(), list[str]()
        self.say(log, stage, self.shown(f"$ {' '.join(command)}"))
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment(), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                text=True,
                errors="replace",
            )
        except OSError as error:
            self.say(log, stage, str(error))
            return Ended(127, str(error), 0.0)
        with self.lock:
            self.processes.add(process)

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(self.shown(line))
                self.say(log, stage, lines[-1].rstrip("\n"))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            status = process.wait(timeout=max(limit - GRACE * gently, 0.1))
        except subprocess.TimeoutExpired:
            status = TIMEOUT
            if gently:
                os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE)
        finally:
            end(process)
            with self.lock:
                self.processes.discard(process)
        reader.join(timeout=5)
        return Ended(status, "".join(lines), time.monotonic() - start)

    def stage(
        self,
        name: str,
        command: Sequence[str],
        limit: float,
        log: str = "log.txt",
        note: Callable[[str], str] = lambda _: "",
        **environment: str,
    ) -> Ended:
        """Run a command that passes with exit status 0."""
        limit = min(limit, self.left())
        if limit < 5:
            self.note(name, "skipped", note="no time left")
            return Ended(TIMEOUT, "", 0.0)
        found = self.run(name, command, limit, log, **environment)
        self.finish(name, found, limit, note)
        return found

    def finish(self, name: str, found: Ended, limit: float, note: Callable[[str], str]) -> None:
        said = f"stopped at its limit of {limit:.0f} s" if found.status == TIMEOUT else note(found.text)
        state = "cut" if found.status == TIMEOUT else "failed" if found.status else "passed"
        self.note(name, state, found.seconds, said or (last_line(found.text) if found.status else ""))

    def beside(self, *works: Callable[[], object]) -> None:
        """Side by side; what one of them raises is raised when all have ended."""
        with ThreadPoolExecutor(len(works)) as pool:
            try:
                for future in [pool.submit(work) for work in works]:
                    future.result()
            except BaseException:  # or the pool would wait for processes that go on
                self.stop()
                raise

    def stop(self) -> None:
        """End every process that is still there."""
        with self.lock:
            running = list(self.processes)
        for process in running:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """It, and all that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip("= ")[:200]
