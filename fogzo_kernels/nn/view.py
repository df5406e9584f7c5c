"""WeightView: a quantized weight as a step and an optimizer see it. Placement: where modules get their rows."""

from __future__ import annotations

import operator
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import dequantize
from ..ops.native import put
from ..spec.grid import Grid
from ..spec.quantizer import Quantizer

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

    from .quantized import QuantizedWeight


#: A function that makes a module's rows of a weight, or a part of it, and its scales.
Quantized = Callable[[Tensor, Tensor], Tensor]


def is_dtensor(x: object) -> TypeIs[DTensor]:
    """Says whether an object is a DTensor. None is before PyTorch has loaded the class, which takes long."""
    return isinstance(x, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def is_fsdp(module: object) -> TypeIs[FSDPModule]:
    """Says whether ``fully_shard`` was given a module."""
    return isinstance(module, getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ()))


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process has: all of it, unless it is a DTensor."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor. All processes that have parts of a DTensor must call this."""
    return cast("DTensor", tensor.detach()).full_tensor() if is_dtensor(tensor) else tensor


class PassWeight(NamedTuple):
    """What a module runs with during a pass, instead of quantizing its weight itself."""

    weight: Tensor  # the parameter that the values belong to
    rows: Tensor  # of values, as QuantizedWeight.rows() has them, or of a probe's int8 codes
    probe: bool  # whether they are a probe, without a gradient, or Q(weight)
    deferred: bool = False  # of Q(weight): the weight gets dL/dQ, of which the pass makes g at its end
    ready: bool = False  # whether modules take the rows as they are: values that have their place in the graph
    plain: bool = False  # whether they are ready, and not rotated

    def values(self, alpha: Tensor, grid: Grid) -> Tensor:
        """The rows' values, to the bit those that a probe without codes has."""
        if self.rows.dtype != torch.int8:
            return self.rows
        return dequantize(self.rows, alpha.detach(), grid=grid, dtype=self.weight.dtype)


class Deferred(torch.autograd.Function):
    """Q(latent) that is there already. The latent's gradient is dL/dQ, and that of an alpha that learns 0."""

    generate_vmap_rule = True  # for torch.func, with which a closure may differentiate

    @staticmethod
    def forward(latent: Tensor, alpha: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (alpha,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(alpha) if ctx.needs_input_grad[1] else None, None


class DeferredLists(torch.autograd.Function):
    """Memory of Q of many latents as one node. The gradient of each latent is dL/dQ, none where Q was not used.

    It saves nothing. So one node serves all gradient passes of a run, whatever is written into the memory.
    """

    @staticmethod
    def forward(ctx: Any, memory: Sequence[Tensor], *latents: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple([rows.detach() for rows in memory])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads


class Part(NamedTuple):
    """Says which rows, or which columns, a process has of a weight, which it sees as a matrix."""

    dim: int  # 0: rows, 1: columns
    first: int  # row or column
    length: int
    shape: tuple[int, int]  # of the weight
    group: dist.ProcessGroup  # the processes that have parts

    @property
    def layout(self) -> tuple[int, int, int]:
        """Says which elements of the weight the part holds (docs/contract.md, section 2)."""
        columns = self.shape[1]
        if self.dim == 0:
            own = max(self.length * columns, 1)
            return self.first * columns, own, own
        return self.first, max(self.length, 1), columns

    def own(self, alpha: Tensor) -> Tensor:
        """Returns the scales of the part from the scales of the weight: a view."""
        if alpha.numel() == 1 or (self.dim == 1 and alpha.numel() == self.shape[0]):
            return alpha
        if self.dim == 0:
            return alpha[self.first : self.first + self.length]
        size = self.shape[1] // (alpha.numel() // self.shape[0])
        if self.first % size or self.length % size:
            raise ValueError(f"groups of {size} must not be cut, got a part of {self.length} columns")
        return alpha[:, self.first // size : (self.first + self.length) // size]

    def sum(self, own: Tensor) -> Tensor:
        """Add, in place, what all processes have summed over their parts."""
        dist.all_reduce(own, group=self.group)
        return own


class Placement:
    """Gives a module the rows that it runs with. This class quantizes the weight, which is whole here.

    Attributes:
        is_whole: whether this process has all of the weight; else ``part`` says what it has.
        sends_codes: whether a step writes codes, which the processes send each other. A backward then leaves
            dL/dQ in ``.grad``, of which the step makes g.
        attached: whether the step of an optimizer does so, for backwards outside of passes.
    """

    is_whole: ClassVar[bool] = True
    sends_codes: ClassVar[bool] = False
    attached = False

    @property
    def part(self) -> Part | None:
        return None

    def check(self, name: str) -> None:
        """Raise unless a step can train the part. ``name`` is the weight's, for the message."""

    def rows(self, module: QuantizedWeight, weight: Tensor, quantized: Quantized) -> Tensor:
        """Returns the rows that a module runs with, where its weight is ``weight``."""
        return quantized(weight, module.alpha)

    def hold(self, modules: list[QuantizedWeight], pass_weight: PassWeight | None) -> None:
        """Let the modules that share the weight run with ``pass_weight``, or with None quantize it again."""
        for module in modules:
            vars(module)["pass_weight"] = pass_weight  # without the time that setattr of nn.Module takes


LOCAL = Placement()


class Handlers:
    """Functions for weights that are DTensors, which :mod:`fogzo_kernels.distributed` sets."""

    #: Gives a module whose weight FSDP has sharded its ``placement``.
    shard: Callable[[QuantizedWeight], None]
    #: Makes the placement of a module's weight under tensor parallelism. The name is for messages.
    cut: Callable[[str, QuantizedWeight], Placement]
    #: Lets FSDP see weights that were quantized after it had sharded them.
    begin_anew: Callable[[nn.Module], None]


HANDLERS = Handlers()


def place(module: QuantizedWeight) -> None:
    """Set a module's placement after it got a weight. Only FSDP sets DTensors on modules that are quantized."""
    if is_dtensor(module.registered):
        HANDLERS.shard(module)


def placement_of(module: QuantizedWeight, weight: Tensor, name: str = "weight") -> Placement:
    """Returns which part of its weight a module has; raises ValueError if it cannot train such a part."""
    if module.placement is not LOCAL or local(weight) is weight:
        return module.placement
    return HANDLERS.cut(name, module)


def reshard(model: nn.Module) -> None:
    """Let modules under ``fully_shard`` have their shards, as before a forward."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()


class WeightView:
    """Gives a step the rows of a quantized parameter, and its modules the rows of a pass.

    Ops take the parameter, its gradient and its state as rows: views of the memory that they lie in. Of a
    DTensor these are the rows of the part that this process has; scales and layout are then of that part.
    """

    def __init__(self, name: str, module: QuantizedWeight) -> None:
        self.name = name  # of the first module that has it
        self.parameter, self.tensor_id = module.latent, module.tensor_id
        self.modules = [module]
        self.placement = placement_of(module, self.parameter, name)
        self.placement.check(name)
        self.numel = self.parameter.numel()  # of the whole weight
        self._memory: Tensor | None = None
        self.deferred = False  # whether .grad gets dL/dQ in gradient passes
        self.rotated = False  # whether Q is in the basis of the quantizer's transform

    #: Of an expert, the stack that it lies in.
    stack: WeightView | None = None
    row = 0

    @property
    def whole(self) -> WeightView:
        """Returns the view of the whole parameter."""
        return self.stack or self

    @property
    def expert_count(self) -> int:
        """Returns how many weights the parameter holds on all processes."""
        return self.modules[0].expert_count or 1

    def pieces(self) -> list[WeightView]:
        """Returns the weights that this process has of the parameter: itself, or the experts of a stack."""
        if self.modules[0].expert_count is None:
            return [self]
        part = self.placement.part
        first, count = (0, self.expert_count) if part is None else (part.first, part.length)
        return [ExpertView(self, first + row, row) for row in range(count)]

    def rows(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of the parameter's shape as ops take it, a view where it lies in memory as rows."""
        return self.modules[0].rows(local(tensor))

    @property
    def latent(self) -> Tensor:
        """Returns the parameter's rows."""
        rows = self.rows(self.parameter)
        return rows if rows is self.parameter else rows.detach()

    @property
    def layout(self) -> tuple[int, int, int] | None:
        """Says which elements of the parameter the rows hold, if they are not all of it."""
        part = self.placement.part
        return None if part is None else part.layout

    @property
    def by_rows(self) -> bool:
        """Says whether rows without a gradient get no noise: entries of an embedding that are in no batch."""
        return all(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in self.modules)

    def guide(self) -> Tensor | None:
        """Returns the rows of ``.grad``, or None. What is written to them is written to ``.grad``."""
        grad, module = self.parameter.grad, self.modules[0]
        if grad is None:
            return None
        if local(grad) is grad and not module.in_rows(grad):
            self.parameter.grad = grad = module.shaped(module.rows(grad).contiguous())
        return self.rows(grad)

    @property
    def alpha(self) -> Tensor:
        """Returns the scale of the grid, float32, as it is in this step."""
        alpha, part = self.modules[0].alpha.detach(), self.placement.part
        return alpha if part is None else part.own(alpha).contiguous()

    @property
    def quantizer(self) -> Quantizer:
        """Says how the parameter is quantized."""
        return self.modules[0].quantizer

    def memory(self) -> Tensor:
        """Returns rows for Q(parameter), new ones if the parameter has changed its shape, dtype or device."""
        p, memory = self.latent, self._memory
        dtype = torch.int8 if self.placement.sends_codes else p.dtype
        if memory is None or (memory.shape, memory.dtype, memory.device) != (p.shape, dtype, p.device):
            self._memory = memory = torch.empty_like(p, dtype=dtype)
        return memory

    @property
    def takes_codes(self) -> bool:
        """Whether probes are written as codes, which all modules multiply, or processes send each other."""
        return self.placement.sends_codes or all(getattr(m, "product", None) is not None for m in self.modules)

    def code_memory(self) -> Tensor:
        """Returns rows for a probe's int8 codes, in the same memory."""
        memory = self.memory()
        return memory.view(-1).view(torch.int8)[: memory.numel()].view(memory.shape)

    # ---- what its modules run with

    @property
    def unwatched(self) -> bool:
        """Whether ``.grad`` may get dL/dQ first, and g at the end of the pass.

        Not so if hooks of others see the gradient when it arrives. Processes that have parts exchange dL/dQ.
        """
        p = self.parameter
        alone = not p._backward_hooks and len(p._post_accumulate_grad_hooks or ()) <= 1
        return alone or not self.placement.is_whole

    def use(self, pass_weight: PassWeight) -> None:
        """Let the modules run with this."""
        if not pass_weight.probe:
            self.deferred = pass_weight.deferred
        self.placement.hold(self.modules, pass_weight)


class ExpertView(WeightView):
    """A weight of a stack: a row of it, with a tensor id of its own. It shares what the stack runs with."""

    def __init__(self, stack: WeightView, index: int, row: int) -> None:
        self.stack, self.row = stack, row
        self.name, self.tensor_id = f"{stack.name}[{index}]", stack.tensor_id + index
        self.parameter, self.modules, self.placement = stack.parameter, stack.modules, stack.placement
        self.numel = stack.numel // stack.expert_count

    @property
    def layout(self) -> tuple[int, int, int] | None:
        return None if self.placement.part is None else (0, self.numel, self.numel)

    def rows(self, tensor: Tensor) -> Tensor:
        return self.whole.rows(tensor)[self.row : self.row + 1]


def each(weights: Iterable[WeightView], take: Callable[[WeightView], Tensor]) -> list[Tensor]:
    """Returns what ``take`` gives of each weight. Of a stack it is asked once, and each expert gets its row."""
    cut: dict[WeightView, tuple[Tensor, ...]] = {}
    out = []
    for w in weights:
        stack = w.stack
        if stack is None:
            out.append(take(w))
            continue
        if stack not in cut:
            cut[stack] = take(stack).split(1)
        out.append(cut[stack][w.row])
    return out


def check_alpha(module: QuantizedWeight, alpha: Tensor) -> None:
    """Raise if an alpha that does not learn requires a gradient."""
    if alpha.requires_grad and not module.quantizer.learned:
        raise ValueError("alpha must not require grad, as no gradient reaches it")


class Modules:
    """Tells many modules at once which values to run with."""

    def __init__(self, weights: Iterable[WeightView]) -> None:
        self._weights = list(weights)
        self._local = [w for w in self._weights if w.placement is LOCAL]
        self._others = [w for w in self._weights if w.placement is not LOCAL]
        self._states = tuple([vars(m) for w in self._local for m in w.modules])
        # the last probes, + and -, as their rows mostly come again
        self._probes: deque[tuple[list[Tensor], tuple[PassWeight, ...]]] = deque(maxlen=2)

    def release(self) -> None:
        """Let the modules quantize for themselves again."""
        put(self._states, "pass_weight", None)
        for w in self._others:
            w.placement.hold(w.modules, None)

    def use_probe(self, rows: Sequence[Tensor]) -> None:
        """Let the modules run with values or codes of a probe, without a gradient."""
        if self._others:
            rows_of = dict(zip(self._weights, rows, strict=True))
            rows = [rows_of[w] for w in self._local]
            for w in self._others:
                w.use(PassWeight(w.parameter, rows_of[w], True))
        put(self._states, "pass_weight", self._probe(rows))

    def _probe(self, rows: Sequence[Tensor]) -> tuple[PassWeight, ...]:
        """Returns what each module runs with."""
        for known, probe in self._probes:
            if all(map(operator.is_, known, rows)):
                return probe
        made: list[PassWeight] = []
        for w, own in zip(self._local, rows, strict=True):
            ready = own.dtype != torch.int8
            value = PassWeight(w.parameter, own, True, False, ready, ready and not w.rotated)
            made += [value] * len(w.modules)
        self._probes.append(([*rows], tuple(made)))
        return tuple(made)
