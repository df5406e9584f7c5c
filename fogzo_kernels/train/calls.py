"""WeightGroup: quantized weights that go into one call of an op, and the lists that the call takes."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.group import sum_of_parts
from ..distributed.sharding import measure_sharded_
from ..functional import (
    TensorList,
    guide_norm,
    guide_sumsq,
    learned_backward_,
    noise_factors,
    perturb_quantize_,
    quantize_,
    straight_through_backward_,
)
from ..nn.quantized import QuantizedWeight
from ..nn.view import LOCAL, DeferredLists, Modules, PassWeight, WeightView, check_alpha, each
from ..nn.weight import LEARNED, against_alpha, hold_pairs, measure_, pairs_of
from ..nn.weights import Facts
from ..ops.native import put
from ..spec.hadamard import Hadamard
from ..spec.scale import MeasuredScale
from .memory import ProbeMemory

T = TypeVar("T")
DTYPE, ALPHA, LATENT = map(operator.attrgetter, ("dtype", "alpha", "latent"))


class AlphaGradients(NamedTuple):
    """Gradients of the learned alphas of some weights."""

    weights: list[WeightView]
    alphas: list[Tensor]
    grads: Sequence[Tensor]


class WeightGroup:
    """Weights that go into one call of an op, and the lists that it takes.

    Attributes:
        how: quantizer and backend, as ops take them.
        alphas, tensor_ids, layouts: as ops take them; ``layouts`` is None where the weights are whole.
        memory: rows for Q of each weight.
        learned: for each weight, whether its alpha learns.
        of_modules: alpha of each weight, as its modules have it.
        factors: for each weight, what LSQ multiplies the gradient of its alpha by, if that learns.
        codes: for each weight, whether its probes are written as codes.
        by_rows: whether rows without a gradient take no part.
        grads: rows of ``.grad``, once a gradient pass has left them.
        noise_factors: t of each weight in the step, as ops take it; None where all are 1.
        second: memory for the second probe of a direction; None where rows are made anew for each.
        modules: of the weights; None where these are experts, which share modules.
    """

    LISTS = (
        "weights",
        "alphas",
        "of_modules",
        "tensor_ids",
        "layouts",
        "memory",
        "learned",
        "factors",
        "codes",
        "grads",
    )

    def __init__(self, weights: list[WeightView], backend: str | None) -> None:
        self.weights, self.backend = weights, backend
        self.how: dict[str, Any] = weights[0].quantizer.options | {"backend": backend}
        for w in dict.fromkeys(w.whole for w in weights):
            check_alpha(w.modules[0], w.modules[0].alpha)
            w.rotated = self.how["transform"] is not None
        self.tensor_ids = [w.tensor_id for w in weights]
        layouts = [layout for w in weights if (layout := w.layout) is not None]
        self.layouts = layouts or None  # of parts of weights: all weights are parts, or none is
        self.of_modules = [w.modules[0].alpha for w in weights]
        self.learned = [alpha.requires_grad for alpha in self.of_modules]
        learn = [w.modules[0] if learned else None for w, learned in zip(weights, self.learned, strict=True)]
        self.factors = [1.0 if module is None else module.alpha_factor for module in learn]
        self.codes = [w.takes_codes for w in weights]
        self.by_rows = weights[0].by_rows
        # where rows are views, they are taken anew at each call, as ``parameter.data`` may be replaced
        self.prepared = layouts == [] and all(w.latent is w.parameter for w in weights)
        self.alphas = self._list(each(weights, ALPHA))
        self.memory = self._list(each(weights, WeightView.memory))
        self.grads: Sequence[Tensor] = []
        self.noise_factors: Tensor | None = None
        self._latents = self._list([w.parameter for w in weights]) if self.prepared else None
        self.second = ProbeMemory(self.memory) if self.prepared else None
        self.modules = Modules(weights) if all(w.stack is None for w in weights) else None

    def _list(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the tensors of these weights as ops take them in the least time."""
        return TensorList(tensors, tensor_ids=self.tensor_ids) if self.prepared else tensors

    @property
    def latents(self) -> Sequence[Tensor]:
        """Rows of the parameters."""
        return each(self.weights, LATENT) if self._latents is None else self._latents

    @property
    def names(self) -> dict[str, Any]:
        """The names of the noise, as ops take them; prepared lists bring their own."""
        return {} if self.prepared else {"tensor_ids": self.tensor_ids, "layouts": self.layouts}

    def split(self, values: Sequence[T]) -> list[tuple[T, WeightGroup]]:
        """Return a group for each value; there is a value for each weight."""
        kinds = dict.fromkeys(values)
        if len(kinds) == 1:
            return [(values[0], self)]
        return [(k, self.part([i for i, value in enumerate(values) if value == k])) for k in kinds]

    def part(self, places: Sequence[int]) -> WeightGroup:
        """Return a group of the weights at these places: this one for all of them in their order."""
        if len(places) == len(self.weights) and list(places) == list(range(len(places))):
            return self
        group = copy.copy(self)
        for name in self.LISTS:
            if values := getattr(self, name):
                setattr(group, name, [values[i] for i in places])
        group.alphas, group.memory = group._list(group.alphas), group._list(group.memory)
        group.grads = group._list(group.grads) if group.grads else []
        if self.noise_factors is not None:  # an index would go to the device
            group.noise_factors = torch.stack([self.noise_factors[i] for i in places])
        if self.prepared:
            group._latents = group._list([w.parameter for w in group.weights])
        group.second = None
        group.modules = None if self.modules is None else Modules(group.weights)
        return group

    def with_gradients(self) -> list[WeightGroup]:
        """Return groups of the weights that have a gradient, by its dtype."""
        grads = [w.parameter.grad for w in self.weights]
        present = [grad for grad in grads if grad is not None]
        alike = len(present) == len(grads) and len(set(map(DTYPE, present))) == 1
        if alike and self.prepared and all(map(Tensor.is_contiguous, present)):
            group = copy.copy(self)
            group.grads = self.memory.like(present) if isinstance(self.memory, TensorList) else present
            return [group]
        groups = []
        for dtype, group in self.split([None if grad is None else grad.dtype for grad in grads]):
            if dtype is not None:
                group = copy.copy(group)
                group.grads = group._list(each(group.weights, WeightView.guide))  # type: ignore[arg-type]
                groups.append(group)
        return groups

    def second_memory(self, out: Sequence[Tensor]) -> tuple[list[Tensor], dict[WeightView, Tensor]]:
        """Return new memory like ``out``, of experts and of their stacks.

        That of experts that are not in this group holds Q.
        """
        counts: dict[WeightView, int] = {}
        for w in self.weights:
            counts[w.whole] = counts.get(w.whole, 0) + 1
        new_of = {}
        for w, count in counts.items():
            now = w.memory()  # an expert is whole where processes send codes, and values else
            new_of[w] = torch.empty_like(now) if count == len(now) or w.expert_count == 1 else now.clone()
        return each(self.weights, new_of.__getitem__), new_of

    @property
    def reached(self) -> list[Tensor]:
        """For each weight, as a column of bool: which rows have a gradient that is not all 0."""
        reached = []
        for w, grad in zip(self.weights, self.grads, strict=True):
            rows, part = (grad != 0).any(1, keepdim=True), w.placement.part
            if part is not None and part.dim == 1:  # the others' columns
                rows = part.sum(rows.float()) > 0
            reached.append(rows)
        return reached

    def quantize(self) -> None:
        """Write Q(parameter) into the memory, for one pass, as a write to ``.data`` shows in no version."""
        grid, transform = self.how["grid"], self.how["transform"]
        latents, alphas = self.latents, self.alphas
        try:
            quantize_(self.memory, latents, alphas, grid=grid, transform=transform, backend=self.backend)
        except ValueError as error:
            each_of = zip(self.weights, latents, alphas, strict=True)
            found = (against_alpha(w.name, t.detach(), alpha.detach(), w.quantizer) for w, t, alpha in each_of)
            raise next(filter(None, found), error) from None


def grouped(weights: Iterable[WeightView], backend: str | None) -> list[WeightGroup]:
    """Return the weights by quantizer and dtype. Each weight has alphas of its own, whatever its scale."""
    kinds: dict[tuple[Any, ...], list[WeightView]] = {}
    for w in weights:
        kinds.setdefault((*w.quantizer.options.values(), w.parameter.dtype, w.by_rows), []).append(w)
    return [WeightGroup(members, backend) for members in kinds.values()]


class Prepared:
    """What steps need of a model's weights, made once and kept while nothing that it holds has moved.

    Attributes:
        facts: of the weights now (:class:`fogzo_kernels.nn.weights.Facts`), as a step has them at its start.
        wholes: the parameters by calls of ops.
        groups: the weights by calls of ops. Each expert of a stack is one.
        measured, learned: modules whose alphas each step measures, and holds in their range.
    """

    def __init__(
        self, weights: Sequence[WeightView], pieces: Sequence[WeightView], backend: str | None
    ) -> None:
        self.weights, self.pieces, self.backend = weights, pieces, backend
        self.facts: Facts | None = None
        self._facts_of_groups: Facts | None = None
        self._alone = True  # whether no other process may wait for gradients
        self.wholes: list[WeightGroup] = []
        self.groups: list[WeightGroup] = []
        self.measured: list[WeightView] = []
        self.learned: list[QuantizedWeight] = []
        self._pairs: tuple[TensorList, TensorList] | None = None  # learned alphas, and where they are held
        self.modules = Modules(weights)
        self._ready: tuple[tuple[dict[str, Any], ...], tuple[PassWeight, ...]] = (), ()
        self._others: list[tuple[WeightView, Tensor]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Prepared, (self.weights, self.pieces, self.backend)

    def update(self) -> None:
        """Make all of it anew if something has moved."""
        alone = not (dist.is_available() and dist.is_initialized())
        if self.facts is not None and self.facts is self._facts_of_groups and alone == self._alone:
            return
        self._facts_of_groups, self._alone = None, alone
        self.groups = self.wholes = grouped(self.weights, self.backend)
        if any(w.stack is not None for w in self.pieces):
            self.groups = grouped(self.pieces, self.backend)
        modules = [m for w in self.weights for m in w.modules]
        self.measured = [w for w in self.weights if isinstance(w.quantizer.scale, MeasuredScale)]
        self.learned = [m for m in modules if m.quantizer.learned or m.input_quantizer is not None]
        self._pairs = None
        if all(m.input_quantizer is None for m in self.learned):  # else an input's scale gets its value later
            alphas, least = pairs_of(self.learned, LEARNED)
            self._pairs = TensorList(alphas), TensorList(least)
        states: list[dict[str, Any]] = []
        run_with: list[PassWeight] = []
        self.modules, self._others = Modules(self.weights), []
        for group in self.wholes:
            joint = [alone and w.placement is LOCAL and w.unwatched for w in group.weights]
            for is_joint, part in group.split(joint):
                if not is_joint:
                    self._others += zip(part.weights, part.memory, strict=True)
                    continue
                with torch.enable_grad():
                    latents = [w.modules[0].rows(w.parameter) for w in part.weights]
                    values = DeferredLists.apply(part.memory, *latents)
                for w, rows in zip(part.weights, values, strict=True):
                    w.deferred = True
                    own = PassWeight(w.parameter, rows, False, True, True, not w.rotated)
                    states += [vars(m) for m in w.modules]
                    run_with += [own] * len(w.modules)
        self._ready = tuple(states), tuple(run_with)
        self._facts_of_groups = self.facts

    def use_quantized(self) -> None:
        """Let modules run with Q, which the memory has, in a gradient pass.

        Where somebody watches a gradient as it arrives, or other processes wait for it, h' is applied at once.
        """
        for w, rows in self._others:
            w.use(PassWeight(w.parameter, rows, False, w.unwatched))
        states, run_with = self._ready
        put(states, "pass_weight", run_with)

    def set_alphas(self) -> Tensor | None:
        """Measure alphas that each step measures. Return how many others were moved into their range."""
        calls: dict[tuple[MeasuredScale, Hadamard | None, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        if self.measured:
            measure_sharded_(
                [m for w in self.measured if not w.placement.is_whole for m in w.modules], self.backend
            )
        for w in self.measured:
            scale = w.quantizer.scale
            if isinstance(scale, MeasuredScale) and w.placement.is_whole:
                alphas, rows = calls.setdefault((scale, w.quantizer.transform, w.parameter.dtype), ([], []))
                alphas += [m.alpha for m in w.modules]
                rows += [w.latent] * len(w.modules)
        for (scale, transform, _), (alphas, rows) in calls.items():
            measure_(alphas, rows, scale, transform, self.backend)
        return hold_pairs(self.learned, *(self._pairs or pairs_of(self.learned, LEARNED)))


def run_quantized(prepared: Prepared) -> None:
    """Let modules run with Q(parameter), as a probe at eps = 0 would have it, until they are released."""
    for group in prepared.wholes:
        group.quantize()
        assert group.modules is not None
        group.modules.use_probe(group.memory)


def finish_gradients(groups: Iterable[WeightGroup], in_pass: bool = True) -> list[AlphaGradients]:
    """Make g of dL/dQ in ``.grad``, once for all micro-batches, and return the gradients of learned alphas.

    Outside of passes modules apply h' by themselves, but for weights that processes share by codes.
    """
    alphas: list[AlphaGradients] = []
    for group in groups:
        deferred_of = [w.deferred if in_pass else w.placement.sends_codes for w in group.weights]
        kinds = [*zip(deferred_of, group.learned, strict=True)]
        for (deferred, learned), part in group.split(kinds):
            rows = part.latents, part.alphas
            if deferred and not learned:
                straight_through_backward_(part.grads, *rows, **part.how)
            elif deferred:
                grads: Sequence[Tensor] = like_in_one(part.alphas)
                if isinstance(part.alphas, TensorList):
                    grads = part.alphas.like(grads)
                learned_backward_(part.grads, grads, *rows, factors=part.factors, **part.how)
                if part.layouts is not None:
                    grads = sum_of_parts(part.weights, [*grads])
                alphas.append(AlphaGradients(part.weights, part.of_modules, grads))
    return alphas


class Guide:
    """Finds N of the weights that take part in a step, and the factors of noise per tensor.

    Args:
        per_tensor: whether noise is per tensor.
        places: the place of each weight among all.
        count: how many weights all processes have.
        sum_of: adds, in place, the sums of processes that have rows; None where weights are whole.
    """

    def __init__(
        self, per_tensor: bool, places: dict[WeightView, int], count: int,
        sum_of: Callable[[Tensor], Tensor] | None,
    ) -> None:  # fmt: skip
        self.per_tensor, self.places, self.count, self.sum_of = per_tensor, places, count, sum_of
        self._kept: tuple[list[WeightView], torch.device, Tensor, Tensor] | None = None

    def norm(self, groups: Sequence[WeightGroup], device: torch.device) -> Tensor:
        """Return N, and give the groups their factors."""
        if not self.per_tensor and self.sum_of is None and len(groups) == 1:
            (g,) = groups
            return guide_norm(g.grads, g.alphas, grid=g.how["grid"], backend=g.backend)
        parts = [
            guide_sumsq(g.grads, g.alphas, grid=g.how["grid"], per_tensor=self.per_tensor, backend=g.backend)
            for g in groups
        ]
        if not self.per_tensor:
            squares = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=device)
            return (squares if self.sum_of is None else self.sum_of(squares)).sqrt().float()
        sumsqs = (
            parts[0]
            if len(parts) == 1
            else torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *parts])
        )
        numels, slots = self._numbers(groups, device)
        if self.sum_of is None:
            factors = noise_factors(sumsqs, numels)
        else:  # a process has some rows of a weight, and some experts of a stack
            both = sumsqs.new_zeros(2, self.count)
            both[0, slots], both[1, slots] = sumsqs, numels.to(both.dtype)
            sumsqs, every = self.sum_of(both)
            factors = noise_factors(sumsqs, every.long())[slots]
        for group, own in zip(groups, factors.split([len(g.weights) for g in groups]), strict=True):
            group.noise_factors = own
        return sumsqs.sum().sqrt().float()

    def _numbers(self, groups: Sequence[WeightGroup], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return how many elements that get noise this process has of each weight, and the places."""
        weights = [w for group in groups for w in group.weights]
        if self._kept is None or self._kept[:2] != (weights, device):

            def on_device(numbers: Iterable[int]) -> Tensor:
                # filled there, as a CUDA graph's capture takes no copy from the host
                filled = [torch.full((), n, dtype=torch.int64, device=device) for n in numbers]
                return torch.stack(filled) if filled else torch.zeros(0, dtype=torch.int64, device=device)

            numels = on_device(grad.numel() for group in groups for grad in group.grads)
            self._kept = weights, device, numels, on_device(self.places[w] for w in weights)
        numels, slots = self._kept[2:]
        if any(group.by_rows for group in groups):
            own: list[Tensor] = []
            for group, known in zip(groups, numels.split([len(g.weights) for g in groups]), strict=True):
                sizes = zip(group.reached, group.grads, strict=True) if group.by_rows else ()
                own += [rows.sum() * grad.shape[1] for rows, grad in sizes] or known.unbind()
            numels = torch.stack(own)
        return numels, slots


def like_in_one(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return new tensors like these, in one piece of memory where all have one shape."""
    first = tensors[0]
    if any(t.shape != first.shape for t in tensors):
        return [*map(torch.empty_like, tensors)]
    return [*first.new_empty((len(tensors), *first.shape)).unbind()]


def add_to_gradients(every: Iterable[AlphaGradients], taking: Collection[WeightView] | None = None) -> None:
    """Add to the gradients of alphas, as a backward does; none where the weight is not ``taking`` part."""
    present, added = [], []
    for w, alpha, grad in chain.from_iterable(zip(*part, strict=True) for part in every):
        if taking is not None and w not in taking:  # of a stack: none of its experts
            continue
        if alpha.grad is None:
            alpha.grad = grad
        else:
            present.append(alpha.grad)
            added.append(grad)
    if present:
        torch._foreach_add_(present, added)


@torch.no_grad()
def code_changes(
    groups: Sequence[WeightGroup], norm: Tensor, options: Callable[[WeightGroup], dict[str, Any]]
) -> Tensor:
    """Return the share of codes that differ between the first two probes, in memory for one weight."""
    differ, total = torch.zeros((), dtype=torch.int64, device=norm.device), 0
    for group in groups:
        for i in range(len(group.weights)):
            w = group.part([i])
            plus, minus = (torch.empty_like(w.grads[0], dtype=torch.int8) for _ in "+-")
            perturb_quantize_(plus, minus, w.latents, w.grads, w.alphas, norm, direction=0, **options(w))
            differ += (plus != minus).sum()
            total += plus.numel()
    return differ.float() / total  # an int by an int would have the default dtype
