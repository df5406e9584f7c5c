"""Random training loops, each step compared with plain PyTorch written from docs/contract.md.

    PYTHONPATH=.:python_tests python -m support.loops --loops 1000 --seed 0

A loop draws its model's preset and dtype, an optimizer, how gradients are cleared, clipped, scaled and
accumulated; batches that are not finite; a branch that is unused; a save and load in the middle. Noise and
codes come from the public ops; gradients, estimate, learned scales and what is to happen to a step are written
here.
"""

import argparse
import io
import math
import random
import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fogzo_kernels as fk

GRIDS = {"fixed": fk.Grid.uniform(3), "lsq": fk.Grid.uniform(2), "bitnet": fk.Grid.ternary()}
PRESETS = {"fixed": fk.presets.fixed(3, 0.1), "lsq": fk.presets.lsq(2), "bitnet": fk.presets.bitnet()}
EPS_BAR, C = 1 / (2 * math.sqrt(3)), math.sqrt(3) / 65536  # of uniform noise
WEIGHTS = ["first.weight", "branch.weight", "out.weight"]  # by tensor id
WIDTHS = [(6, 8), (8, 8), (8, 3)]
ALPHA_LR = 1e-4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.branch, self.out = (nn.Linear(*width) for width in WIDTHS)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x, branch):
        x = torch.tanh(self.norm(self.first(x)))
        return self.out(x + torch.tanh(self.branch(x)) if branch else x).float()


def drawn(seed):
    """A loop, as options by name."""
    r = random.Random(seed)
    case = {
        "seed": seed, "preset": r.choice(list(PRESETS)), "dtype": r.choice(["float32", "float32", "bfloat16"]),
        "kind": r.choice(["fused", "estimate, fused", "torch"]), "rule": r.choice(["adamw", "sgd", "nesterov"]),
        "groups": r.random() < 0.5, "directions": r.choice([1, 1, 2, 3]), "every": r.choice([1, 1, 2]),
        "schedule": r.choice(["linear", "constant"]),
        "parts": r.choice([1, 1, 2, 3]), "scale": r.choice([None, None, 2.0**4, 2.0**12]),
        "none": r.random() < 0.5, "clip": r.choice([None, 0.05]), "backend": r.choice(["cpu", "reference"]),
        "masters": r.random() < 0.5, "closure": r.random() < 0.5, "noise_seed": r.getrandbits(64),
    }  # fmt: skip
    case["steps"] = [
        {
            "batch": r.getrandbits(32), "branch": r.random() < 0.6, "load": i > 0 and r.random() < 0.1,
            "bad": r.choice([None] * 6 + ["input", "loss", "gradient"]),
        }
        for i in range(5)
    ]  # fmt: skip
    if case["kind"] == "fused":
        case["clip"] = None  # what is clipped is an estimate
    return case


def batch_of(case, step):
    generator = torch.Generator().manual_seed(step["batch"])
    x = torch.randn(12, 6, generator=generator)
    if step["bad"] == "input":
        x[3, 2] = math.nan
    y = torch.randint(3, (12,), generator=generator)
    dtype = getattr(torch, case["dtype"])
    return list(zip(x.to(dtype).chunk(case["parts"]), y.chunk(case["parts"]), strict=True))


def loss_of(out, bias, y, step, parts):
    loss = F.cross_entropy(out, y) / parts
    if step["bad"] == "loss":
        loss = loss + math.inf
    if step["bad"] == "gradient":
        loss = loss + (bias.float() * 0).abs().sum().sqrt()
    return loss


def options_of(rule):
    """Of PyTorch's optimizer; eps is large, so that Adam does not divide rounding by rounding."""
    if rule == "adamw":
        return {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    return {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": rule == "nesterov"}


def grouped(case, named):
    """Groups by hand: what decays, what does not, and learned scales."""
    if not case["groups"]:
        return [{"params": [p for _, p in named]}]
    kinds = [[], [], []]
    for name, p in named:
        kinds[2 if name.endswith("alpha") else 0 if p.ndim > 1 else 1].append(p)
    found = [{"params": kinds[0], "weight_decay": 0.1}, {"params": kinds[1], "weight_decay": 0.0},
             {"params": kinds[2], "weight_decay": 0.0, "lr": ALPHA_LR}]  # fmt: skip
    return [group for group in found if group["params"]]


# ---- the package's own


class Ours:
    def __init__(self, case):
        self.case = case
        self.scaler = None
        if case["scale"]:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=case["scale"], growth_interval=10**6)
        self.make()

    def make(self):
        case = self.case
        torch.manual_seed(case["seed"])
        self.model = Net()
        fk.quantize_model(self.model, PRESETS[case["preset"]], backend=case["backend"])
        self.model.to(getattr(torch, case["dtype"]))
        self.fogzo = fk.Fogzo(
            self.model, total_steps=8, kappa=20.0, directions=case["directions"], seed=case["noise_seed"],
            schedule=case["schedule"], every=case["every"], backend=case["backend"],
        )  # fmt: skip
        fused = case["kind"] != "torch"
        kind = fk if fused else torch.optim
        make = kind.AdamW if case["rule"] == "adamw" else kind.SGD
        added = {"master_weights": case["masters"], "backend": case["backend"]} if fused else {}
        if case["kind"] == "fused":
            added["fogzo"] = self.fogzo
        named = list(self.model.named_parameters())
        self.optimizer = make(grouped(case, named), **options_of(case["rule"]), **added)

    def load(self):
        """Another model, optimizer and Fogzo go on."""
        memory = io.BytesIO()
        torch.save([one.state_dict() for one in (self.model, self.optimizer, self.fogzo)], memory)
        memory.seek(0)
        self.make()
        states = torch.load(memory, weights_only=False)
        for one, state in zip((self.model, self.optimizer, self.fogzo), states, strict=True):
            one.load_state_dict(state)

    def step(self, step):
        case, parts = self.case, batch_of(self.case, step)

        def loss(x, y):
            found = loss_of(self.model(x, step["branch"]), self.model.out.bias, y, step, len(parts))
            return found if self.scaler is None else self.scaler.scale(found)

        (self.model if case["closure"] else self.optimizer).zero_grad(set_to_none=case["none"])
        fused = case["kind"] == "fused"
        if len(parts) == 1 and case["closure"]:
            if fused and self.scaler is None:
                self.optimizer.step(lambda: loss(*parts[0]))
                return
            self.fogzo.run(lambda: loss(*parts[0]))
        else:
            for probe in self.fogzo.probes():
                with probe:
                    for part in parts:
                        probe.backward(loss(*part))
        if not fused:
            self.fogzo.estimate_()
        if self.scaler is None:
            self.clip()
            self.optimizer.step()
            return
        if case["clip"]:
            self.scaler.unscale_(self.optimizer)
            self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def clip(self):
        if self.case["clip"]:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case["clip"])

    def state(self):
        """Parameters, buffers, and the optimizer's state by parameter."""
        kept = {n: t.detach().clone() for n, t in [*self.model.named_parameters(), *self.model.named_buffers()]}
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):  # torch's SGD does not count, and keeps None at first
                    kept[f"{key} of {name}"] = value.detach().clone()
        return kept


# ---- from the contract


class Expected:
    """The latents, and a plain optimizer of PyTorch over what it is to move."""

    def __init__(self, case, ours):
        self.case, self.t = case, 0
        self.plain = Net().to(getattr(torch, case["dtype"]))
        self.fused = case["kind"] != "torch"
        values = dict(ours.model.named_parameters())
        dtype = None if not self.fused else torch.float32  # state and arithmetic of the tail
        self.moved = {n: p.detach().to(dtype or p.dtype, copy=True).requires_grad_() for n, p in values.items()}
        kind = torch.optim.AdamW if case["rule"] == "adamw" else torch.optim.SGD
        self.optimizer = kind(
            grouped(case, list(self.moved.items())), foreach=False, **options_of(case["rule"])
        )
        self.there = dict.fromkeys(values, False)  # whether .grad is a tensor of 0 after zero_grad

    def alpha(self, name, latent, state):
        own = state[name.replace("weight", "alpha")]
        if self.case["preset"] == "lsq":  # held where an update drove it out of range
            least = state[name.replace("weight", "alpha_least")]
            own = torch.where(own >= least, own, least)
        if self.case["preset"] == "bitnet":  # max(mean abs, 1e-5)
            own = torch.empty((), dtype=torch.float32).view(own.shape)
            fk.measure_alphas_([own], [latent], statistic="absmean", least=1e-5, backend=self.case["backend"])
        return own

    def one_minus_beta(self):
        """None where the step is plain straight-through."""
        case = self.case
        final = 20.0 / sum(a * b for a, b in WIDTHS)
        if self.t % case["every"]:
            return None
        return final if case["schedule"] == "constant" else final * min(1.0, self.t / 8)

    def step(self, step, state):
        """What the state of the package must be after the step, by the state before; None: as before."""
        case, grid = self.case, GRIDS[self.case["preset"]]
        parts = batch_of(case, step)
        if case["none"]:  # else .grad that was there is 0 now
            self.there = dict.fromkeys(self.there, False)
        names = [n for n, _ in self.plain.named_parameters()]
        latents = {n: state[n] for n in WEIGHTS}
        alphas = {n: self.alpha(n, latents[n], state) for n in WEIGHTS}
        buffers = {n: state[n].clone() for n, _ in self.plain.named_buffers()}

        def losses(weights, keep):
            """The sum over micro-batches; the gradient pass back-propagates each."""
            total = 0.0
            own = buffers if keep else {n: t.clone() for n, t in buffers.items()}
            for x, y in parts:
                out = functional_call(self.plain, {**weights, **own}, (x, step["branch"]))
                loss = loss_of(out, weights["out.bias"], y, step, len(parts))
                if keep:
                    loss.backward()
                total += loss.detach()
            return torch.as_tensor(total)

        before = {n: t.clone() for n, t in buffers.items()}
        quantized = [torch.empty_like(t) for t in latents.values()]
        fk.quantize_(quantized, [*latents.values()], [*alphas.values()], grid=grid, backend=case["backend"])
        leaves = {n: state[n].clone().requires_grad_() for n in names if n not in WEIGHTS}
        leaves |= {n: q.requires_grad_() for n, q in zip(WEIGHTS, quantized, strict=True)}
        base = losses(leaves, keep=True)
        grads = {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
        g, alpha_grads = {}, {}
        for name in WEIGHTS:
            if name in grads:
                g[name], alpha_grads[name] = self.straight_through(
                    grads[name], latents[name], alphas[name], grid
                )
        taking = [n for n in g if grads[n].any()]
        found = {**{n: t for n, t in grads.items() if n not in WEIGHTS}, **g}
        noise = self.one_minus_beta()
        norm = torch.zeros(())
        if g and noise is not None:
            norm = fk.guide_norm([*g.values()], [alphas[n] for n in g], grid=grid, backend=case["backend"])
        every = [base, norm, *grads.values(), *found.values()]
        if not all(bool(t.isfinite().all()) for t in every):
            return None
        if noise is not None:
            self.probe(latents, alphas, g, taking, norm, noise, lambda w: losses({**leaves, **w}, False), found)
        learned = case["preset"] == "lsq"
        if learned:
            for name in g:
                given = alpha_grads[name] if name in taking else torch.zeros(())
                found[name.replace("weight", "alpha")] = given.float().view(())
        self.t += 1
        return self.update(found, state, buffers, alphas, before)

    def straight_through(self, grad, latent, alpha, grid):
        """g = h' dL/dQ, and dL/dalpha of LSQ."""
        w = latent.double() / alpha.double()
        clips = self.case["preset"] != "bitnet"
        inside = (w > grid.qmin) & (w < grid.qmax) if clips else torch.ones_like(w, dtype=torch.bool)
        code = w.clamp(grid.qmin, grid.qmax).round()
        between = (w >= grid.qmin) & (w <= grid.qmax)
        slope = torch.where(between, code - w, code)
        factor = 1 / math.sqrt(latent.numel() * grid.qmax)
        return grad * inside.to(grad.dtype), factor * (grad.double() * slope).sum()

    def probe(self, latents, alphas, g, taking, norm, noise, loss, found):
        """Replace g in ``found`` by the estimate of the weights that take part."""
        case, number = self.case, self.t
        n, beta = case["directions"], 1 - noise
        latent, guide, scale = ([one[k] for k in taking] for one in (latents, g, alphas))
        ids = [WEIGHTS.index(k) for k in taking]
        common = {"seed": case["noise_seed"], "step": number, "tensor_ids": ids, "backend": case["backend"]}
        estimate = {k: torch.zeros(latents[k].shape, dtype=torch.float64) for k in taking}
        for i in range(n):
            sides = [[torch.empty_like(t) for t in latent] for _ in "+-"]
            if taking:
                fk.perturb_quantize_(
                    *sides, latent, guide, scale, norm, grid=GRIDS[case["preset"]],
                    straight_through=PRESETS[case["preset"]].straight_through, one_minus_beta=noise,
                    direction=i, **common,
                )  # fmt: skip
            with torch.no_grad():
                plus, minus = (float(loss(dict(zip(taking, side, strict=True)))) for side in sides)
            eps = float(torch.tensor(EPS_BAR, dtype=torch.float32))
            c = (plus - minus) / (2 * eps)
            sign = int(fk.direction_sign(seed=case["noise_seed"], step=number, direction=i))
            for k, tensor_id in zip(taking, ids, strict=True):
                u = fk.noise(
                    latents[k].numel(), distribution="uniform", seed=case["noise_seed"], step=number,
                    direction=i, tensor_id=tensor_id, backend=case["backend"],
                ).double().view(latents[k].shape)  # fmt: skip
                delta = alphas[k].double()
                v = math.sqrt(noise) * u
                if norm > 0:
                    v = v + math.sqrt(beta) * sign * delta * g[k].double() / float(norm)
                estimate[k] += c * v / delta / n
        for k in taking:
            found[k] = estimate[k].float()

    def update(self, found, state, buffers, alphas, before):
        """PyTorch's optimizer with these gradients."""
        case, after = self.case, {}
        for name, p in self.moved.items():
            master = f"master of {name}"
            held = alphas.get(name.replace("alpha", "weight")) if name.endswith("alpha") else None
            p.data.copy_(held if held is not None else state[master] if master in state else state[name])
            kept = case["kind"] == "fused"  # of an estimate, .grad is rounded
            if name in found:
                grad = found[name] if kept else found[name].to(state[name].dtype)
                p.grad, self.there[name] = grad.to(p.dtype).view(p.shape), True
            else:
                p.grad = torch.zeros_like(p) if self.there[name] else None
            for key, own in self.optimizer.state.get(p, {}).items():
                theirs = state.get(f"{key} of {name}")
                if theirs is not None and own is not None:
                    own.copy_(theirs)
        if case["clip"]:
            nn.utils.clip_grad_norm_([p for p in self.moved.values() if p.grad is not None], case["clip"])
        self.optimizer.step()
        for name, p in self.moved.items():
            after[name] = p.detach().to(state[name].dtype)
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    after[f"{key} of {name}"] = value.detach()
            if f"master of {name}" in state or (
                case["masters"] and self.fused and state[name].dtype != torch.float32 and p.grad is not None
            ):
                after[f"master of {name}"] = p.detach()
        after |= buffers
        if case["preset"] != "lsq":
            after |= {n.replace("weight", "alpha"): a for n, a in alphas.items()}
        return after


def compare(expected, found, exact, rounded):
    """Raise AssertionError where what the package left is not what was expected.

    Args:
        exact: the step is lost.
        rounded: an estimate in ``.grad`` is of bfloat16, and may be rounded the other way.
    """
    for name, value in found.items():
        if name.endswith("alpha_least") or (exact and name.endswith("alpha") and "of" not in name):
            continue  # a measured scale is that of the weight as it is
        if name.startswith("step of") and name not in expected:
            continue  # a fused SGD counts, torch's does not
        want = expected[name]
        if exact:
            assert torch.equal(want, value), f"{name} changed in a step that is lost"
            continue
        close = 2**-6 if rounded or value.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            value.double(), want.double(), rtol=close, atol=close * max(1e-2, float(want.abs().max())) / 4,
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip
    missing = [name for name in expected if name not in found]
    assert not missing, f"missing: {missing}"


def run(seed):
    """One loop; an AssertionError tells of a difference, with the case and the step."""
    case = drawn(seed)
    ours = Ours(case)
    expected = Expected(case, ours)
    lost = 0
    for i, step in enumerate(case["steps"]):
        try:
            if step["load"]:
                ours.load()
                expected.there = dict.fromkeys(expected.there, False)
            before = ours.state()
            want = expected.step(step, before)
            ours.step(step)
            found = ours.state()
            rounded = case["dtype"] == "bfloat16" and case["kind"] != "fused"
            compare(before if want is None else want, found, exact=want is None, rounded=rounded)
            lost += want is None
            if want is None:
                there = {n: p.grad is not None for n, p in ours.model.named_parameters()}
                expected.there = there
            assert ours.fogzo.steps == expected.t
            assert ours.fogzo.diagnostics()["lost_steps"] == lost
            if ours.scaler is not None:
                assert ours.scaler.get_scale() == case["scale"] / 2**lost
        except Exception as error:
            raise AssertionError(f"loop {seed}, step {i}: {error}\n{case}") from error


def many(first, loops, seconds=math.inf):
    """How many loops ran, in so many seconds at most."""
    end, done = time.monotonic() + seconds, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while done < loops and time.monotonic() < end:
            run(first + done)
            done += 1
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0, help="of the first loop; the next has the next seed")
    parser.add_argument("--loops", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=math.inf)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = many(arguments.seed, arguments.loops, arguments.seconds)
    print(f"{done} loops from seed {arguments.seed}: no difference")
