"""What goes wrong in the ways people perturb weights today, each figure measured, beside this package's.

MeZO's loop moves the weights themselves, to +eps, -eps and back; noise is drawn from a seeded generator, anew
for each use. Here latents are never written by a probe, and noise is a function of seed, step and element.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fogzo_kernels as fk
from bench.machine import machine

EPS = 1e-3  # MeZO's default
STE = fk.StraightThrough("identity")
Row = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence.peers",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--elements", type=int, default=1_000_000, help="of the weight")
    add("--steps", type=int, default=1000, help="of the loop whose weights are to stay")
    add("--json", type=Path, metavar="FILE", help="write rows and machine")
    return parser.parse_args(argv)


def weight(elements: int, dtype: torch.dtype) -> Tensor:
    """As a layer of a language model has it: normal, 0.02."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(elements, generator=generator) * 0.02).to(dtype)


def loop_(w: Tensor, seed: int) -> None:
    """What MeZO's code does to a weight around its two forwards."""
    for factor in (1, -2, 1):
        generator = torch.Generator().manual_seed(seed)
        w.add_(torch.randn(w.shape, generator=generator, dtype=w.dtype), alpha=factor * EPS)


def share(found: Tensor) -> float:
    return float(found.float().mean())


# ---- the rows


def not_restored(args: argparse.Namespace, dtype: torch.dtype) -> float:
    before = weight(args.elements, dtype)
    after = before.clone()
    loop_(after, 1)
    return share(before != after)


def drift(args: argparse.Namespace, dtype: torch.dtype, bar: tqdm[Any]) -> float:
    """Distance from where the weights began, over their norm, when nothing is learned."""
    before = weight(args.elements // 10, dtype)
    after = before.clone()
    for step in range(args.steps):
        loop_(after, step)
        bar.update()
    return float((after.float() - before.float()).norm() / before.float().norm())


def ours_moved(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Latents that two probes of a step have changed."""
    before = weight(args.elements, dtype)
    latent, out = before.clone(), torch.empty_like(before)
    for plus in (True, False):
        fk.perturb_quantize_(
            out if plus else None,
            None if plus else out,
            latent,
            torch.ones_like(latent),
            torch.tensor(0.02),
            torch.tensor(1.0),
            direction=0,
            grid=fk.Grid.uniform(2),
            straight_through=STE,
            tensor_ids=[0],
            one_minus_beta=1e-6,
            seed=0,
            step=0,
        )
    return share(latent != before)


def lost_noise(args: argparse.Namespace, one_minus_beta: float) -> float:
    """bfloat16 weights that sqrt(1 - beta) u, added to them in their dtype, leaves as they are; u uniform."""
    w = weight(args.elements, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    u = ((torch.rand(w.shape, generator=generator) - 0.5) * 12**0.5).to(w.dtype)
    return share(w + (one_minus_beta**0.5 * 0.02) * u == w)


def noise_of_estimates(args: argparse.Namespace, one_minus_beta: float) -> Tensor:
    """G of this package where there is no guide: c sqrt(1 - beta) u."""
    g, alpha, norm = torch.zeros(args.elements), torch.tensor(1.0), torch.tensor(1.0)
    fk.estimate_gradient_(
        g,
        torch.ones(1),
        torch.zeros(1),
        alpha,
        norm,
        grid=fk.Grid.uniform(2),
        straight_through=STE,
        tensor_ids=[0],
        one_minus_beta=one_minus_beta,
        seed=0,
        step=0,
    )
    return g


def of_two_shards(args: argparse.Namespace) -> float:
    """Elements whose noise differs where two devices draw a half each from a generator with the same seed."""
    whole = torch.randn(args.elements, generator=torch.Generator().manual_seed(3))
    half = args.elements // 2
    parts = [torch.randn(half, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    return share(whole[: 2 * half] != torch.cat(parts))


def ours_of_two_shards(args: argparse.Namespace) -> float:
    half, how = args.elements // 2, {"distribution": "gaussian", "seed": 3, "step": 0, "tensor_id": 0}
    whole = fk.noise(2 * half, **how)  # type: ignore[arg-type]
    parts = [fk.noise(half, **how, layout=(i * half, half, half)) for i in range(2)]  # type: ignore[arg-type]
    return share(whole != torch.cat(parts))


def shared_by_layers(args: argparse.Namespace) -> float:
    """Elements of a second layer with the first one's noise, where each is drawn after seeding again."""
    first, second = (torch.randn(args.elements, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    return share(first == second)


def ours_shared_by_layers(args: argparse.Namespace) -> float:
    first, second = (
        fk.noise(args.elements, distribution="gaussian", seed=5, step=0, tensor_id=i) for i in range(2)
    )
    return share(first == second)


def rows(args: argparse.Namespace, bar: tqdm[Any]) -> Iterator[Row]:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        yield {
            "what": f"weights that a probe leaves changed, {name}",
            "peer": "MeZO's loop",
            "theirs": not_restored(args, dtype),
            "ours": ours_moved(args, dtype),
        }
        yield {
            "what": f"drift in {args.steps} steps at learning rate 0, {name}",
            "peer": "MeZO's loop",
            "theirs": drift(args, dtype, bar),
            "ours": ours_moved(args, dtype),
        }
    for left in (1e-4, 1e-9):
        yield {
            "what": f"elements that noise of 1 - beta = {left:g} does not reach",
            "peer": "added in bfloat16",
            "theirs": lost_noise(args, left),
            "ours": share(noise_of_estimates(args, left) == 0),
        }
    small, large = 1e-9, 0.1
    ratio = noise_of_estimates(args, small) / noise_of_estimates(args, large) / (small / large) ** 0.5
    yield {
        "what": f"relative error of sqrt(1 - beta) for 1 - beta = {small:g}",
        "peer": "beta kept in float32",
        "theirs": abs(float((1 - torch.tensor(1 - small)).sqrt()) / small**0.5 - 1),
        "ours": float((ratio - 1).abs().max()),
    }
    yield {
        "what": "elements with other noise on two devices than on one",
        "peer": "a generator each, one seed",
        "theirs": of_two_shards(args),
        "ours": ours_of_two_shards(args),
    }
    yield {
        "what": "elements of a layer with another layer's noise",
        "peer": "seeded again for each layer",
        "theirs": shared_by_layers(args),
        "ours": ours_shared_by_layers(args),
    }


def table(found: list[Row]) -> str:
    """Markdown."""
    lines = ["| | by | theirs | here |", "|---|---|---|---|"]
    lines += [f"| {r['what']} | {r['peer']} | {r['theirs']:.3g} | {r['ours']:.3g} |" for r in found]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args, where = parse(argv), machine(torch.device("cpu"))
    with tqdm(total=2 * args.steps, unit="step", disable=None) as bar:
        found = list(rows(args, bar))
    print(table(found))
    if args.json:
        given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        whole = {"machine": where, "arguments": given, "rows": found}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
