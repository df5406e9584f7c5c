"""Small models, their training and their weights, for tests of FSDP2; run in processes of their own, too."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import fogzo_kernels as fk
from fogzo_kernels.nn.view import whole

STEPS = 12
LONG = {"learned row", "rotated"}


class Block(nn.Module):
    """Linear layers and dropout; of 5 rows, the fourth of four processes has none."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.down(self.dropout(torch.tanh(self.up(x))))


class Net(nn.Module):
    """Tied embedding and head, BatchNorm, one block that is checkpointed."""

    def __init__(self, width=5):
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.blocks = nn.ModuleList([Block(width), Block(16 if width == 5 else width)])
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.blocks[0](x)
        x = checkpoint(self.blocks[1], x, use_reentrant=False)
        return self.head(self.norm(x))


class Images(nn.Module):
    """Convolutions, of which one has groups, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 1, groups=2)])
        self.head = nn.Linear(4 * 4 * 4, 13)

    def forward(self, tokens):
        x = torch.stack([tokens, tokens.flip(0)], 1).float()[:, :, None, None] / 12 - 0.5
        x = x * torch.linspace(-1, 1, 36).view(6, 6)
        return self.head(self.blocks[1](torch.tanh(self.blocks[0](x))).flatten(1))


IDENTITY = fk.StraightThrough("identity")
SIGN, UNIFORM, SCALE = fk.Grid.sign(), fk.Grid.uniform, fk.Scale
HARD = fk.StraightThrough("hardtanh")
SMOOTH = fk.StraightThrough("tanh", clip=True, noise="gaussian")


def quantizer(grid, scale, straight_through=IDENTITY, transform=None):
    return fk.Quantizer(grid, scale, straight_through, transform=transform)


#: By name: the model, its quantizer, options of Fogzo.
CASES = {
    "fixed": (Net, quantizer(UNIFORM(2), SCALE.fixed(0.3)), {}),
    "learned row": (Net, fk.presets.lsq(2, "row"), {}),
    "learned": (Net, fk.presets.lsq(2), {}),
    "gaussian": (Net, quantizer(SIGN, SCALE.absmax("row"), SMOOTH), {"epsilon_scale": 0.5}),
    "ternary": (Net, quantizer(fk.Grid.ternary(), SCALE.absmax()), {"directions": 2}),
    "sign": (Net, quantizer(SIGN, SCALE.absmean("row"), HARD), {"directions": 3, "epsilon_scale": 0.5}),
    "half_offset(8)": (Net, quantizer(fk.Grid.half_offset(8), SCALE.absmax("row")), {"start": 0.3}),
    "rotated": (Net, quantizer(UNIFORM(2), SCALE.rms("row"), transform=fk.Hadamard(16)), {"every": 2}),
    "guided": (Net, fk.presets.lsq(2, "row"), {"directions": 0, "noise_per": "tensor", "kappa": 1.0}),
    "noise per tensor": (Net, quantizer(UNIFORM(2), SCALE.fixed(0.3)), {"noise_per": "tensor", "kappa": 1.0}),
    "images": (Images, quantizer(UNIFORM(2), SCALE.rms("row")), {}),
}


ONLY_BEFORE = {"images"}  # whose modules fully_shard is given one by one


def made(case, sharded=lambda model: None, before=True):
    """A quantized model; ``sharded`` does what FSDP does, before or after it is quantized."""
    kind, how, _ = CASES[case]
    torch.manual_seed(0)
    model = kind()
    if not before:
        sharded(model)
    rules = [("blocks.0.down", quantizer(UNIFORM(2), SCALE.absmax("row")))] if how.transform else ()
    fk.quantize_model(model, how, rules=rules)
    if before:
        sharded(model)
    return model


def cut(model):
    """What tensor parallelism does: columns of the first layer of a block, rows of the second."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def with_inputs(sharded=lambda model: None):
    """Learned scales of inputs, too, whose gradients FSDP does not see."""
    torch.manual_seed(0)
    model = Net()
    fk.quantize_model(model, fk.presets.lsq(2, "row"), activation=fk.presets.lsq(4))
    fk.calibrate_inputs_(model, lambda: model(batch_of(0)[0]))
    model.norm.reset_running_stats()
    sharded(model)
    fogzo = fk.Fogzo(model, total_steps=STEPS, kappa=0.1, seed=3, directions=1)
    optimizer = optimizer_of(model, fogzo)
    tokens, labels = batch_of(0)
    found = fogzo.check(lambda: F.cross_entropy(model(tokens), labels))
    return train(model, "fixed", fogzo=fogzo, optimizer=optimizer), values_of(model), found


def batch_of(step, rows=slice(None), count=8):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(13, (count,), generator=generator)
    return tokens[rows], (tokens * 5 % 13)[rows]


def train(
    model, case, steps=None, rows=slice(None), count=8, fused=True, first=0, own=0, fogzo=None, optimizer=None
):
    """Losses of a run. Those of the processes with the same rows must be those of one."""
    fogzo = fogzo or fk.Fogzo(
        model, **{"directions": 1, "total_steps": STEPS, "kappa": 0.1, "seed": 3} | CASES[case][2]
    )
    optimizer = optimizer or optimizer_of(model, fogzo if fused else None)
    losses = []
    steps = steps or (STEPS if case in LONG else 8)
    torch.manual_seed(first + own)
    for step in range(first, first + steps):
        tokens, labels = batch_of(step, rows, count)
        optimizer.zero_grad()
        fogzo.run(lambda: F.cross_entropy(model(tokens), labels))  # noqa: B023
        if not fused:
            fogzo.estimate_()
        optimizer.step()
        losses.append(fogzo.stats()["loss"])
    return losses


def run(model, case, how):
    """Losses of a run: by a fused optimizer, by ``estimate_``, or in a stock loop by a hook."""
    return train_attached(model) if how == "attached" else train(model, case, fused=how != "estimate_")


def train_attached(model, steps=8):
    """Losses of a stock loop whose optimizer has guided noise by a hook."""
    fogzo = fk.Fogzo(model, **{"total_steps": STEPS, "seed": 3} | CASES["guided"][2])
    optimizer = optimizer_of(model, None)
    fogzo.attach(optimizer)
    losses = []
    torch.manual_seed(0)
    for step in range(steps):
        tokens, labels = batch_of(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def optimizer_of(model, fogzo):
    groups = fk.parameter_groups(model, weight_decay=0.1, alpha_lr=1e-3)
    options = {"fogzo": fogzo} if fogzo is not None else {}
    return (fk.AdamW if options else torch.optim.AdamW)(groups, lr=1e-2, **options)


def values_of(model):
    """All parameters and buffers, whole, and what it says in evaluation."""
    state = {name: whole(t).clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        state["logits"] = model.eval()(batch_of(99)[0])
    model.train()
    return state
