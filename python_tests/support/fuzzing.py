"""Random and bad calls of the native CPU ops, past the checks in Python: right, or a clean exception.

A case is a dictionary of plain values, drawn evenly (hypothesis varies few choices at a time, and leaves
whole ops out of hundreds of examples), from which :func:`run` builds every tensor. Bytes around each buffer
must stay; where a case has none, an address sanitizer sees what is read past the end. A call that is valid
must agree with the reference backend, a spoiled one must raise and write nothing. The case lies in a file
before it is called, so that a crash leaves it behind; ``python -m support.fuzzing --case '{...}'``
repeats one. ``test_fuzz.py`` runs this program.
"""

import argparse
import ast
import json
import math
import os
import sys
import time
from pathlib import Path
from random import Random

import torch

import fogzo_kernels as fk
from fogzo_kernels import _C
from fogzo_kernels.spec import grid, straight_through
from fogzo_kernels.spec.call import Measure
from fogzo_kernels.spec.hadamard import BLOCKS
from fogzo_kernels.spec.noise import DISTRIBUTIONS
from fogzo_kernels.spec.scale import STATISTICS

from .fuzz_expected import RULES, expected, rule_of
from .fuzz_spoil import applicable, spoil

native = torch.ops.fogzo_cpu
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in grid.OUTPUTS}
FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype in grid.FLOATS}
GUARD = 0xA5
NORMS = (0.5, 3.0, 100.0, 0.0, math.inf, math.nan)
GRIDS = (
    (-2, 1, 0.0, 1), (-128, 127, 0.0, 1), (-1, 0, 0.5, 2), (-1, 1, 0.0, 1), (-8, 7, 0.5, 1), (3, 3, 0.0, 2),
)  # fmt: skip
KINDS = (("identity", True), ("identity", "trust"), *((kind, False) for kind in straight_through.KINDS))
NOISY = ("noise", "perturb_quantize", "estimate_gradient", "estimate_update")
PLAIN = ("noise", "guide_sumsq", "measure_alphas")  # without a transform
LARGEST = 3 * 32768  # elements of a tensor, so that a case fits into little memory
OPS = (*NOISY, *PLAIN[1:], "quantize", "straight_through_backward", "learned_backward", "hadamard")


# ---- cases


def draw_tensor(random, large):
    """Shape, shape of alpha and place in the parameter of one tensor."""
    if large:  # more than one block of a thread
        rows, columns = random.choice([(1, 32769), (2, 20000), (70001, 1), (3, 32768)])
    else:
        rows, columns = random.choice((0, 1, 1, 2, 6)), random.choice((0, 1, 8, 64, random.randint(0, 300)))
    groups = random.choice([g for g in (1, 2, 3, 5, 8) if columns % g == 0])
    offset = random.choice((0, 3, 8, 2**32 - 9, 2**34 + 5, 2**50, random.randint(0, 2**50)))
    scales = random.choice([(), (1,), (rows,), (rows, 1), (rows, groups), (rows, columns)])
    return {
        "shape": (rows, columns), "scales": scales,
        "layout": (offset, max(columns, 1), max(columns, 1) + random.choice((0, 1, 7, 64))),
        "id": random.choice((0, 2**32 - 2, random.randint(0, 2**32 - 2))),
    }  # fmt: skip


def in_blocks(tensor, block, random):
    """The same tensor with rows, scales and place of whole blocks."""
    groups = random.choice((1, 1, 2))
    columns = groups * block * random.choice((0, 1, 1, 3, 40))
    rows = min(tensor["shape"][0], max(1, LARGEST // max(columns, 1)))
    offset, _, _ = tensor["layout"]
    wide = max(columns, block)
    return {
        **tensor, "shape": (rows, columns),
        "scales": random.choice([(), (1,), (rows,), (rows, 1), (rows, groups)]),
        "layout": (offset // block * block, wide, wide + block * random.choice((0, 1, 7))),
    }  # fmt: skip


def apart(tensors):
    """The same tensors, none of which draws another's noise: no two have one id and one offset."""
    seen = set()
    for t in tensors:
        while (t["id"], t["layout"][0]) in seen:
            t["id"] = (t["id"] + 1) % (2**32 - 1)
        seen.add((t["id"], t["layout"][0]))
    return tensors


def draw_case(random, op, bad):
    """A call that is valid but for what ``spoil`` says: (name of an argument, how, a number), or nothing."""
    large = not bad and random.random() < 0.05
    count = 1 if op == "noise" or large else random.choice((0, 1, 2, 3, 4, 5, 6, random.randint(0, 60)))
    case = {
        "op": op, "seed": random.randrange(2**31), "noise_seed": random.randrange(-(2**63), 2**63),
        "tensors": apart([draw_tensor(random, large) for _ in range(count)]),
        "latent": random.choice(list(FLOATS)), "grad": random.choice(list(FLOATS)),
        "out": random.choice(list(DTYPES)),
        "shift": random.choice((0, 0, 1, 2, 3, 8)), "guard": random.choice((0, 64)),
        "special": random.random() < 0.3, "norm": random.randrange(len(NORMS)), "grid": random.choice(GRIDS),
        "step": random.choice((0, 1, 2**32 - 1)), "direction": random.choice((0, 1, 2**16 - 1)),
        "n": random.choice((0, 1, 2, 4) if op == "estimate_update" else (1, 2, 3)),
        "lost": random.choice((0, 0, 0, 1, 4)), "distribution": random.choice(list(DISTRIBUTIONS)),
        "rule": random.choice(list(RULES)), "kind": random.choice(KINDS),
        "sides": random.choice(("plus", "minus", "both")), "counters": random.random() < 0.5,
        "masters": random.random() < 0.5, "quantized": random.random() < 0.7,
        "plain": random.choice((0, 0, random.randint(0, count))), "count": random.choice((1, 2, 1000)),
        "one_minus_beta": random.choice((0.0, 1e-3, 0.3, 1.0)),
        "measure": (random.choice(STATISTICS), *random.choice(((1.0, 0.0, 0.0), (0.3, 1e-8, 0.2)))),
        "factors": random.random() < 0.4, "guided": random.random() < 0.3, "per_tensor": random.random() < 0.5,
        "threads": random.choice((1, 3)), "spoil": (), "held": random.choice((0, 0, random.randrange(1024))),
    }  # fmt: skip
    block = random.choice(BLOCKS) if op == "hadamard" or (op not in PLAIN and random.random() < 0.4) else 0
    case["block"] = block
    if block:
        case["tensors"] = apart([in_blocks(t, block, random) for t in case["tensors"]])
        if case["kind"][0] == "tanh":  # whose slope differs in its last bits
            case["kind"] = ("hardtanh", False)
    if bad:
        arguments = build(case, Buffers(case))
        ways = {name: applicable(op, name, arguments) for name in arguments}
        name = random.choice([name for name, hows in ways.items() if hows])
        case["spoil"] = (name, random.choice(ways[name]), random.randrange(2**16))
    return case


SIMPLE = {
    "latent": "float32", "grad": "float32", "out": "float32", "shift": 0, "special": False, "norm": 0, "n": 1,
    "grid": GRIDS[0], "step": 0, "direction": 0, "lost": 0, "distribution": "uniform", "rule": "sgd",
    "sides": "plus", "counters": False, "masters": False, "plain": 0, "count": 1, "threads": 1, "held": 0,
    "measure": (STATISTICS[0], 1.0, 0.0, 0.0), "factors": False, "guided": False, "per_tensor": False,
}  # fmt: skip


def shrunk(case):
    """A case that fails as well, with fewer tensors and plainer choices."""

    def fails(other):
        try:
            run(other)
        except AssertionError:
            return True
        except Exception:  # no case any more: spoiled where nothing is left
            return False
        return False

    i = 0
    while i < len(case["tensors"]):
        fewer = [*case["tensors"][:i], *case["tensors"][i + 1 :]]
        other = {**case, "tensors": fewer, "plain": min(case["plain"], len(fewer))}
        case, i = (other, i) if fails(other) else (case, i + 1)
    for name, value in SIMPLE.items():
        if case[name] != value and fails({**case, name: value}):
            case = {**case, name: value}
    return case


# ---- from a case to a call


class Buffers:
    """Every tensor of a call, at a shift from the start of its memory and with bytes after its end."""

    def __init__(self, case):
        self.generator = torch.Generator().manual_seed(case["seed"])
        self.shift, self.guard, self.special = case["shift"], case["guard"], case["special"]
        self.kept = []  # memory, its first byte and length of what is the tensor's own, whether it is written

    def tensor(self, shape, dtype, fill, written=False):
        size, numel = torch.empty(0, dtype=dtype).element_size(), math.prod(shape)
        begin, length = self.shift * size, numel * size
        memory = torch.full((begin + length + self.guard,), GUARD, dtype=torch.uint8)
        found = memory[: begin + length].view(dtype)[self.shift :].view(shape)
        if fill is not None:
            found.copy_(fill)
        self.kept.append((memory, begin, length, written))
        return found

    def random(self, shape, dtype, scale=1.0, written=False):
        data = torch.randn(shape, generator=self.generator) * scale
        if self.special and data.numel() > 3:
            data.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
        return self.tensor(shape, dtype, data, written)

    def snapshot(self):
        return [memory.clone() for memory, *_ in self.kept]

    def check(self, before, raised):
        """Inputs and guards keep every byte; everything does where the call raised."""
        for i, ((memory, begin, length, written), old) in enumerate(zip(self.kept, before, strict=True)):
            if not written or raised:
                assert torch.equal(memory, old), f"buffer {i} was written"
            assert torch.equal(memory[:begin], old[:begin]), f"bytes before buffer {i} were written"
            end = begin + length
            assert torch.equal(memory[end:], old[end:]), f"bytes after buffer {i} were written"


def build(case, buffers):
    """The arguments of the native op by name, in the order of its schema."""
    op, F32 = case["op"], torch.float32
    shapes = [tuple(t["shape"]) for t in case["tensors"]]
    updates, latent, out = op == "estimate_update", FLOATS[case["latent"]], DTYPES[case["out"]]
    plain = case["plain"] if updates else 0  # the last ones are not quantized
    quantizing = case["tensors"][: len(shapes) - plain]

    def outputs(present, dtype):
        return [buffers.tensor(tuple(t["shape"]), dtype, None, True) for t in quantizing] if present else []

    def states(present, square=False):
        found = [buffers.random(s, F32, 1e-2, True) for s in shapes] if present else []
        return [t.square_() if square else t for t in found]

    def losses():
        found = buffers.random((0 if case["guided"] else case["n"],), F32)
        if len(found):
            found.fill_(1.0).add_(torch.rand(found.shape, generator=buffers.generator))
        return found

    def noise_factors():
        size = (len(quantizing),)
        values = torch.rand(size, generator=buffers.generator) * (torch.arange(*size) % 3)  # some are 0
        return [buffers.tensor(size, F32, values)] if case["factors"] else []

    def scalar(value):
        dtype = torch.float64 if isinstance(value, float) else torch.int64
        return buffers.tensor((), dtype, torch.tensor(value, dtype=dtype))

    known = {
        "latents": lambda: [buffers.random(s, latent, 1.0, updates) for s in shapes],
        "grads": lambda: [
            buffers.random(s, FLOATS[case["grad"]], 1e-2, op == "estimate_gradient") for s in shapes
        ],
        "alphas": lambda: [
            buffers.tensor(
                tuple(t["scales"]), F32, 0.05 + torch.rand(t["scales"], generator=buffers.generator),
                op == "measure_alphas",
            )
            for t in quantizing
        ],
        "tensors": lambda: [buffers.random(s, latent) for s in shapes],
        **{k: lambda i=i: case["measure"][i] for i, k in enumerate(Measure._fields)},
        "alpha_grads": lambda: [buffers.tensor(tuple(t["scales"]), F32, None, True) for t in quantizing],
        "factors": lambda: {
            "learned_backward": lambda: [(-0.5, 1.0, 3.0)[i % 3] for i in range(len(quantizing))]
        }.get(op, noise_factors)(),
        "guided": lambda: case["guided"],
        "plus": lambda: outputs(case["sides"] != "minus", out),
        "minus": lambda: outputs(case["sides"] != "plus", out),
        "quantized": lambda: outputs(case["quantized"], out),
        "masters": lambda: states(case["masters"] and latent != F32),
        "first": lambda: states(case["rule"] != "sgd"),
        "second": lambda: states(case["rule"] == "adamw", square=True),
        "counters": lambda: (
            [buffers.tensor((3,), torch.int64, torch.tensor([5, 6, 7]), True)] if case["counters"] else []
        ),
        "losses_plus": lambda: lose(losses(), case["lost"]), "losses_minus": losses,
        "norm": lambda: buffers.tensor((), F32, torch.tensor(NORMS[case["norm"]])),
        "seed": lambda: scalar(case["noise_seed"]), "step": lambda: scalar(case["step"]),
        "direction": lambda: case["direction"], "one_minus_beta": lambda: scalar(case["one_minus_beta"]),
        "tensor_ids": lambda: [t["id"] for t in quantizing],
        "layouts": lambda: [x for t in quantizing for x in t["layout"]],
        "qmin": lambda: case["grid"][0], "qmax": lambda: case["grid"][1], "offset": lambda: case["grid"][2],
        "r": lambda: case["grid"][3], "block": lambda: case["block"],
        "distribution": lambda: case["distribution"], "epsilon": lambda: 0.75,
        "noise_scale": lambda: DISTRIBUTIONS[case["distribution"]],
        "straight_through": lambda: fk.StraightThrough(*case["kind"]).variant, "rule": lambda: case["rule"],
        "held": list, "names": lambda: list(rule_of(case).hyperparameters), "lr": lambda: scalar(0.03),
        "values": lambda: list(rule_of(case).hyperparameters.values()),
        "optimizer_step": lambda: scalar(case["count"]),
        "out": lambda: {
            "noise": lambda: buffers.tensor(shapes[0], F32, None, True),
            "guide_sumsq": lambda: buffers.tensor(
                (len(shapes),) if case["per_tensor"] else (), torch.float64, None, True
            ),
            "quantize": lambda: outputs(True, out),
            "straight_through_backward": lambda: outputs(True, latent),
            "learned_backward": lambda: outputs(True, latent),
            "hadamard": lambda: outputs(True, FLOATS[case["grad"]]),
        }[op](),
    }  # fmt: skip
    return {a.name: known[a.name]() for a in getattr(native, op).default._schema.arguments}


def held(case, args):
    """The arguments with numbers for some lists, whose tensors were others before; and what holds them."""
    arguments = getattr(native, case["op"]).default._schema.arguments
    lists = [a.name for a in arguments if str(a.type) == "List[Tensor]"]
    lists = [name for name in lists if name not in ("counters", "factors")]
    if not lists:
        return args, []
    first = next(name for name in ("latents", "grads", "tensors") if name in args)
    numbers, holds, bits = dict.fromkeys(lists, 0), [], case["held"]
    for i, name in enumerate(lists):
        if not bits >> i & 1:
            continue
        tensors, names = args[name], ((), ())
        if not case["spoil"]:
            tensors = [torch.empty(0) for _ in tensors]
            if bits >> 7 & 1 and name == first and "tensor_ids" in args and not case["plain"]:
                names = args["tensor_ids"], args["layouts"]
                args = args | {"tensor_ids": [], "layouts": []}
        holds.append(_C.Hold(torch.ops.fogzo_cpu.hold(tensors, *names)))
        numbers[name] = holds[-1].number
        _C.generations([numbers[name]])
        for t, now in zip(tensors, args[name], strict=True):
            if t is not now:
                t.data = now
        args = args | {name: []}
    return args | {"held": list(numbers.values())}, holds


def lose(losses, count):
    losses[:count] = math.nan
    return losses


# ---- a case


def agree(found, wanted, off, what):
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    near = (found.double() - wanted.double()).abs() <= off.double() if off is not None else same
    assert (same | near).all(), f"{what}: {found[~(same | near)][:3]} instead of {wanted[~(same | near)][:3]}"


def run(case):
    """Raise AssertionError unless the call is right, or raises and writes nothing if it is spoiled."""
    torch.set_num_threads(case["threads"])
    buffers = Buffers(case)
    args = build(case, buffers)
    spoilt = case.get("spoil")
    if spoilt:
        name, how, number = spoilt
        args[name] = spoil(name, args, how, number)
    wanted, off = ({}, {}) if spoilt else expected(case, args)
    before, raised = buffers.snapshot(), None
    try:
        call, _holds = held(case, args) if case["held"] and not args.get("held") else (args, None)
        getattr(native, case["op"])(*call.values())
    except (RuntimeError, ValueError, TypeError) as error:
        raised = error
    buffers.check(before, raised)
    assert spoilt or not raised, f"a valid call raised {raised}"
    assert not spoilt or raised or spoilt[1] == "odd", f"{spoilt[0]} spoiled by {spoilt[1]} was taken"
    for name, values in wanted.items():
        found = args[name] if isinstance(args[name], list) else [args[name]]
        for i, (x, y) in enumerate(zip(found, values, strict=True)):
            error = off[name][i] if name in off else None
            agree(x, y.view(x.shape), None if error is None else error.view(x.shape), f"{name}[{i}]")


def hunt(random, examples, bad, log):
    """Random cases of every op; each lies in ``log`` while it is called."""
    for k in range(examples):
        case = draw_case(random, OPS[k % len(OPS)], bad)
        if log:
            Path(log).write_text(json.dumps(case))
        try:
            run(case)
        except AssertionError:
            print(f"--case '{json.dumps(shrunk(case))}'", file=sys.stderr)
            raise


def parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100, help="valid and bad calls each, of every set")
    parser.add_argument("--seconds", type=float, default=0, help="go on for that long")
    parser.add_argument("--isa", nargs="*", default=_C.cpu_isas(), help="instruction sets")
    parser.add_argument("--log", help="file that holds the case that is being called")
    parser.add_argument("--case", help="run this one, as JSON or as Python prints it")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="of the cases")
    args = parser.parse_args()
    print(f"--seed {args.seed}", file=sys.stderr)
    random, end, rounds = Random(args.seed), time.monotonic() + args.seconds, 0
    while not rounds or time.monotonic() < end:
        for isa in args.isa:
            os.environ["FOGZO_CPU_ISA"] = isa
            if args.case:
                run(parsed(args.case))
                continue
            for bad in (False, True):
                hunt(random, args.examples, bad, args.log)
        rounds += 1
    print(f"{rounds} x {args.examples} valid and {args.examples} bad calls: {', '.join(args.isa)}")


if __name__ == "__main__":
    main()
