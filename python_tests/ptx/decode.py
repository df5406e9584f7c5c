"""Makes a program for the executor of a kernel's PTX."""

from __future__ import annotations

import ctypes
import re
import struct
from typing import NamedTuple

from . import fusing
from .build import executor
from .text import SIZES, Body, Brace, Declaration, Instruction, Label, Module, Variable, statements, variables

SPECIAL = re.compile(r"%(?:n?tid|n?ctaid)\.[xyz]|%laneid")
OTHER_SPECIAL = re.compile(
    r"%(?:.*\.[xyzw]|n?(?:warp|sm|grid|cluster)\w*id|clock\w*|globaltimer\w*|lanemask\w*|pm\d|env\w+|\w+_size)"
)
SHUFFLES = {"up": 0, "down": 1, "bfly": 2, "idx": 3}
REDUCTIONS = {
    "add.s32": 0, "add.u32": 0, "max.s32": 1, "min.s32": 2, "max.u32": 3, "min.u32": 4, "or.b32": 5,
    "and.b32": 6, "xor.b32": 7,
}  # fmt: skip
VOTES = {"ballot.b32": 0, "any.pred": 1, "all.pred": 2}
SPACES = {"global": "generic", "shared": "shared", "param": "parameter", "local": "local", "const": "generic"}
#: Modifiers of an access that change nothing here: caches, and the order that other blocks see.
NEUTRAL = {"nc", "volatile", "relaxed", "weak", "gpu", "cta", "sys", "acquire", "release", "acq_rel"}
ADDITIONS = ("u32", "s32", "u64", "s64")
ALL_LANES = "0xffffffff"


class Scope(NamedTuple):
    """What names mean in a kernel, or in one call of a function."""

    names: dict[str, str]  # of a register or parameter: its own name in the whole kernel
    labels: str  # what its labels begin with


class Kernel:
    """A kernel that can be launched. ``fuse``: see fusing.py."""

    def __init__(self, module: Module, name: str, fuse: int = 0) -> None:
        body = module.kernel(name)
        self.name = name
        self.module = module
        self.program = executor().Program()
        self.parameters = placed(body.parameters)
        self._registers: dict[str, int] = {}
        self._constants: dict[int, int] = {}
        self._symbols: dict[str, int] = {}  # addresses in shared memory, and of constant arrays
        self._specials: list[tuple[int, str]] = []
        self._at_parameter: list[tuple[int, int]] = []
        self._at_local: list[tuple[int, int]] = []
        self._kept: list[object] = []  # the constant arrays
        self._inlined = 0
        self._locals: dict[str, int] = {}
        self._declare(module, body)
        code: list[Instruction | Label] = []
        self._read(body, Scope({}, ""), code)
        code.append(Instruction("ret", [], None, False, 0))
        self.fused = fusing.fuse(code, fuse)
        self._emit_all(code)
        program = self.program
        program.parameter_bytes = sum(self.parameters[-1][1:3]) if self.parameters else 0
        program.constants, program.specials = list(self._constants.items()), self._specials
        program.parameters, program.locals = self._at_parameter, self._at_local

    # ---- variables

    def _declare(self, module: Module, body: Body) -> None:
        shared = local = 0
        dynamic: list[str] = []
        mine = [v for v in module.variables if re.search(rf"(?<![$\w]){re.escape(v.name)}(?![$\w])", body.text)]
        for v in [*mine, *variables(body.text)]:
            if v.space == "shared":
                if v.bytes is None:
                    dynamic.append(v.name)
                else:
                    shared = aligned(shared, v.align)
                    self._symbols[v.name] = shared
                    shared += v.bytes
            elif v.space == "local" and v.bytes is not None:
                local = aligned(local, v.align)
                self._locals[v.name] = local
                local += v.bytes
            elif v.space in ("global", "const") and v.values:
                self._symbols[v.name] = self._constant_array(v)
        shared = aligned(shared, 16)
        self._symbols.update(dict.fromkeys(dynamic, shared))
        self.program.shared_bytes, self.program.local_bytes = shared, aligned(local, 16)

    def _constant_array(self, v: Variable) -> int:
        assert v.bytes is not None
        data = b"".join(
            (literal(x) & (1 << 8 * SIZES[v.type]) - 1).to_bytes(SIZES[v.type], "little") for x in v.values
        )
        buffer = ctypes.create_string_buffer(data.ljust(v.bytes, b"\0") + bytes(16))
        start = aligned(ctypes.addressof(buffer), 16)
        ctypes.memmove(start, data, len(data))
        self._kept.append(buffer)
        self.program.read_only = [*self.program.read_only, (start, start + v.bytes)]
        return start

    # ---- reading: names become unique, calls become what they call

    def _read(self, body: Body, scope: Scope, code: list[Instruction | Label]) -> None:
        scopes = [scope]
        for one in statements(body):
            here = scopes[-1]
            if isinstance(one, Label):
                code.append(Label(here.labels + one.name))
            elif isinstance(one, Brace):
                if one.opens:
                    scopes.append(Scope(dict(here.names), here.labels))
                else:
                    scopes.pop()
            elif isinstance(one, Declaration):
                if len(scopes) > 1 or scope.labels:
                    self._declare_names(one.text, here)
            elif one.opcode.startswith("call"):
                self._inline(one, here, code)
            else:
                code.append(renamed(one, here))

    def _declare_names(self, text: str, scope: Scope) -> None:
        """Registers and parameters of an inner scope get names of their own."""
        self._inlined += 1
        if text.startswith(".reg"):
            for name in re.split(r"[,\s]+", text.split(None, 2)[2]):
                if base := re.fullmatch(r"(%\w+)<(\d+)>", name):
                    scope.names.update(
                        {f"{base[1]}{i}": f"{base[1]}{i}@{self._inlined}" for i in range(int(base[2]))}
                    )
                else:
                    scope.names[name] = f"{name}@{self._inlined}"
        elif text.startswith(".param"):
            for v in variables(text):
                scope.names[v.name] = f"%{v.name}@{self._inlined}"

    def _inline(self, call: Instruction, scope: Scope, code: list[Instruction | Label]) -> None:
        """``call (result), function, (arguments)``."""
        self._inlined += 1
        result, name, *arguments = call.operands
        body = self.module.function(name)
        names = {v.name: scope.names[a] for v, a in zip(body.parameters, arguments, strict=True)}
        names[body.results[0].name] = scope.names[result]
        inner = Scope(names, f"{self._inlined}:")
        at = len(code)
        self._read(body, inner, code)
        end = f"{inner.labels}end"
        for i in range(at, len(code)):
            one = code[i]
            if isinstance(one, Instruction) and one.opcode.split(".")[0] == "ret":
                code[i] = one._replace(opcode="bra", operands=[end])
        code.append(Label(end))

    # ---- emitting

    def _emit_all(self, code: list[Instruction | Label]) -> None:
        places: dict[str, int] = {}
        instructions: list[Instruction] = []
        #: An instruction with a second condition takes two places.
        at = 0
        for one in code:
            if isinstance(one, Label):
                places[one.name] = at
            else:
                instructions.append(one)
                at += 2 if conditional(one) else 1
        for one in instructions:
            parts = one.opcode.split(".")
            emit = getattr(self, f"_emit_{parts[0]}", self._emit_arithmetic)
            if parts[0] == "bra":
                self._add(one, "branch", target=places[one.operands[0]])
            else:
                emit(one, parts)

    def _add(
        self,
        one: Instruction,
        kind: str,
        results: list[str] | tuple[str, ...] = (),
        operands: list[str] | tuple[str, ...] = (),
        *,
        opcode: str = "",
        immediate: int = 0,
        target: int = 0,
        width: int = 0,
        count: int = 1,
        signed: bool = False,
        space: str = "generic",
    ) -> None:
        predicate = -1 if one.predicate is None else self._register(one.predicate)
        self.program.add(
            kind,
            opcode or one.opcode,
            one.line,
            predicate,
            one.negated,
            [self._register(r) for r in results],
            [self._register(o) for o in operands],
            immediate,
            target,
            width,
            count,
            signed,
            space,
        )

    def _register(self, name: str) -> int:
        """The register of a name, a number, or an address."""
        if name == "_":
            return -1
        known = self._registers.get(name)
        if known is not None:
            return known
        register = self._registers[name] = self.program.registers
        self.program.registers += 1
        if SPECIAL.fullmatch(name):
            self._specials.append((register, name))
        elif OTHER_SPECIAL.fullmatch(name):
            raise ValueError(f"no code for the special register {name}")
        elif name.startswith("%") or "@" in name:
            pass
        elif name in self._symbols:
            self._constants[register] = self._symbols[name]
        elif name in self._locals:
            self._at_local.append((register, self._locals[name]))
        elif offset := [at for parameter, at, *_ in self.parameters if parameter == name]:
            self._at_parameter.append((register, offset[0]))
        else:
            self._constants[register] = literal(name)
        return register

    def _emit_ret(self, one: Instruction, parts: list[str]) -> None:
        self._add(one, "end")

    _emit_exit = _emit_ret

    def _emit_bar(self, one: Instruction, parts: list[str]) -> None:
        if parts[1:] == ["warp", "sync"]:
            self._add(one, "warp_barrier", operands=one.operands)
        elif parts[1:] == ["sync"] and one.operands == ["0"]:
            self._add(one, "barrier")
        else:
            raise unknown(one)

    def _emit_ld(self, one: Instruction, parts: list[str]) -> None:
        values, address = one.operands
        self._access(one, parts, "load", address, vector(values))

    def _emit_st(self, one: Instruction, parts: list[str]) -> None:
        address, values = one.operands
        self._access(one, parts, "store", address, vector(values))

    def _access(self, one: Instruction, parts: list[str], kind: str, address: str, values: list[str]) -> None:
        type_, space, count = parts[-1], "generic", 1
        for part in parts[1:-1]:
            if part in SPACES:
                space = SPACES[part]
            elif part in ("v2", "v4", "v8"):
                count = int(part[1:])
            elif part not in NEUTRAL and not part.startswith("L1::"):
                raise unknown(one)
        if type_ not in SIZES or len(values) != count:
            raise unknown(one)
        base, offset = address_of(address)
        if "@" in base and base.startswith("%") and space == "parameter":  # of a call: a register
            moved = (values, [base]) if kind == "load" else ([base], values)
            return self._add(one, "arithmetic", *moved, opcode=f"mov.{type_}")
        results, operands = (values, [base]) if kind == "load" else ([], [base, *values])
        self._add(
            one,
            kind,
            results,
            operands,
            immediate=offset,
            width=SIZES[type_],
            count=count,
            signed=type_.startswith("s"),
            space=space,
        )

    def _emit_atom(self, one: Instruction, parts: list[str]) -> None:
        wanted = [part for part in parts[1:] if part not in NEUTRAL]
        if wanted[:2] != ["global", "add"] or wanted[2:] not in [[t] for t in ADDITIONS]:
            raise unknown(one)
        *results, address, value = one.operands
        base, offset = address_of(address)
        self._add(one, "add", results, [base, value], immediate=offset, width=SIZES[wanted[2]])

    _emit_red = _emit_atom

    def _emit_shfl(self, one: Instruction, parts: list[str]) -> None:
        if parts[1] != "sync" or parts[2] not in SHUFFLES or parts[3:] != ["b32"]:
            raise unknown(one)
        results, *operands = one.operands
        self._add(one, "shuffle", results.split("|"), operands, immediate=SHUFFLES[parts[2]])

    def _emit_redux(self, one: Instruction, parts: list[str]) -> None:
        self._warp_wide(one, parts, "reduce", REDUCTIONS)

    def _emit_vote(self, one: Instruction, parts: list[str]) -> None:
        self._warp_wide(one, parts, "vote", VOTES)

    def _warp_wide(self, one: Instruction, parts: list[str], kind: str, variants: dict[str, int]) -> None:
        variant = ".".join(parts[2:])
        if parts[1] != "sync" or variant not in variants:
            raise unknown(one)
        self._add(one, kind, one.operands[:1], one.operands[1:], immediate=variants[variant])

    def _emit_ldmatrix(self, one: Instruction, parts: list[str]) -> None:
        results, address = one.operands
        self._matrices(one, parts, vector(results), [], address)

    def _emit_stmatrix(self, one: Instruction, parts: list[str]) -> None:
        address, values = one.operands
        self._matrices(one, parts, [], vector(values), address)

    def _matrices(
        self, one: Instruction, parts: list[str], results: list[str], values: list[str], address: str
    ) -> None:
        count = len(results or values)
        plain = [part for part in parts[1:] if part not in ("trans", "shared", "cta", "shared::cta")]
        if plain != ["sync", "aligned", "m8n8", f"x{count}", "b16"]:
            raise unknown(one)
        base, offset = address_of(address)
        self._add(
            one,
            parts[0],
            results,
            [base, *values, ALL_LANES],
            immediate=offset,
            count=count,
            signed="trans" in parts,
            space="shared",
        )

    def _emit_cvta(self, one: Instruction, parts: list[str]) -> None:
        if "shared" in parts or parts[-1] != "u64":
            raise unknown(one)
        self._add(one, "arithmetic", one.operands[:1], one.operands[1:], opcode="mov.u64")

    def _emit_mov(self, one: Instruction, parts: list[str]) -> None:
        to, value = one.operands
        if not to.startswith("{") and not value.startswith("{"):
            return self._emit_arithmetic(one, parts)
        kind = "unpack" if to.startswith("{") else "pack"
        many = vector(to if kind == "unpack" else value)
        results, operands = (many, [value]) if kind == "unpack" else ([to], many)
        self._add(one, kind, results, operands, width=SIZES[parts[1]] // len(many))

    def _emit_arithmetic(self, one: Instruction, parts: list[str]) -> None:
        if not conditional(one):
            return self._add(one, "arithmetic", one.operands[:1], one.operands[1:])
        both = f"%both{len(self._registers)}"  # setp.lt.and.f32 p, a, b, q
        self._add(one, "arithmetic", [both], one.operands[1:3], opcode=f"setp.{parts[1]}.{parts[3]}")
        self._add(one, "arithmetic", one.operands[:1], [both, one.operands[3]], opcode=f"{parts[2]}.pred")

    # ---- launching

    def pack(self, values: list[int | float]) -> bytes:
        """The bytes of the parameters, each of them a number."""
        out = bytearray(self.program.parameter_bytes)
        for (_, at, size, kind), value in zip(self.parameters, values, strict=True):
            if kind in ("f32", "f64"):
                data = struct.pack("<f" if kind == "f32" else "<d", value)
            else:
                data = (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
            out[at : at + size] = data
        return bytes(out)


def placed(parameters: list[Variable]) -> list[tuple[str, int, int, str]]:
    """Name, offset, bytes and type of each."""
    found, at = [], 0
    for v in parameters:
        assert v.bytes is not None
        at = aligned(at, v.align)
        found.append((v.name, at, v.bytes, v.type))
        at += v.bytes
    return found


def aligned(at: int, align: int) -> int:
    return -(-at // align) * align


def literal(text: str) -> int:
    """The bits of a number."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    return int(text.removesuffix("U"), 0) & 0xFFFFFFFFFFFFFFFF


def vector(operand: str) -> list[str]:
    if not operand.startswith("{"):
        return [operand]
    return [name.strip() for name in operand[1:-1].split(",")]


def address_of(operand: str) -> tuple[str, int]:
    """Base and offset of ``[base + offset]``."""
    base, _, offset = operand[1:-1].replace(" ", "").partition("+")
    return base, int(offset or "0", 0)


def conditional(one: Instruction) -> bool:
    """A comparison that is joined with another predicate."""
    parts = one.opcode.split(".")
    return parts[0] == "setp" and parts[2] in ("and", "or", "xor")


def unknown(one: Instruction) -> ValueError:
    return ValueError(f"line {one.line}: no code for {one.opcode} {', '.join(one.operands)}")


NAME = re.compile(r"[%$\w.]+")


def renamed(one: Instruction, scope: Scope) -> Instruction:
    """With the names that the whole kernel knows."""
    if one.opcode.split(".")[0] == "bra":
        operands = [scope.labels + one.operands[0]]
    elif not scope.names:
        return one
    else:
        operands = [NAME.sub(lambda m: scope.names.get(m[0], m[0]), operand) for operand in one.operands]
    predicate = one.predicate and scope.names.get(one.predicate, one.predicate)
    return one._replace(operands=operands, predicate=predicate)
