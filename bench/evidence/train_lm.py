"""Train a byte-level LLaMA on any text, plain straight-through or by FOGZO, on one device or many.

In DIR: checkpoint.pt, log.csv, and tensorboard/ where that is installed. ``--resume`` goes on from the
checkpoint, also after a kill, to the bits of a run that was never stopped: with as many devices and threads. A
signal to stop (Ctrl-C) ends the step, writes a checkpoint and leaves with status 1.

On N devices: ``torchrun --nproc-per-node N -m bench.evidence.train_lm --parallel fsdp`` (or ``ddp``), and the
rest as ever; --rows is still that of all of them. Checkpoints are then torch.distributed.checkpoint's, and go
on with any number of processes.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fogzo_kernels as fk

from . import pool, record, text
from .processes import WAYS, Processes

#: How weights, and inputs of linear layers, are quantized; None: not at all.
PRESETS: dict[str, tuple[fk.Quantizer, fk.Quantizer | None] | None] = {
    "none": None,
    "lsq": (fk.presets.lsq(2), None),
    "quest": (fk.presets.quest(2), None),
    "quest-w2a2": (fk.presets.quest(2), fk.presets.quest(2)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: What may differ where a run goes on.
FREE = (
    "parallel",
    "out",
    "resume",
    "save_every",
    "log_every",
    "evaluate_every",
    "threads",
    "stop_after",
    "sample",
)
VALIDATION_BATCHES = 16
STATS = ("difference", "noise_to_guide", "cosine", "code_changes", "alphas_at_floor", "lost_directions",
         "lost_steps", "bad_alphas")  # fmt: skip
COLUMNS = ["step", "loss", "validation_loss", "learning_rate", "seconds", "tokens_per_second", *STATS]
LIMIT = 2**32  # of seeds


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence.train_lm",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    add("--resume", action="store_true", help="go on from DIR's checkpoint, or begin if there is none")
    add("--parallel", default="none", choices=WAYS, help="how the processes of torchrun share the model")
    add("--text", type=Path, nargs="+", help="files; by default Python's own sources")
    add("--bytes", type=int, default=8_000_000, help="of text, at most")
    add("--preset", default="lsq", choices=list(PRESETS), help="how weights are quantized")
    add("--estimator", default="fogzo", choices=["ste", "fogzo"])
    add("--kappa", type=float, default=0.1, help="(1 - beta) d of FOGZO at its end")
    add("--noise-schedule", default="linear", choices=["linear", "constant"], help="of 1 - beta")
    add("--start", type=float, default=0.0, help="share of the steps before FOGZO begins")
    add("--every", type=int, default=1, help="FOGZO in every k-th step")
    add("--directions", type=int, default=1)
    add("--hidden", type=int, default=192, help="width, of QuEST a multiple of 128")
    add("--layers", type=int, default=3)
    add("--context", type=int, default=128, help="bytes of a row")
    add("--rows", type=int, default=16, help="of a step")
    add("--micro-batches", type=int, default=1)
    add("--steps", type=int, default=1000)
    add("--seed", type=int, default=0)
    add("--rate", type=float, default=4e-3, help="learning rate")
    add("--decay", default="cosine", choices=pool.DECAYS, help="of the learning rate, to a tenth")
    add("--warm-up", type=float, default=0.1, help="share of the steps")
    add("--alpha-rate", type=float, default=0.1, help="share of the learning rate that learned scales take")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="norm of all gradients; 0: as they are")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="fp32", choices=list(DTYPES), help="of the weights; bf16 with float32 masters")
    add("--threads", type=int, help="of PyTorch, on a CPU")
    add("--save-every", type=int, default=100, help="steps")
    add("--log-every", type=int, default=10, help="steps")
    add("--evaluate-every", type=int, default=250, help="steps; also at the end")
    add("--stop-after", type=int, help="steps of this process, to go on later")
    add("--sample", type=int, default=200, help="bytes to write at the end")
    args = parser.parse_args(argv)
    for name in ("steps", "rows", "micro_batches", "save_every", "log_every", "evaluate_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    parts = args.micro_batches * int(os.environ.get("WORLD_SIZE", "1"))
    if args.rows % parts:
        parser.error(f"--rows must be a multiple of {parts}, --micro-batches of each process, got {args.rows}")
    if not 0 <= args.seed < LIMIT:
        parser.error(f"--seed must be in 0..2^32 - 1, got {args.seed}")
    return args


def rate_at(step: int, args: argparse.Namespace) -> float:
    """Share of the learning rate."""
    return pool.rate_at(step, args.steps, args.warm_up, args.decay)


@dataclass
class Run:
    """All that a step changes, and what it is made with."""

    args: argparse.Namespace
    processes: Processes
    model: nn.Module
    optimizer: fk.AdamW
    fogzo: fk.Fogzo | None
    data: text.Text
    step: int = 0  # taken so far
    seconds: float = 0.0  # in steps
    rates: list[float] = field(default_factory=list)  # of the groups, before their schedule

    def _told(self) -> dict[str, Any]:
        return {"arguments": told(self.args), "step": self.step, "seconds": self.seconds}

    def _others(self) -> dict[str, Any]:
        """What it has beside model and optimizer; a byte-level LLaMA draws nothing in a step."""
        return {
            "fogzo": None if self.fogzo is None else self.fogzo.state_dict(),
            "generator": torch.get_rng_state(),
        }

    def save(self) -> None:
        out, others = self.args.out, self._others()
        if self.processes.way != "none":
            self.processes.save(out, self._told(), self.model, self.optimizer, others)
            return
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        record.save(out, self._told() | others | state)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :func:`saved` found."""
        self.step, self.seconds = state["step"], state["seconds"]
        if self.processes.way != "none":
            state = self.processes.load(self.args.out, self.model, self.optimizer, self._others())
        else:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.fogzo is not None:
            self.fogzo.load_state_dict(state["fogzo"])
        torch.set_rng_state(state["generator"].cpu())


def saved(args: argparse.Namespace, processes: Processes) -> dict[str, Any] | None:
    """The last checkpoint, or where processes share it, what it says of its run; None without one."""
    shared, alone = processes.told(args.out), record.load(args.out, torch.device(processes.device))
    found, other = (alone, shared) if processes.way == "none" else (shared, alone)
    if other is not None:
        raise SystemExit(
            f"--parallel must be {'ddp or fsdp' if found is alone else 'none'}, as in the run whose checkpoint"
            f" --out {args.out} has, got {args.parallel}"
        )
    return found


def told(args: argparse.Namespace) -> dict[str, Any]:
    """What makes the run what it is."""
    found = {name: value for name, value in vars(args).items() if name not in FREE}
    found["text"] = None if args.text is None else [str(path) for path in args.text]
    return found


def check_same(args: argparse.Namespace, state: dict[str, Any]) -> None:
    now, then = told(args), state["arguments"]
    odd = [name for name in now if now[name] != then.get(name)]
    if odd:
        name = odd[0]
        raise SystemExit(
            f"--{name.replace('_', '-')} must be {then.get(name)!r}, as in the run to resume, got {now[name]!r}"
        )


def build(args: argparse.Namespace, processes: Processes) -> Run:
    torch.manual_seed(args.seed)
    data = text.sources(args.bytes) if args.text is None else text.files(args.text, args.bytes)
    for name, part in data._asdict().items():
        if len(part) <= args.context:
            raise SystemExit(
                f"--text must have more than --context {args.context} bytes for {name}, got {len(part)}"
            )
    model = text.llama(args.hidden, args.layers, args.context)
    fogzo, preset = None, PRESETS[args.preset]
    if preset is not None:
        weights, inputs = preset
        fk.quantize_model(model, weights, activation=inputs, skip=["model.embed_tokens", "lm_head"])
    elif args.estimator == "fogzo":
        raise SystemExit("--preset must quantize for --estimator fogzo, got none")
    model.to(processes.device, DTYPES[args.dtype])
    model = processes.shared(model, model.model.layers)
    plain = args.estimator == "ste"
    if not plain or (args.parallel == "fsdp" and preset is not None):  # whose passes gather codes
        fogzo = fk.Fogzo(
            model,
            total_steps=args.steps,
            kappa=args.kappa,
            schedule=args.noise_schedule,
            start=1.0 if plain else args.start,
            every=args.every,
            directions=args.directions,
            seed=args.seed,
        )
    groups = fk.parameter_groups(model, weight_decay=args.weight_decay, alpha_lr=args.alpha_rate * args.rate)
    masters = args.dtype != "fp32"
    optimizer = fk.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fogzo=fogzo, master_weights=masters)
    return Run(
        args, processes, model, optimizer, fogzo, data, rates=[group["lr"] for group in optimizer.param_groups]
    )


# ---- a step


def batch_of(run: Run, step: int) -> Tensor:
    """This process's rows: a function of seed and step, so that no state of a loader is to be saved."""
    generator = text.generator_of(run.args.seed, step)
    rows = text.batch(run.data.train, run.args.rows, run.args.context, generator)
    return run.processes.own(rows).to(run.processes.device)


def take_step(run: Run) -> Tensor:
    """The loss, on the device."""
    args, count = run.args, run.args.micro_batches
    share = rate_at(run.step, args)
    for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
        group["lr"] = share * rate
    parts = batch_of(run, run.step).chunk(count)
    run.optimizer.zero_grad()
    if run.fogzo is None:
        loss = torch.zeros((), device=run.processes.device)
        for rows in parts:
            part = run.model(rows, labels=rows).loss / count
            part.backward()
            loss += part.detach()
        loss = run.processes.mean(loss)
    else:
        for probe in run.fogzo.probes():
            with probe:
                for rows in parts:
                    probe.backward(run.model(rows, labels=rows).loss / count)
    if args.clip:
        if run.fogzo is not None:
            loss = run.fogzo.estimate_()
        run.processes.clip_(run.model.parameters(), args.clip)
        run.optimizer.step()
    else:
        found = run.optimizer.step()
        loss = loss if run.fogzo is None else found
    run.step += 1
    return loss


@torch.no_grad()
def validation(run: Run) -> float:
    """Loss on the same rows for every run."""
    run.model.eval()
    generator, total = torch.Generator().manual_seed(0), torch.zeros(())
    for _ in range(VALIDATION_BATCHES):
        rows = text.batch(run.data.validation, run.args.rows, run.args.context, generator)
        rows = run.processes.own(rows).to(run.processes.device)
        total += run.model(rows, labels=rows).loss.cpu()
    run.model.train()
    return float(run.processes.mean(total)) / VALIDATION_BATCHES


@torch.no_grad()
def sample(run: Run, count: int) -> str:
    """Text that the model writes on from a line's end; drawn from a generator of its own."""
    run.model.eval()
    generator = torch.Generator().manual_seed(run.args.seed)
    found = [ord("\n")]
    for _ in range(count):
        rows = torch.tensor([found[-run.args.context :]], device=run.processes.device)
        weights = run.model(rows).logits[0, -1].float().softmax(0).cpu()
        found.append(int(torch.multinomial(weights, 1, generator=generator)))
    run.model.train()
    return bytes(found[1:]).decode(errors="replace")


# ---- the whole


@contextmanager
def stops() -> Any:
    """A list that is no longer empty when a signal asked the process to end; the step is done first."""
    asked: list[int] = []
    kept = {
        s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def row_of(run: Run, loss: float, bar: tqdm[Any]) -> dict[str, float]:
    args = run.args
    row = dict.fromkeys(COLUMNS, math.nan) | {
        "step": run.step,
        "loss": loss,
        "seconds": run.seconds,
        "learning_rate": rate_at(run.step - 1, args) * args.rate,
        "tokens_per_second": run.step * args.rows * args.context / max(run.seconds, 1e-9),
    }
    if run.fogzo is not None:
        stats = run.fogzo.stats()
        row |= {name: stats[name] for name in STATS}
    if run.step % args.evaluate_every == 0 or run.step == args.steps:
        row["validation_loss"] = validation(run)
        say(run.processes, bar, f"step {run.step}: validation loss {row['validation_loss']:.4f} nats a byte")
    bar.set_postfix(loss=f"{loss:.3f}")
    return row


def say(processes: Processes, bar: tqdm[Any], text: str) -> None:
    """Above the bar, once for all processes."""
    if processes.first:
        bar.write(text)


def advance(run: Run, log: record.Log | None, bar: tqdm[Any], asked: list[int]) -> bool:
    """Steps until the last one, or until the process is asked to end: whether it was the last one."""
    args = run.args
    last = args.steps if args.stop_after is None else min(args.steps, run.step + args.stop_after)
    while run.step < last:
        start = time.perf_counter()
        loss = take_step(run)
        due = [
            run.step % every == 0 or run.step == args.steps for every in (args.log_every, args.evaluate_every)
        ]
        value = float(loss) if any(due) else math.nan  # waits for the device
        run.seconds += time.perf_counter() - start
        if any(due):
            if not math.isfinite(value):
                raise SystemExit(f"the loss must be finite, got {value} in step {run.step}: a lower --rate?")
            row = row_of(run, value, bar)
            if log is not None:
                log.write(row)
        bar.update()
        ending = run.processes.any(bool(asked))
        if run.step % args.save_every == 0 or run.step == last or ending:
            run.save()
        if ending:
            return False
    return run.step == args.steps


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    processes = Processes(args.parallel, args.device)
    try:
        return trained(args, processes)
    finally:
        processes.close()


def trained(args: argparse.Namespace, processes: Processes) -> int:
    """The status to leave with."""
    hidden = None if processes.first else True  # None: where nobody watches
    with tqdm(total=args.steps, unit="step", disable=hidden, desc="building") as bar, stops() as asked:
        if args.threads:
            torch.set_num_threads(args.threads)
        args.out.mkdir(parents=True, exist_ok=True)
        state = saved(args, processes)
        if state is not None and not args.resume:
            raise SystemExit(f"--out must have no checkpoint, or be given with --resume, got {args.out}")
        if state is not None:
            check_same(args, state)
        run = build(args, processes)
        if state is not None:
            run.load(state)
            bar.update(run.step)
        log = None
        if processes.first:
            log = record.Log(args.out, COLUMNS, run.step)
            getattr(run.model, "module", run.model).config.save_pretrained(args.out)  # for what reads the run
        if log is not None and log.events is None and not run.step:
            bar.write("tensorboard is not installed; log.csv has all numbers")
        bar.set_description(f"{args.preset}, {args.estimator}")
        try:
            finished = advance(run, log, bar, asked)
        finally:
            if log is not None:
                log.close()
    written = sample(run, args.sample) if finished and args.sample else ""
    if written and processes.first:
        print(f"--- {args.sample} bytes that it writes\n{written}")
    if processes.first:
        print(f"{args.out}: {run.step} of {args.steps} steps, {run.seconds:.0f} s")
    return 0 if finished or not asked else 1


if __name__ == "__main__":
    raise SystemExit(main())
