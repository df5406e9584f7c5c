"""Gives modules the rows of weights that processes share: each process has a part.

Under FSDP2's ``fully_shard`` a process keeps some rows, and packed codes are gathered. Under tensor parallelism
a process quantizes its part and multiplies by it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import dequantize, quantize_
from ..nn.quantized import QuantizedWeight
from ..nn.tied import quantized_at
from ..nn.view import Part, PassWeight, Placement, Quantized, is_dtensor, is_fsdp, local, place
from ..nn.weight import hold_alphas, measure_
from ..spec.scale import LearnedScale, MeasuredScale
from .packing import code_bits, pack_codes, unpack_codes

if TYPE_CHECKING:
    import torch.distributed.tensor
    from torch.distributed.tensor import DTensor

#: FSDP looks for these on the local part of a parameter, and calls them around the gathering of it.
HOOKS = ("fsdp_pre_all_gather", "fsdp_post_all_gather")


class ShardedRows(Placement):
    """Knows the rows of a weight that this process has, and gives FSDP codes to gather in their place.

    FSDP asks the local tensor for what to send, and hands over what came. These are codes; the values of the
    whole weight are made of them, in the dtype of FSDP's policy. In a pass of FOGZO they are the codes that the
    pass runs with, else the codes of Q(weight). Latents are never sent.

    Attributes:
        size: how many processes have rows.
        most: how many rows the first process has, the most of all.
    """

    is_whole, sends_codes = False, True

    def __init__(self, module: QuantizedWeight, weight: DTensor) -> None:
        self.weight = weight
        self._module = weakref.ref(module)  # any of the modules that share the weight: all quantize alike
        self._packed: Tensor | None = None  # codes of a pass
        spread = [i for i, p in enumerate(weight.placements) if isinstance(p, dist.tensor.Shard)]
        self._dimension = spread[0] if spread else 0  # of the mesh
        self.size = weight.device_mesh.size(self._dimension)
        self.most = -(-weight.shape[0] // self.size)

    @property
    def module(self) -> QuantizedWeight:
        module = self._module()
        assert module is not None
        return module

    @property
    def part(self) -> Part:
        return part_of(self.weight, 0, self._dimension)

    @property
    def bits(self) -> int:
        """Returns in how many bits a code is sent: 1, 2, 4 or 8, so that no code lies in two bytes."""
        return 1 << (code_bits(self.module.quantizer.grid) - 1).bit_length()

    # ---- which rows they are

    def check(self, name: str) -> None:
        cut = [p for p in self.weight.placements if not isinstance(p, dist.tensor.Replicate)]
        if cut != [dist.tensor.Shard(0)] or self.module.OUTPUTS != 0:
            raise ValueError(
                f"{name} must be sharded by its rows, dimension 0 of an (outputs, inputs) weight, over one"
                f" dimension of its mesh, got placements {self.weight.placements} of shape"
                f" {tuple(self.weight.shape)}"
            )
        if local(self.weight).device.type != self.weight.device_mesh.device_type:
            raise ValueError(f"{name} must not be offloaded, got it on {local(self.weight).device}")

    # ---- what is gathered

    def hold(self, modules: list[QuantizedWeight], pass_weight: PassWeight | None) -> None:
        if pass_weight is not None:
            place(self.module)  # FSDP may have filled up a shard anew since
        self._packed = None if pass_weight is None else self._sent(pass_weight.rows)

    def _sent(self, codes: Tensor) -> Tensor:
        """Packs codes, as many as the first process has. FSDP gathers the same size of all processes."""
        padded = F.pad(codes, (0, 0, 0, self.most - codes.shape[0]))
        return pack_codes(padded.flatten(), self.module.quantizer.grid, self.bits)

    @torch.no_grad()
    def _codes(self) -> Tensor:
        """Returns the int8 codes of Q of these rows."""
        module = self.module
        rows, how = module.rows(local(self.weight)), module.quantizer
        if isinstance(how.scale, LearnedScale):
            hold_alphas([module], ("alpha",))
        measure_sharded_([module], module.backend)
        out, alpha = torch.empty_like(rows, dtype=torch.int8), self.part.own(module.alpha.detach())
        quantize_(out, rows.detach(), alpha, grid=how.grid, transform=how.transform, backend=module.backend)
        return out

    def fsdp_pre_all_gather(self, mesh: object) -> tuple[tuple[Tensor], None]:
        """Returns what FSDP is to send. With this signature FSDP lets all processes send the same size."""
        return (self._sent(self._codes()) if self._packed is None else self._packed,), None

    @torch.no_grad()
    def fsdp_post_all_gather(
        self, sent: tuple[Tensor], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """Makes the whole weight's values of what all processes have sent."""
        module, grid = self.module, self.module.quantizer.grid
        count = self.weight.shape[1:].numel()
        codes = unpack_codes(sent[0].view(self.size, -1), self.most * count, grid, self.bits)
        rows = codes.reshape(-1, count)[: self.weight.shape[0]]
        values = module.shaped(dequantize(rows, module.alpha.detach(), grid=grid, dtype=dtype)).contiguous()
        if out is None:
            return values, (values,)
        with torch.autograd._unsafe_preserve_version_counter(out):
            local(out).copy_(values)
        return None

    def rows(self, module: QuantizedWeight, weight: Tensor, quantized: Quantized) -> Tensor:
        """Returns the gathered values; in the gradient pass they have a gradient, dL/dQ.

        Raises:
            RuntimeError: nothing was gathered, or FSDP's shard is another tensor than the one with the hooks.
        """
        if is_dtensor(weight):
            raise RuntimeError(
                "weight must be gathered before it is used: run the forward of the module that fully_shard was"
                " given, not that of a part of it"
            )
        if not (torch.compiler.is_compiling() or hasattr(local(self.weight), HOOKS[0])):
            raise RuntimeError(
                "the shard of a weight was replaced after fully_shard or quantize_model: quantize or load the"
                " model again after you move it"
            )
        rows = module.rows(weight)
        if self.attached or self._packed is not None or not (weight.requires_grad and torch.is_grad_enabled()):
            return rows
        refusing: Tensor = RefuseBackward.apply(rows)
        return refusing

    # ---- measured alphas

    def measured(self, module: QuantizedWeight, backend: str | None) -> Tensor:
        """Measures alphas of these rows, padded to as many as the first process has; or their one statistic."""
        rows, scale = module.rows(local(self.weight).detach()), module.quantizer.scale
        assert isinstance(scale, MeasuredScale)
        if module.alpha.numel() == 1:
            scale = replace(scale, factor=1.0, add=0.0, least=0.0)
            out = own = torch.zeros_like(module.alpha)
        else:
            out = module.alpha.new_zeros(self.most, *module.alpha.shape[1:])
            own = out[: len(rows)]
        measure_([own], [rows], scale, module.quantizer.transform, backend)
        return out

    def combined(self, scale: MeasuredScale, statistics: Tensor) -> Tensor:
        """Makes alpha of the statistics of all processes' rows."""
        if scale.statistic == "absmax":
            whole = statistics.amax()
        else:
            power, rows = 2 if scale.statistic == "rms" else 1, self.weight.shape[0]
            counts = [max(min(self.most, rows - i * self.most), 0) for i in range(self.size)]
            shares = torch.tensor(counts, dtype=torch.float64, device=statistics.device) / rows
            whole = (statistics.double() ** power * shares).sum() ** (1 / power)
        return torch.clamp(scale.factor * (whole.float() + scale.add), min=scale.least)


def measure_sharded_(modules: Sequence[QuantizedWeight], backend: str | None) -> None:
    """Write the alphas that scales measure, of modules whose weights are sharded: one exchange for all.

    Alphas of rows and groups have the bits of one process. So has an alpha of a whole weight by absmax; by
    other statistics it differs by rounding.
    """
    plan = [
        (m, m.placement, m.quantizer.scale)
        for m in modules
        if isinstance(m.quantizer.scale, MeasuredScale) and isinstance(m.placement, ShardedRows)
    ]
    if not plan:
        return
    own = [rows.measured(m, backend) for m, rows, _ in plan]
    sent, first = torch.cat([alphas.view(-1) for alphas in own]), plan[0][1]
    came = sent.new_empty(first.size, sent.numel())
    dist.all_gather(list(came.unbind()), sent, group=first.part.group)
    parts = came.split([alphas.numel() for alphas in own], dim=1)
    for (m, rows, scale), every in zip(plan, parts, strict=True):
        if m.alpha.numel() == 1:
            m.alpha.fill_(rows.combined(scale, every.view(-1)))
        else:
            m.alpha.copy_(every.reshape(-1, *m.alpha.shape[1:])[: m.alpha.shape[0]])


def part_of(weight: DTensor, dim: int, dimension: int) -> Part:
    """Returns the part that this process has of a weight, cut along ``dim`` over a dimension of its mesh."""
    mesh, length = weight.device_mesh, weight.shape[dim]
    most = -(-length // mesh.size(dimension))
    first = min(mesh.get_local_rank(dimension) * most, length)
    shape = weight.shape[0], weight.shape[1:].numel()
    return Part(dim, first, local(weight).shape[dim], shape, mesh.get_group(dimension))


class RefuseBackward(torch.autograd.Function):
    """Returns its argument, and refuses a gradient: h' is applied at the end of FOGZO's gradient pass only."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(
            "a quantized weight under fully_shard gets its straight-through gradient from Fogzo: run the"
            " backward in a pass of Fogzo, or call fogzo.attach(optimizer) before it; for plain"
            " straight-through training give Fogzo directions=0 and kappa=0"
        )


class CutWeight(Placement):
    """Lets a module under tensor parallelism quantize its part of the weight, and multiply by it.

    Raises:
        ValueError: tensor parallelism of such a module, or of such a cut, is not offered.
    """

    is_whole = False

    def __init__(self, name: str, module: QuantizedWeight) -> None:
        weight, how = cast("DTensor", module.latent), module.quantizer
        placements = weight.placements
        dim = placements[0].dim if len(placements) == 1 and type(placements[0]) is dist.tensor.Shard else None
        reason = None
        if dim not in (0, 1) or weight.ndim != 2 or module.OUTPUTS != 0:
            reason = f"cut by rows or columns over a mesh of one dimension, got {placements}"
        elif how.transform is not None or module.activation is not None or getattr(module, "product", None):
            reason = "without transform and quantized inputs, got one with"
        elif isinstance(how.scale, MeasuredScale):
            reason = f"with a fixed or learned scale, got {how.scale}"
        elif local(module.alpha) is not module.alpha:
            reason = "quantized after parallelize_module, which would cut the scales, got it quantized before"
        if reason is not None:
            raise ValueError(f"{name} must be, for tensor parallelism, {reason}")
        assert dim is not None
        self._part = part_of(weight, dim, 0)

    @property
    def part(self) -> Part:
        return self._part

    def rows(self, module: QuantizedWeight, weight: Tensor, quantized: Quantized) -> Tensor:
        """Returns Q of the part as a DTensor like the weight."""
        alpha, weight = module.alpha, cast("DTensor", weight)
        if module.pass_weight is None and alpha.requires_grad:
            alpha = cast("Tensor", SumOfParts.apply(alpha, self.part))
        rows = quantized(weight.to_local(), self.part.own(alpha).contiguous())
        mesh, placements, shape, stride = weight.device_mesh, weight.placements, weight.shape, weight.stride()
        return dist.tensor.DTensor.from_local(
            rows, mesh, placements, run_check=False, shape=shape, stride=stride
        )


class SumOfParts(torch.autograd.Function):
    """Returns its argument. The gradient is the sum over the processes that have parts."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, part: Part) -> Tensor:
        ctx.part = part
        return alpha.view_as(alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.part.sum(grads[0].contiguous().clone()), None


def shard(module: QuantizedWeight) -> None:
    """Let FSDP gather codes of a module's weight, which it has sharded."""
    weight = cast("DTensor", module.latent)
    hook = getattr(local(weight), HOOKS[0], None)
    rows = ShardedRows(module, weight) if hook is None else hook.__self__
    for name in HOOKS:
        setattr(local(weight), name, getattr(rows, name))
    object.__setattr__(module, "placement", rows)


def begin_anew(model: nn.Module) -> None:
    """Let FSDP see the hooks of weights that were quantized after it had sharded them."""
    for module in model.modules():
        if not is_fsdp(module):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            for parameter in group.fsdp_params if group is not None else ():
                info = parameter._module_info
                owners = [
                    owner
                    for m in (info.module, *info.shared_modules)
                    if (owner := quantized_at((m, info.param_name))) is not None
                ]
                for owner in owners:
                    place(owner)
                if owners and hasattr(local(parameter.sharded_param), HOOKS[0]):
                    parameter._init_extensions()
                    parameter.all_gather_outputs = []
                    parameter.__dict__.pop("_unsharded_param", None)
