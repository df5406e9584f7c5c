"""Weights under FSDP2's ``fully_shard``: each process keeps some rows, and packed codes are gathered."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import dequantize, measure_alphas_, quantize_
from ..nn.module import QuantizedModule
from ..nn.pass_weight import PassWeight
from ..nn.view import DTensor, FSDPModule, Placement, local
from ..nn.weight import hold_alphas, rotated_rows
from ..spec.scale import LearnedScale, MeasuredScale
from . import packing

if dist.is_available():
    from torch.distributed.tensor import Replicate, Shard
else:  # a build of PyTorch without it
    Replicate = Shard = ()  # type: ignore[assignment,misc]

#: What FSDP looks for on the local part of a parameter: its own hook around the gathering of it.
HOOKS = ("fsdp_pre_all_gather", "fsdp_post_all_gather")


class ShardedRows(Placement):
    """The rows of a weight that this process holds, and what FSDP gathers in their place.

    FSDP asks the local tensor for what to send, and hands over what came: codes, of which the whole weight's
    values are made, in the dtype that its policy says. In a pass of FOGZO they are what the pass runs with,
    else those of Q(weight). Latents are never sent.
    """

    is_whole, sends_codes = False, True

    def __init__(self, module: QuantizedModule, weight: DTensor) -> None:
        self.weight = weight
        self._module = weakref.ref(module)  # one of those that have the weight, which all quantize alike
        self._held: Tensor | None = None  # packed codes of a pass
        self.in_pass = False

    @property
    def module(self) -> QuantizedModule:
        found = self._module()
        assert found is not None
        return found

    # ---- where the rows lie in the weight

    def check(self, name: str) -> None:
        cut = [p for p in self.weight.placements if not isinstance(p, Replicate)]
        if cut != [Shard(0)] or self.module.OUTPUTS != 0:
            raise ValueError(
                f"{name} must be sharded by its rows, dimension 0 of an (outputs, inputs) weight, over one"
                f" dimension of its mesh, got placements {self.weight.placements} of shape"
                f" {tuple(self.weight.shape)}"
            )
        if local(self.weight).device.type != self.weight.device_mesh.device_type:
            raise ValueError(f"{name} must not be offloaded, got it on {local(self.weight).device}")

    @property
    def dimension(self) -> int:
        """Of the mesh, that over which the rows are spread."""
        return next(i for i, p in enumerate(self.weight.placements) if isinstance(p, Shard))

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes that have other rows of the weight."""
        return self.weight.device_mesh.get_group(self.dimension)

    @property
    def size(self) -> int:
        """How many processes they are."""
        return self.weight.device_mesh.size(self.dimension)

    @property
    def most(self) -> int:
        """Rows of the first process, the most that one has."""
        return -(-self.weight.shape[0] // self.size)

    @property
    def first(self) -> int:
        """The place of the first row of this process."""
        return self.weight.device_mesh.get_local_rank(self.dimension) * self.most

    def own(self, tensor: Tensor) -> Tensor:
        """Of a tensor with one element, or something for each row of the weight, what belongs to these rows."""
        if tensor.numel() == 1:
            return tensor
        return tensor[self.first : self.first + local(self.weight).shape[0]]

    def put(self, tensor: Tensor, own: Tensor) -> None:
        """Write what belongs to these rows."""
        self.own(tensor).copy_(own)

    @property
    def layout(self) -> tuple[int, int, int]:
        """Where the rows lie among the weight's elements (docs/contract.md, section 2)."""
        count = self.weight.shape[1:].numel()
        own = max(local(self.weight).numel(), 1)
        return min(self.first * count, self.weight.numel()), own, own

    def own_row(self, row: int) -> int | None:
        return row - self.first if 0 <= row - self.first < local(self.weight).shape[0] else None

    # ---- what is gathered

    def hold(self, modules: list[QuantizedModule], held: PassWeight | None) -> None:
        if held is not None:
            shard(self.module)  # FSDP may have filled up a shard anew since
        self._held, self.in_pass = None if held is None else self._sent(held.rows), held is not None

    def _sent(self, codes: Tensor) -> Tensor:
        """Packed codes, as many as the first process has: what is gathered is of one size."""
        missing = self.most - codes.shape[0]
        return packing.pack(F.pad(codes, (0, 0, 0, missing)).contiguous(), self.module.quantizer.grid)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The int8 codes of Q of these rows, as they are outside a pass."""
        module = self.module
        rows, how = module.rows(local(self.weight)), module.quantizer
        if isinstance(how.scale, LearnedScale):
            hold_alphas([module], ("alpha",))
        measure_sharded_([module], module.backend)
        out = torch.empty_like(rows, dtype=torch.int8)
        quantize_(
            out, rows.detach(), self.own(module.alpha.detach()), grid=how.grid, transform=how.transform,
            backend=module.backend,
        )  # fmt: skip
        return out

    def fsdp_pre_all_gather(self, mesh: object) -> tuple[tuple[Tensor], None]:
        """What FSDP is to send for these rows.

        With this signature it lets all processes send one size, and does not ask for that of the rows.
        """
        return (self._sent(self.codes()) if self._held is None else self._held,), None

    @torch.no_grad()
    def fsdp_post_all_gather(
        self, sent: tuple[Tensor], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """The whole weight's values of what all have sent."""
        module, grid = self.module, self.module.quantizer.grid
        count = self.weight.shape[1:].numel()
        codes = packing.unpack(sent[0].view(self.size, -1), self.most * count, grid)
        rows = codes.reshape(-1, count)[: self.weight.shape[0]]
        values = module.shaped(dequantize(rows, module.alpha.detach(), grid=grid, dtype=dtype)).contiguous()
        if out is None:
            return values, (values,)
        with torch.autograd._unsafe_preserve_version_counter(out):
            local(out).copy_(values)
        return None

    # ---- what modules run with

    def rows(self, module: QuantizedModule) -> Tensor:
        """Rows of what was gathered: those of the pass, with a gradient dL/dQ in the gradient pass.

        Raises:
            RuntimeError: nothing was gathered.
        """
        weight = module.weight
        if isinstance(weight, DTensor):
            raise RuntimeError(
                "weight must be gathered before it is used: run the forward of the module that fully_shard was"
                " given, not that of a part of it"
            )
        if not (torch.compiler.is_compiling() or hasattr(local(self.weight), HOOKS[0])):
            raise RuntimeError(
                "weight must be the shard that was seen when fully_shard or quantize_model made it, got one"
                " that was made anew since: quantize or load the model again after it was moved"
            )
        rows = module.rows(weight)
        if self.in_pass or not (weight.requires_grad and torch.is_grad_enabled()):
            return rows
        outside: Tensor = OutsideOfPass.apply(rows)
        return outside


class OutsideOfPass(torch.autograd.Function):
    """The identity, without a gradient: h' is applied at the end of FOGZO's gradient pass only."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(
            "backward through a quantized weight under fully_shard must be that of a pass of Fogzo, which makes"
            " straight-through gradients of what is reduced; for plain straight-through training let start of"
            " Fogzo be 1"
        )


def shard(module: QuantizedModule) -> None:
    """Let FSDP gather codes of a module's weight, where it has sharded it."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, DTensor):
        return
    rows = getattr(local(weight), HOOKS[0], None)
    rows = rows.__self__ if rows is not None else ShardedRows(module, weight)
    for name in HOOKS:
        setattr(local(weight), name, getattr(rows, name))
    object.__setattr__(module, "placement", rows)


def begin_anew(model: nn.Module) -> None:
    """Let FSDP see the hooks of weights that were quantized after it had sharded them."""
    for module in [m for m in model.modules() if isinstance(m, FSDPModule)]:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            for parameter in group.fsdp_params if group is not None else ():
                info = parameter._module_info
                owners = [m for m in (info.module, *info.shared_modules) if isinstance(m, QuantizedModule)]
                for owner in owners if info.param_name == "weight" else ():
                    shard(owner)
                if owners and hasattr(local(parameter.sharded_param), HOOKS[0]):
                    parameter._init_extensions()
                    parameter.all_gather_outputs = []
                    parameter.__dict__.pop("_unsharded_param", None)


# ---- alphas that are measured


def measure_sharded_(modules: Sequence[QuantizedModule], backend: str | None) -> None:
    """Write the alphas that scales measure, of modules whose weights are sharded: one exchange for all.

    Those of rows and groups have the bits of one process; of a whole weight, absmax has, and the others are
    within rounding.
    """
    asked = [m for m in modules if isinstance(m.quantizer.scale, MeasuredScale)]
    found = [_measured(m, backend) for m in asked]
    if not asked:
        return
    sent = torch.cat([own.view(-1) for own in found])
    rows = asked[0].placement
    assert isinstance(rows, ShardedRows)
    came = sent.new_empty(rows.size, sent.numel())
    dist.all_gather(list(came.unbind()), sent, group=rows.group)
    for m, all_own in zip(asked, came.split([own.numel() for own in found], dim=1), strict=True):
        if m.alpha.numel() == 1:
            m.alpha.fill_(_combined(m, all_own.view(-1)))
        else:
            m.alpha.copy_(all_own.reshape(-1, *m.alpha.shape[1:])[: m.alpha.shape[0]])


def _measured(module: QuantizedModule, backend: str | None) -> Tensor:
    """Of one's own rows: alphas, for as many rows as the first process has; or the statistic of all."""
    scale, rows, alpha = module.quantizer.scale, module.placement, module.alpha
    assert isinstance(scale, MeasuredScale)
    assert isinstance(rows, ShardedRows)
    data = module.rows(local(rows.weight).detach())
    if scale.statistic != "rms":
        (data,) = rotated_rows([data], module.quantizer.transform, backend)
    if alpha.numel() == 1:
        out = torch.zeros_like(alpha)
        measure_alphas_(out, data, statistic=scale.statistic, backend=backend)
        return out
    out = alpha.new_zeros(rows.most, *alpha.shape[1:])
    measure_alphas_(
        out[: data.shape[0]], data, statistic=scale.statistic, factor=scale.factor, add=scale.add,
        least=scale.least, backend=backend,
    )  # fmt: skip
    return out


def _combined(module: QuantizedModule, statistics: Tensor) -> Tensor:
    """Alpha of the statistics of all processes' rows."""
    scale, rows = module.quantizer.scale, module.placement
    assert isinstance(scale, MeasuredScale)
    assert isinstance(rows, ShardedRows)
    if scale.statistic == "absmax":
        whole = statistics.amax()
    else:
        power = 2 if scale.statistic == "rms" else 1
        counts = [max(min(rows.most, rows.weight.shape[0] - i * rows.most), 0) for i in range(rows.size)]
        shares = torch.tensor(counts, dtype=torch.float64, device=statistics.device) / rows.weight.shape[0]
        whole = (statistics.double() ** power * shares).sum() ** (1 / power)
    return torch.clamp(scale.factor * (whole.float() + scale.add), min=scale.least)
