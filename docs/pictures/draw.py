"""Draw the pictures of the documents: `python docs/pictures/draw.py` writes them, `--check` compares.

A picture has boxes and arrows on a grid. Its colours follow the light or dark theme of the page.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
CELL, ROW, HEIGHT, PAD = 150, 74, 44, 12
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2937 }
  .small { font-size: 11px; fill: #4b5563 }
  rect { fill: #f3f4f6; stroke: #9ca3af; rx: 6 }
  .weight { fill: #dbeafe; stroke: #3b82f6 } .loss { fill: #fef3c7; stroke: #d97706 }
  .noise { fill: #dcfce7; stroke: #16a34a } .room { fill: #ede9fe; stroke: #7c3aed }
  path { fill: none; stroke: #6b7280; stroke-width: 1.5; marker-end: url(#arrow) }
  marker path { fill: #6b7280; stroke: none; marker-end: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e5e7eb } .small { fill: #9ca3af } rect { fill: #1f2937; stroke: #6b7280 }
    .weight { fill: #1e3a8a } .loss { fill: #78350f } .noise { fill: #14532d } .room { fill: #4c1d95 }
    path { stroke: #9ca3af } marker path { fill: #9ca3af }
  }
"""


@dataclass(frozen=True)
class Box:
    """A box at a place of the grid; ``wide`` counts cells."""

    column: float
    row: float
    text: str
    kind: str = ""
    small: str = ""
    wide: float = 1

    @property
    def left(self) -> float:
        return self.column * CELL + PAD

    @property
    def top(self) -> float:
        return self.row * ROW + PAD

    @property
    def width(self) -> float:
        return self.wide * CELL - 34

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def middle(self) -> float:
        return self.top + HEIGHT / 2

    @property
    def centre(self) -> float:
        return self.left + self.width / 2

    def drawn(self) -> str:
        y = self.top + (18 if self.small else 27)
        size = f'x="{self.left}" y="{self.top}" width="{self.width}" height="{HEIGHT}"'
        lines = [f'<rect class="{self.kind}" {size}/>', words(self.centre, y, self.text)]
        if self.small:
            lines.append(words(self.centre, y + 16, self.small, "small"))
        return "\n".join(lines)


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def line(*points: tuple[float, float]) -> str:
    """A line with an arrow at its end."""
    return f'<path d="M{" L".join(f"{x} {y}" for x, y in points)}"/>'


def right(a: Box, b: Box) -> str:
    return line((a.right, a.middle), (b.left - 2, b.middle))


def left(a: Box, b: Box) -> str:
    return line((a.left, a.middle), (b.right + 2, b.middle))


def down(a: Box, b: Box) -> str:
    return line((a.centre, a.top + HEIGHT), (a.centre, b.top - 2))


def picture(title: str, width: float, height: float, parts: list[Box | str]) -> str:
    w, h = width * CELL, height * ROW + PAD
    body = "\n".join(part.drawn() if isinstance(part, Box) else part for part in parts)
    head = (
        '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img"'
        f' aria-label="{escape(title)}">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f'<defs>{head}<path d="M0 0 L8 4 L0 8 z"/></marker></defs>\n{body}\n</svg>\n'
    )


def step() -> str:
    names = ("Q(w)", "Q(w + eps v)", "Q(w - eps v)")
    q = [Box(1, row, name, "weight") for row, name in zip((0, 2, 3), names, strict=True)]
    model = [Box(2.15, row, "model(batch)") for row in (0, 2, 3)]
    losses = [Box(3.3, row, name, "loss") for row, name in zip((0, 2, 3), ("loss L", "L+", "L-"), strict=True)]
    latent = Box(0, 0, "latents", "weight", "w = latent / delta")
    guide = Box(3.3, 1, "guide g", "noise", "straight-through")
    mixed = Box(1, 1, "v", "noise", "guide and noise u")
    estimate = Box(4.45, 2.5, "G = c v / delta", "loss", "c = (L+ - L-) / 2 eps")
    update = Box(4.45, 3.5, "optimizer", "", "moves the latents")
    side, low = mixed.left - 18, q[2].middle
    around = (mixed.left, mixed.middle), (side, mixed.middle), (side, low), (q[2].left - 2, low)
    return picture("A step of FOGZO", 5.5, 4.3, [
        latent, *q, *model, *losses, guide, mixed, estimate, update, right(latent, q[0]),
        *[right(a, b) for a, b in zip(q, model, strict=True)],
        *[right(a, b) for a, b in zip(model, losses, strict=True)], down(losses[0], guide), left(guide, mixed),
        words(losses[0].centre + 6, guide.top - 10, "backward", "small", "start"), down(mixed, q[1]),
        line(*around),
        right(losses[1], estimate), right(losses[2], estimate), down(estimate, update),
        words(latent.left, q[1].middle + 4, "probes run", "small", "start"),
        words(latent.left, q[1].middle + 19, "without autograd", "small", "start"),
    ])  # fmt: skip


def guided() -> str:
    latent = Box(0, 0, "latents", "weight", "w = latent / delta")
    q, model, loss = Box(1, 0, "Q(w)", "weight"), Box(2.15, 0, "model(batch)"), Box(3.3, 0, "loss L", "loss")
    guide = Box(3.3, 1.1, "gradient g", "noise", "straight-through")
    estimate = Box(1.6, 1.1, "g + noise", "noise", "in proportion to g", 1.2)
    update = Box(0, 1.1, "optimizer", "", "moves the latents", 1.1)
    return picture("A step with guided noise", 4.3, 1.9, [
        latent, q, model, loss, guide, estimate, update, right(latent, q), right(q, model), right(model, loss),
        down(loss, guide), words(loss.centre + 6, guide.top - 12, "backward", "small", "start"),
        left(guide, estimate), left(estimate, update),
    ])  # fmt: skip


def layers() -> str:
    rooms = [
        ("your loop, Trainer, Lightning, accelerate", "integrations/", ""),
        ("Fogzo, attach; AdamW, SGD", "train/  optim/", "room"),
        ("quantized modules, rules, reports; FSDP2, DDP", "nn/  distributed/", "weight"),
        ("functional ops over lists: checks, autograd, fakes", "ops/", "noise"),
        ("triton | cuda | cpu | reference", "backends/  csrc/", "loss"),
        ("grids, scales, noise: numbers of the contract", "spec/", ""),
    ]
    boxes = [Box(0, i, text, kind, small, 3) for i, (text, small, kind) in enumerate(rooms)]
    arrows = [down(a, b) for a, b in pairwise(boxes)]
    return picture("The layers of the package", 3, 5.8, [*boxes, *arrows])


def weight() -> str:
    parts = [
        ("quantize_model", "a module gets a quantizer", "room"),
        ("latent and alpha", "parameters, state dict", "weight"),
        ("Q(w) in a step", "one call for all weights", "weight"),
        ("update", "the optimizer moves latents", "loss"),
        ("checkpoint", "latents, alphas, quantizers", ""),
        ("export", "packed codes and scales", "noise"),
    ]
    boxes = [
        Box(1.45 * (i % 3), 1.2 * (i // 3), text, kind, small, 1.4)
        for i, (text, small, kind) in enumerate(parts)
    ]
    between, turn = boxes[3].top - 16, boxes[3].centre
    back = line(
        (boxes[2].centre, boxes[2].top + HEIGHT), (boxes[2].centre, between), (turn, between),
        (turn, boxes[3].top - 2),
    )  # fmt: skip
    pairs = [(0, 1), (1, 2), (3, 4), (4, 5)]
    return picture(
        "The life of a weight", 4.3, 2, [*boxes, back, *[right(boxes[a], boxes[b]) for a, b in pairs]]
    )


PICTURES = {"step": step, "guided": guided, "layers": layers, "weight": weight}


def main(argv: list[str]) -> int:
    stale = []
    for name, draw in PICTURES.items():
        path, drawn = HERE / f"{name}.svg", draw()
        if "--check" in argv:
            stale += [name] * (not path.exists() or path.read_text() != drawn)
        else:
            path.write_text(drawn)
    if stale:
        print(f"{', '.join(stale)}: run python docs/pictures/draw.py")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
