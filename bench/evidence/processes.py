"""The processes of a run: whose rows are whose, how they share a model, and checkpoints of all of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fogzo_kernels as fk

WAYS = ("none", "ddp", "fsdp")
CHECKPOINT, TOLD = "checkpoint", "run.json"


class Processes:
    """Those that ``torchrun`` has started, or this one alone.

    Args:
        way: ``"none"``, ``"ddp"`` or ``"fsdp"``.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        SystemExit: there are several, and ``way`` does not say what they do together; or none where it does.
    """

    def __init__(self, way: str, device: str) -> None:
        count = int(os.environ.get("WORLD_SIZE", "0"))
        if way == "none" and count > 1:
            raise SystemExit(f"--parallel must be ddp or fsdp with {count} processes, got none")
        if way != "none" and not count:
            raise SystemExit(
                f"--parallel {way} must be run by torchrun --nproc-per-node N -m ..., got no torchrun"
            )
        self.way, self.rank, self.count, self.device = way, 0, 1, device
        if way == "none":
            return
        if device == "cuda":
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    def close(self) -> None:
        if self.way != "none":
            dist.destroy_process_group()

    # ---- a model and its batches

    def shared(self, model: nn.Module, parts: Iterable[nn.Module]) -> nn.Module:
        """The model as they train it; ``parts`` are what FSDP gathers at a time."""
        if self.way == "ddp":
            return DistributedDataParallel(model)
        if self.way == "fsdp":
            mesh = init_device_mesh(self.device.partition(":")[0], (self.count,))
            alphas = fk.learned_alphas(model)
            for part in (*parts, model):
                fully_shard(part, mesh=mesh, ignored_params=alphas)
        return model

    def own(self, rows: Tensor) -> Tensor:
        """The rows of a batch that are this process's."""
        return rows.chunk(self.count)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self.way != "none":
            value = value.clone()
            dist.all_reduce(value)
        return value / self.count

    def any(self, value: bool) -> bool:
        """Whether it is so in one of them; nothing waits for a GPU."""
        if self.way == "none":
            return value
        found = torch.tensor(int(value))
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def clip_(self, parameters: Iterable[nn.Parameter], most: float) -> None:
        """Bound the norm of all gradients. Those of shards and others are no list that PyTorch takes."""
        with_gradient = [p for p in parameters if p.grad is not None]
        sharded = [p for p in with_gradient if isinstance(p, DTensor)]
        kinds = [kind for kind in (sharded, [p for p in with_gradient if not isinstance(p, DTensor)]) if kind]
        norms = [torch.nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds]
        norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        for kind in kinds:
            torch.nn.utils.clip_grads_with_norm_(kind, most, norm)

    # ---- checkpoints: a folder for each, and a link to the last that is whole

    def save(
        self,
        folder: Path,
        told: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        others: dict[str, Any],
    ) -> None:
        """Write the checkpoint of a step, then let the link show it: there is the old one or the new, whole."""
        target = folder / f"{CHECKPOINT}-{told['step']}"
        if self.first:
            shutil.rmtree(target, ignore_errors=True)
        dist.barrier()
        dcp.save(parts_of(model, optimizer, others), checkpoint_id=target)
        if not self.first:
            return
        (target / TOLD).write_text(json.dumps(told))
        link = folder / f"{CHECKPOINT}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(folder / CHECKPOINT)
        for other in folder.glob(f"{CHECKPOINT}-*"):
            if other != target:
                shutil.rmtree(other)

    def told(self, folder: Path) -> dict[str, Any] | None:
        """What the last checkpoint says of its run, or None without one."""
        path = folder / CHECKPOINT / TOLD
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found

    def load(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: dict[str, Any]
    ) -> dict[str, Any]:
        """The last checkpoint into the model and the optimizer; what it has of ``others``."""
        state = parts_of(model, optimizer, others)
        dcp.load(state, checkpoint_id=folder / CHECKPOINT)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return state["others"]


def parts_of(model: nn.Module, optimizer: torch.optim.Optimizer, others: dict[str, Any]) -> dict[str, Any]:
    weights, numbers = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": numbers, "others": others}
