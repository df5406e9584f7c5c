"""The page on building on the ops: its loop is what Fogzo does around modules."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fogzo_kernels as fk

PAGE = Path(__file__).parents[1] / "docs/frontends.md"


def loop():
    """What the page's example leaves behind, and its start."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    start, rest = code.split("quantized = [", 1)
    found = {}
    exec(compile(start, str(PAGE), "exec"), found)
    found["start"] = [w.clone() for w in found["latents"]]
    exec(compile("quantized = [" + rest, str(PAGE), "exec"), found)
    return found


def test_the_loop_takes_the_steps_of_fogzo_to_the_bit(capsys):
    found = loop()
    assert re.match(r"loss \d\.\d+ -> \d\.\d+; lost .*: \[0, 0, 0\]", capsys.readouterr().out)
    assert found["losses"][-1] < 0.7 * found["losses"][0]
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 8, bias=False))
    with torch.no_grad():
        for p, w in zip(model.parameters(), found["start"], strict=True):
            p.copy_(w)
    scale = fk.Scale.fixed(lambda w: w.abs().mean(1, keepdim=True))
    fk.quantize_model(model, fk.Quantizer(found["GRID"], scale, found["STE"]))
    fogzo = fk.Fogzo(model, total_steps=found["STEPS"], kappa=found["KAPPA"], seed=found["SEED"], directions=1)
    optimizer = fk.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fogzo=fogzo)
    for expected in found["losses"]:
        optimizer.zero_grad()
        loss = optimizer.step(lambda: F.cross_entropy(model(found["x"]), found["y"]))
        assert float(loss) == expected
    for p, w in zip(model.parameters(), found["latents"], strict=True):
        assert torch.equal(p, w)
