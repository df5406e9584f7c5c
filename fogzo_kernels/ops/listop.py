"""Ops over lists of tensors, each from one description: its schema, and what its lists hold.

A schema is flat and stable: other front ends and exported graphs hold it. A backend takes the same arguments
grouped into the values of ``spec/call.py``; the signatures of :class:`Backend` say which.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import CustomOpDef

from ..backends import Backend, select
from ..backends.held import generations, native
from ..spec.call import Draw, Losses, Measure, Mix, Update
from ..spec.grid import Grid
from ..spec.noise import Layout
from ..spec.straight_through import StraightThrough
from ..spec.update import KINDS, UpdateRule
from . import arguments, checks, memory
from .checks import KEPT
from .tensor_list import PLAIN, TensorList

#: Parts of schemas. Scalars that change each step are tensors, so that a new value neither recompiles a graph
#: nor waits for the device; ``layouts`` holds offset, inner and stride of each tensor in a row.
GRID = "int qmin, int qmax, float offset, int r"
NAMES = "SymInt[] tensor_ids, SymInt[] layouts"
STATE = "Tensor norm, Tensor seed, Tensor step, Tensor one_minus_beta"

#: Lists that a schema writes as empty where the public function takes None.
OPTIONAL = {"plus", "minus", "masters", "quantized", "counters", "first", "second"}

#: The arguments of a call by their names in the schema; then also the groups that the backend takes.
Call = dict[str, Any]
Dtypes = tuple[torch.dtype, ...]


class Schema:
    """A schema without its namespace, and the names in it."""

    def __init__(self, text: str) -> None:
        parsed = torch._C.parse_schema(f"fogzo::{text}")
        self.text = text
        self.names = [a.name for a in parsed.arguments]
        self.lists = [a.name for a in parsed.arguments if str(a.type) == "List[Tensor]"]
        self.written = [a.name for a in parsed.arguments if a.alias_info is not None]
        self.defaults = {a.name: a.default_value for a in parsed.arguments if a.has_default_value()}

    def register(self, run: Callable[[Call], Any], fake: Callable[[Call], Any]) -> CustomOpDef:
        """The op that runs these functions of a call; ``fake`` serves graphs that are traced."""
        names, defaults = self.names, self.defaults  # the dispatcher leaves out trailing defaults
        name, brace, rest = self.text.partition("(")

        def of_call(function: Callable[[Call], Any]) -> Callable[..., Any]:
            return lambda *args: function(defaults | dict(zip(names, args, strict=False)))

        op = torch.library.custom_op(
            f"fogzo::{name}", of_call(run), mutates_args=self.written, schema=brace + rest
        )
        op.register_fake(of_call(fake))
        return op


class Known(NamedTuple):
    """What was found out about prepared lists, which pass the checks."""

    draw: Draw | None  # with their tensor ids and layouts
    spans: memory.Spans


class ListOp:
    """An op over lists of tensors, as ``torch._foreach_*`` are.

    Eager calls on plain tensors skip the dispatcher, which takes longer over a list of small tensors than the
    kernel does. Whatever traces, wraps or profiles gets the op.

    Args:
        schema: its name is that of the backend's function.
        lists: the dtypes of each list but alphas; the first list gives the others their length and shapes.
        check: checks the rest that needs no data; it takes arguments by their names.
        result: makes what the op returns where nothing is computed.
    """

    def __init__(
        self,
        schema: str,
        lists: Mapping[str, Dtypes],
        check: Callable[..., None] | None = None,
        result: Callable[[Call], Any] = lambda call: None,
    ) -> None:
        self.schema, self.lists, self.result = Schema(schema), lists, result
        self.first, *others = lists
        self.others = [(name, lists[name]) for name in others]
        self.function = schema.partition("(")[0]
        taken = [*inspect.signature(getattr(Backend, self.function)).parameters][1:]
        added = [name for name in taken if name in GROUPS and (name != "out" or "grads" in self.schema.written)]
        self.groups = [(name, GROUPS[name]) for name in added]
        self.taken = operator.itemgetter(*taken)
        self.convert = [
            (name, arguments.optional if name in OPTIONAL else arguments.tensors) for name in self.schema.lists
        ]
        self.prepared = [name for name in self.schema.lists if name != "counters"]
        self.known: OrderedDict[Any, Known] = OrderedDict()
        small = "norm", "losses_plus", "losses_minus", "noise_factors"
        self.small = [name for name in small if name in self.schema.names]
        self.rest = check, [*inspect.signature(check).parameters] if check else []
        self.op = self.schema.register(self.run, self.fake)

    def __call__(self, **call: Any) -> Any:
        for name, convert in self.convert:
            call[name] = convert(name, call[name])
        if torch.compiler.is_compiling() or watched() or not self.plain(call):
            call = self.listed(call)
            return self.op(*[detached(call[name]) for name in self.schema.names])
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # no_grad() takes longer
        try:
            result = self.run(call)
        finally:
            torch._C._set_grad_enabled(grad)
        for name in self.schema.written:
            torch.autograd.graph.increment_version(call[name])
        return result

    def plain(self, call: Call) -> bool:
        """No tensor is of a subclass, which may have its own idea of an op, or on the meta device."""
        kinds = set(map(type, call.values()))
        for name in self.schema.lists:
            tensors = call[name]
            if type(tensors) is not TensorList:
                kinds.update(map(type, tensors))
            elif not (tensors.plain and native()):
                return False
        if not kinds <= OWN and any(issubclass(kind, Tensor) for kind in kinds - OWN):
            return False
        tensors = call[self.first]
        return not tensors or not tensors[0].is_meta

    def run(self, call: Call) -> Any:
        """Check the call and let the backend compute it.

        A backend with ``CHECKS_LISTS`` refuses a bad call itself, before it writes, and far cheaper than Python
        can over thousands of tensors; the checks then only word what it refused.
        """
        tensors = call[self.first]
        if not tensors and "norm" not in call:  # nothing to do, on no device
            self.check(self.listed(call))
            return self.result(call)
        try:
            backend = select(call["backend"], call["norm"].device if "norm" in call else tensors[0].device)
            compute = getattr(backend, self.function)
            if getattr(backend, "CHECKS_LISTS", False):
                return compute(*self.taken(self.grouped(call)))
            checked = self.checked(call)
        except Exception:
            self.check(self.listed(call))
            raise
        return compute(*self.taken(checked or self.check(self.listed(call))))

    def fake(self, call: Call) -> Any:
        """Check what needs no data."""
        self.check_kinds(self.grouped(call))
        return self.result(call)

    def grouped(self, call: Call) -> Call:
        """The call with the groups that the backend takes."""
        return call | {name: make(call) for name, make in self.groups}

    def listed(self, call: Call) -> Call:
        """The call with plain lists, and with the names of noise that belong to one that was prepared."""
        plain = {name: list(value) if isinstance(value, TensorList) else value for name, value in call.items()}
        if "tensor_ids" in call and call["tensor_ids"] is None:
            count = len(call["alphas"]) if "kind" in call else None
            plain["tensor_ids"], plain["layouts"] = arguments.names(None, None, call[self.first], count)
        return plain

    def checked(self, call: Call) -> Call | None:
        """The call with the groups, or None unless its lists are prepared.

        What depends on the lists alone is checked once and remembered.
        """
        if call.get("tensor_ids") is not None:
            return None
        states = generations([call[name] for name in self.prepared])
        if states is None:
            return None
        key = *states, call.get("block"), call.get("kind"), tuple(call.get("factors", ()))
        known = self.known.pop(key, None)
        if known is None:
            plain = self.check(self.listed(call))
            known = Known(plain.get("draw"), self.spans(plain, self.prepared))
        self.known[key] = known
        if len(self.known) > KEPT:
            self.known.popitem(last=False)
        if known.draw:
            call = call | {"names": (known.draw.tensor_ids, known.draw.layouts)}
        call = self.grouped(call)
        self.check_scalars(call)
        self.check_values(call)
        small = [name for name in self.small if call[name] is not None]
        for name in small:
            known.spans.check(call[name], False)
        for counters in call.get("counters", ()):
            known.spans.check(counters, True)
            memory.Spans({"counters": [counters]}, {name: [call[name]] for name in small})
        return call

    def check_kinds(self, call: Call) -> None:
        """Types, shapes, dtypes, devices and lengths."""
        self.check_lists(call)
        self.check_scalars(call)

    def check_lists(self, call: Call) -> None:
        like, first, fresh = call[self.first], call.get("title", self.first), call.get("fresh", ())
        checks.tensor_list(first, like, self.lists[self.first])
        for name, dtypes in self.others:
            if name not in fresh and (call[name] or name not in OPTIONAL):
                checks.tensor_list(name, call[name], dtypes, like)
        if "update" in call and len(call["alphas"]) > len(like):
            raise ValueError(f"alphas must have at most {len(like)} tensors, got {len(call['alphas'])}")
        if "alphas" in call:
            layouts = call["draw"].layouts if "draw" in call else ()
            checks.alphas(call["alphas"], first, self.noisy(call), call.get("block", 0), layouts)
        else:
            checks.whole_blocks(first, like, call["block"])
        check, names = self.rest
        if check:
            check(*[call[name] for name in names])

    def check_scalars(self, call: Call) -> None:
        if "mix" in call:
            checks.mix(call["mix"], call[self.first], len(self.noisy(call)))
        if "update" in call:
            checks.host_or(call["norm"].device, lr=call["lr"], optimizer_step=call["optimizer_step"])
        if "draw" in call:
            checks.draw(call["draw"], self.noisy(call))
        if "losses" in call:
            least = 0 if "update" in call or call["guided"] else 1
            checks.losses(call["losses"], call["norm"].device, least)

    def noisy(self, call: Call) -> Sequence[Tensor]:
        """The tensors with alpha and noise: in the fused tail, the first ones."""
        tensors: Sequence[Tensor] = call[self.first]
        return tensors[: len(call["alphas"])] if "update" in call else tensors

    def check_values(self, call: Call) -> None:
        """Numbers that the host can read without waiting for a device."""
        if "r" in call:
            memory.alphas(call["alphas"], call["r"])
        memory.numbers(call.get("draw"), call.get("mix"), call.get("update"))

    def check(self, call: Call) -> Call:
        """The call with the groups, after all checks."""
        call = self.grouped(call)
        self.check_kinds(call)
        self.check_values(call)
        if "fresh" in call:
            return call
        if "draw" in call:
            memory.shards(call["draw"].tensor_ids, call["draw"].layouts, map(Tensor.numel, self.noisy(call)))
        self.spans(call, [*self.schema.lists, *[name for name in self.small if call[name] is not None]])
        return call

    def spans(self, call: Call, names: Sequence[str]) -> memory.Spans:
        """Where arguments lie, which must be apart from what is written; by the public names."""
        lists = {name: call[name] if name in self.schema.lists else [call[name]] for name in names}
        written = {name: lists.pop(name) for name in self.schema.written if name in lists}
        if "kind" in call:
            states = written.pop("first"), written.pop("second")
            written |= dict(zip(KINDS[call["kind"]], states, strict=False))
        if "tensors" in lists and "out" in written:  # the Hadamard transform may be in place
            lists["tensors"] = memory.elsewhere(lists["tensors"], written["out"])
        return memory.Spans(written, lists)


#: Of single tensors: the name -> the list's name.
LISTED = {"latent": "latents", "grad": "grads", "alpha": "alphas", "x": "tensors", "factor": "factors"}


class OfOne:
    """The op on one tensor, which returns what a list op writes.

    Args:
        lists: the list op.
        schema: of the op on one tensor.
        outputs: each has the shape of a list.

    Attributes:
        op: for graphs, modes and transforms that look at ops.
        direct: the same function of the same arguments without the dispatcher, which takes longer than a small
            tensor's kernel; see :func:`is_plain`.
    """

    def __init__(self, lists: ListOp, schema: str, outputs: Mapping[str, str]) -> None:
        parsed = Schema(schema)
        self.listed = [(name, LISTED[name]) for name in parsed.names if name in LISTED]
        self.names, self.lists, self.outputs = parsed.names, lists, outputs
        on_lists = self.on_lists
        self.op = parsed.register(
            functools.partial(on_lists, lists.run), functools.partial(on_lists, lists.fake)
        )

    def on_lists(self, compute: Callable[[Call], Any], call: Call) -> Any:
        for name, list_name in self.listed:
            call[list_name] = [call[name].contiguous() if name == "grad" else call[name]]
        results = tuple([torch.empty_like(call[like][0]) for like in self.outputs.values()])
        for name, t in zip(self.outputs, results, strict=True):
            call[name] = [t]
        call["fresh"] = self.outputs
        if "x" in call:
            call["title"] = "x"
        compute(call)
        return results if len(results) > 1 else results[0]

    def direct(self, *args: Any) -> Any:
        return self.on_lists(self.lists.run, dict(zip(self.names, args, strict=True)))


# ---- groups of arguments


@functools.lru_cache(KEPT)  # a training loop gives the same one at every step
def rule_of(kind: str, names: tuple[str, ...], values: tuple[float, ...], nesterov: bool) -> UpdateRule:
    return UpdateRule(kind, **dict(zip(names, values, strict=True)), nesterov=nesterov)


def update_of(call: Call) -> Update:
    """A schema has two lists of state, of which a rule may need one or none."""
    kind = call["kind"]
    rule = rule_of(kind, tuple(call["hyperparameters"]), tuple(call["values"]), call["nesterov"])
    states = call["first"], call["second"]
    for name, tensors in zip((*KINDS[kind], "second")[rule.states :], states[rule.states :], strict=False):
        if tensors:
            raise ValueError(f"{name} must be None without momentum, got {len(tensors)} tensors")
    return Update(rule, call["lr"], call["optimizer_step"], call["masters"], states[: rule.states])


def names_of(call: Call) -> tuple[Sequence[int], Sequence[Layout]]:
    """Tensor ids and layouts; none where they are those of a prepared list, which a native backend knows."""
    if "names" in call:
        names: tuple[Sequence[int], Sequence[Layout]] = call["names"]
        return names
    return (call["tensor_ids"], triples(call["layouts"])) if call["tensor_ids"] is not None else ((), ())


def triples(layouts: Sequence[int]) -> Sequence[Layout]:
    """Layouts, which a schema writes as three numbers in a row for each tensor."""
    return list(zip(layouts[::3], layouts[1::3], layouts[2::3], strict=True))


grid_of = functools.lru_cache(KEPT)(Grid)

#: Each group that a backend takes, from the flat arguments.
GROUPS: dict[str, Callable[[Call], Any]] = {
    "draw": lambda c: Draw(c["distribution"], c["seed"], c["step"], *names_of(c)),
    "mix": lambda c: Mix(c["norm"], c["one_minus_beta"], c["epsilon"], c["noise_factors"]),
    "losses": lambda c: Losses(
        c["losses_plus"], c["losses_minus"], next(iter(c["counters"]), None), c["guided"]
    ),
    "grid": lambda c: grid_of(c["qmin"], c["qmax"], c["offset"], c["r"]),
    "straight_through": lambda c: StraightThrough.of_variant(c["straight_through"]),
    "measure": lambda c: Measure(*[c[name] for name in Measure._fields]),
    "update": update_of,
    "out": lambda c: c.get("out", c["grads"]),  # of a backward: the gradients, unless it is on one tensor
}


# ---- the way around the dispatcher


#: Types of arguments, none of them a subclass of Tensor with an idea of its own.
OWN = PLAIN | {list, TensorList, str, int, float, bool, type(None)}


def detached(argument: Any) -> Any:
    """Autograd has no formula for these ops, and none of their results needs one."""
    if isinstance(argument, list):
        return [t.detach() if isinstance(t, Tensor) and t.requires_grad else t for t in argument]
    return argument


def is_plain(*tensors: Tensor) -> bool:
    """Whether an op on these tensors may go around the dispatcher."""
    for t in tensors:
        if type(t) not in PLAIN or t.is_meta:
            return False
    return not (is_compiling() or watched())


#: What :func:`watched` asks. An attribute of an attribute takes as long as the call.
modes, transform = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
tracing, profiling = torch._C._get_tracing_state, torch.autograd._profiler_enabled


def watched() -> bool:
    """Whether some mode, transform or profiler must see the ops."""
    return modes() > 0 or transform() is not None or tracing() is not None or profiling()
