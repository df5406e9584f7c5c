"""What each arithmetic instruction of PTX gives, in Python's exact numbers: the executor is held against it."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np

Bits = int
FORMATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}  # bits of exponent and fraction


def width(kind: str) -> int:
    return (
        8
        if kind == "pred"
        else int(re.sub(r"\D*", "", kind.removesuffix("x2"))) * (2 if kind.endswith("x2") else 1)
    )


def signed(x: Bits, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def integer(x: Bits, kind: str) -> int:
    return signed(x, width(kind)) if kind[0] == "s" else x & (1 << width(kind)) - 1


# ---- floats: a number is a Fraction, or one of these


NAN, INFINITY = "nan", "infinity"


def decoded(x: Bits, kind: str) -> tuple[int, Fraction | str]:
    """Sign (0 or 1) and magnitude."""
    exponents, fractions = FORMATS[kind]
    sign, exponent = x >> (exponents + fractions) & 1, x >> fractions & (1 << exponents) - 1
    fraction = x & (1 << fractions) - 1
    if exponent == (1 << exponents) - 1:
        return sign, NAN if fraction else INFINITY
    bias = (1 << (exponents - 1)) - 1
    whole = fraction | (1 << fractions if exponent else 0)
    return sign, Fraction(whole) * Fraction(2) ** (max(exponent, 1) - bias - fractions)


def nan(kind: str) -> Bits:
    """The one that an instruction makes."""
    return {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}[kind]


def infinity(sign: int, kind: str) -> Bits:
    exponents, fractions = FORMATS[kind]
    return sign << (exponents + fractions) | ((1 << exponents) - 1) << fractions


def encoded(x: Fraction, kind: str, sign_of_zero: int = 0, down: bool = False) -> Bits:
    """The nearest number of a format, ties to even; or the next one below."""
    exponents, fractions = FORMATS[kind]
    sign, magnitude = int(x < 0) if x else sign_of_zero, abs(x)
    bias = (1 << (exponents - 1)) - 1
    exponent = 1 - bias
    if magnitude:
        guess = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()  # or one less
        exponent = max(exponent, guess - (magnitude < Fraction(2) ** guess))
    units = magnitude / Fraction(2) ** (exponent - fractions)
    whole = (math.ceil(units) if sign else math.floor(units)) if down else round(units)
    if whole >> (fractions + 1):
        whole, exponent = whole >> 1, exponent + 1
    if exponent > bias:
        return infinity(sign, kind) if not down or sign else infinity(0, kind) - 1
    biased = exponent + bias if whole >> fractions else 0
    return sign << (exponents + fractions) | biased << fractions | (whole & (1 << fractions) - 1)


def flushed(x: Bits) -> Bits:
    return x & 0x80000000 if not x & 0x7F800000 else x


def fma(a: Bits, b: Bits, c: Bits, kind: str, down: bool = False) -> Bits:
    (sa, ma), (sb, mb), (sc, mc) = (decoded(x, kind) for x in (a, b, c))
    sign = sa ^ sb
    if NAN in (ma, mb, mc) or (INFINITY in (ma, mb) and 0 in (ma, mb)):
        return nan(kind)
    if INFINITY in (ma, mb):
        return nan(kind) if mc == INFINITY and sc != sign else infinity(sign, kind)
    if mc == INFINITY:
        return infinity(sc, kind)
    product, addend = (-1) ** sign * ma * mb, (-1) ** sc * mc
    zero = sign if sign == sc and not product and not addend else int(down)
    return encoded(product + addend, kind, zero, down)


def one(kind: str) -> Bits:
    return encoded(Fraction(1), kind)


def add(a: Bits, b: Bits, kind: str) -> Bits:
    return fma(a, one(kind), b, kind)


def negated(a: Bits, kind: str) -> Bits:
    return a ^ 1 << (width(kind) - 1)


def product(a: Bits, b: Bits, kind: str) -> Bits:
    sign = (a ^ b) >> (width(kind) - 1) & 1
    return fma(a, b, sign << (width(kind) - 1), kind)  # a zero of the product's sign changes nothing


def quotient(a: Bits, b: Bits, kind: str) -> Bits:
    (sa, ma), (sb, mb) = decoded(a, kind), decoded(b, kind)
    sign = sa ^ sb
    if NAN in (ma, mb) or ma == mb == 0 or ma == mb == INFINITY:
        return nan(kind)
    if ma == INFINITY or mb == 0:
        return infinity(sign, kind)
    if mb == INFINITY:
        return encoded(Fraction(0), kind, sign)
    return encoded((-1) ** sign * ma / mb, kind, sign)


def root(a: Bits, kind: str) -> Bits:
    sign, magnitude = decoded(a, kind)
    if magnitude == 0:
        return a
    if magnitude == NAN or sign:
        return nan(kind)
    if magnitude == INFINITY:
        return a
    scale = 4**1100  # its integer root has far more bits than the result
    whole = math.isqrt(magnitude.numerator * scale // magnitude.denominator)
    exact = whole * whole * magnitude.denominator == magnitude.numerator * scale
    return encoded(Fraction(2 * whole + (not exact), 2**1101), kind)


def order(a: Bits, b: Bits, kind: str) -> int | None:
    """-1, 0 or 1; None for NaN."""
    (sa, ma), (sb, mb) = decoded(a, kind), decoded(b, kind)
    if NAN in (ma, mb):
        return None
    x, y = ((-1) ** s * (Fraction(10) ** 400 if m == INFINITY else m) for s, m in ((sa, ma), (sb, mb)))
    return (x > y) - (x < y)


def extreme(a: Bits, b: Bits, kind: str, sign: int, propagates: bool) -> Bits:
    """The smaller one (sign -1) or the greater one (1)."""
    nans = [decoded(x, kind)[1] == NAN for x in (a, b)]
    if any(nans):
        return nan(kind) if propagates or all(nans) else b if nans[0] else a
    found = order(a, b, kind)
    if found == 0:
        negative = max(a, b)  # by bits: -0 is greater
        return negative if sign < 0 else min(a, b)
    return a if found == sign else b


def whole(x: Bits, kind: str, nearest: bool) -> Bits:
    sign, magnitude = decoded(x, kind)
    if magnitude == NAN:
        return nan(kind)
    if magnitude == INFINITY:
        return x
    found = round(magnitude) if nearest else math.floor(magnitude)
    return encoded(Fraction((-1) ** sign * found), kind, sign)


def to_integer(x: Bits, kind: str, to: str, nearest: bool) -> Bits:
    sign, magnitude = decoded(x, kind)
    bits = width(to)
    least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    if magnitude == NAN:
        return 1 << (bits - 1) if bits == 64 or kind == "f64" else 0
    if magnitude == INFINITY:
        found = least if sign else most
    else:
        found = (-1) ** sign * (round(magnitude) if nearest else math.floor(magnitude))
    return min(max(found, least), most) & (1 << bits) - 1


def to_float(x: Bits, kind: str, to: str) -> Bits:
    sign, magnitude = decoded(x, kind)
    if magnitude == NAN:
        return nan(to)
    if magnitude == INFINITY:
        return infinity(sign, to)
    return encoded((-1) ** sign * magnitude, to, sign)


# ---- integers


COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


def compared(how: str, a: Bits, b: Bits, kind: str) -> Bits:
    if kind not in FORMATS:
        return int(COMPARE[how](integer(a, kind), integer(b, kind)))
    found = order(a, b, kind)
    if how in ("nan", "num"):
        return int((found is None) == (how == "nan"))
    if found is None:
        return int(how.endswith("u"))
    return int(COMPARE[how.removesuffix("u")](found, 0))


def divided(a: int, b: int) -> tuple[int, int]:
    """Quotient towards zero, and rest of the sign of a."""
    q = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return q, a - q * b


INTEGERS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
    "mul.wide": lambda a, b: a * b, "mad.lo": lambda a, b, c: a * b + c, "mad.wide": lambda a, b, c: a * b + c,
    "min": min, "max": max, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a, "neg": lambda a: -a, "abs": abs, "mov": lambda a: a,
    "div": lambda a, b: divided(a, b)[0] if b else -1, "rem": lambda a, b: divided(a, b)[1] if b else a,
}  # fmt: skip


def permuted(a: Bits, b: Bits, selectors: Bits) -> Bits:
    both = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    found = []
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = both[selector & 7]
        found.append((255 if byte & 128 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(found), "little")


def truth(a: Bits, b: Bits, c: Bits, table: Bits) -> Bits:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


def field(a: Bits, at: Bits, length: Bits, is_signed: bool) -> Bits:
    at, length = at & 255, length & 255
    bits = [a >> min(i, 31) & 1 if is_signed or i < 32 else 0 for i in range(512)]
    if not is_signed:
        return sum(bits[at + i] << i for i in range(min(length, 32)))
    sign = bits[min(at + length - 1, 31)] if length else 0
    return sum((bits[at + i] if i < length and at + i < 32 else sign) << i for i in range(32))


def by_byte(a: Bits, b: Bits, c: Bits) -> Bits:
    return c + sum((a >> i & 255) * (b >> i & 255) for i in (0, 8, 16, 24))


WORDS: dict[str, Callable[..., int]] = {
    "prmt.b32": permuted, "lop3.b32": lambda a, b, c, t: truth(a, b, c, t & 255), "dp4a.u32.u32": by_byte,
    "shf.l.wrap.b32": lambda low, high, n: (high << 32 | low) << (n & 31) >> 32,
    "shf.r.wrap.b32": lambda low, high, n: (high << 32 | low) >> (n & 31),
    "bfe.u32": lambda a, at, length: field(a, at, length, False),
    "bfe.s32": lambda a, at, length: field(a, at, length, True),
    "popc.b32": lambda a: bin(a).count("1"), "clz.b32": lambda a: 32 - a.bit_length(),
    "clz.b64": lambda a: 64 - a.bit_length(),
}  # fmt: skip


def shifted(a: int, n: int, bits: int, left: bool) -> int:
    return (a << n if n < bits else 0) if left else a >> min(n, 200)


# ---- an opcode's model


class Model:
    """Types of the operands, type of the result, and the result's bits."""

    def __init__(self, operands: list[str], result: str, f: Callable[..., Bits]) -> None:
        self.operands, self.result, self.f = operands, result, f

    def __call__(self, *given: Bits) -> Bits:
        low = [x & (1 << width(kind)) - 1 for x, kind in zip(given, self.operands, strict=True)]
        return self.f(*low) & (1 << width(self.result)) - 1


@cache
def model(opcode: str) -> Model | None:
    """None for an approximate instruction, whose result only has a bound."""
    parts = opcode.split(".")
    name, kind = parts[0], parts[-1]
    if "approx" in parts or "full" in parts:
        return None
    if opcode in WORDS:
        count = WORDS[opcode].__code__.co_argcount
        return Model([kind] * count, "u32", WORDS[opcode])
    if name == "cvt":
        return conversion(parts)
    if name == "setp":
        return Model([kind] * 2, "pred", lambda a, b: compared(parts[1], a, b, kind))
    if name == "selp":
        return Model([kind, kind, "pred"], kind, lambda a, b, p: a if p & 255 else b)
    if kind.endswith("x2"):
        return pairs(opcode.removesuffix("x2"))
    if kind in FORMATS and parts[-2] == "f32":
        return mixed(parts, kind)
    if kind in FORMATS:
        return floats(parts, kind)
    if kind == "pred":
        logic = {
            "and": lambda a, b: a & b,
            "or": lambda a, b: a | b,
            "xor": lambda a, b: a ^ b,
            "not": lambda a: int(not a),
            "mov": lambda a: a,
        }[name]
        return Model([kind] * logic.__code__.co_argcount, kind, logic)
    return integers(opcode.rpartition(".")[0], kind)


def integers(name: str, kind: str) -> Model:
    bits = width(kind)
    if name in ("shl", "shr"):
        return Model([kind, "u32"], kind, lambda a, n: shifted(integer(a, kind), n, bits, name == "shl"))
    if name == "mul.hi":
        return Model([kind] * 2, kind, lambda a, b: integer(a, kind) * integer(b, kind) >> bits)
    f = INTEGERS[name]
    count = 2 if name in ("min", "max") else 1 if name == "abs" else f.__code__.co_argcount
    wide = f"{kind[0]}{2 * bits}" if name.endswith("wide") else kind
    kinds = [kind] * min(count, 2) + [wide] * (count - 2)
    return Model(kinds, wide, lambda *a: f(*(integer(x, k) for x, k in zip(a, kinds, strict=True))))


def floats(parts: list[str], kind: str) -> Model:
    name, flush = parts[0], flushed if "ftz" in parts else lambda x: x
    sign = 1 << (width(kind) - 1)
    functions: dict[str, Callable[..., Bits]] = {
        "add": lambda a, b: add(a, b, kind), "sub": lambda a, b: add(a, negated(b, kind), kind),
        "mul": lambda a, b: product(a, b, kind), "div": lambda a, b: quotient(a, b, kind),
        "fma": lambda a, b, c: fma(a, b, c, kind, "rm" in parts), "sqrt": lambda a: root(a, kind),
        "rcp": lambda a: quotient(one(kind), a, kind), "neg": lambda a: a ^ sign, "abs": lambda a: a & ~sign,
        "mov": lambda a: a, "copysign": lambda a, b: (a & sign) | (b & ~sign),
        "min": lambda a, b: extreme(a, b, kind, -1, "NaN" in parts),
        "max": lambda a, b: extreme(a, b, kind, 1, "NaN" in parts),
    }  # fmt: skip
    f = functions[name]
    return Model([kind] * f.__code__.co_argcount, kind, lambda *a: flush(f(*map(flush, a))))


def mixed(parts: list[str], kind: str) -> Model:
    """Operands of 16 bits, but for the last one; the rest is an instruction of float32."""
    wide = floats(parts[:-1], "f32")
    count = len(wide.operands) - 1
    return Model(
        [kind] * count + ["f32"], "f32", lambda *a: wide(*(to_float(x, kind, "f32") for x in a[:-1]), a[-1])
    )


def pairs(opcode: str) -> Model:
    """Of two halves of a register."""
    half = model(opcode)
    assert half is not None
    bits = width(half.result)
    return Model(
        [f"b{2 * bits}"] * len(half.operands),
        f"b{2 * bits}",
        lambda *a: half(*a) | half(*(x >> bits for x in a)) << bits,
    )


def conversion(parts: list[str]) -> Model:
    *how, to, kind = parts[1:]
    if to.endswith("x2"):
        half = to.removesuffix("x2")
        return Model([kind] * 2, "b32", lambda a, b: to_float(a, kind, half) << 16 | to_float(b, kind, half))
    if "sat" in how:
        return Model([kind], to, lambda a: extreme(extreme(a, 0, kind, 1, False), one(kind), kind, -1, False))
    if to[0] in "us" and kind[0] in "us":
        return Model([kind], to, lambda a: integer(a, kind))
    if to[0] in "us":
        return Model([kind], to, lambda a: to_integer(a, kind, to, "rni" in how))
    if kind[0] in "us":
        return Model([kind], to, lambda a: encoded(Fraction(integer(a, kind)), to))
    if "rni" in how or "rzi" in how:
        return Model([kind], to, lambda a: whole(a, kind, "rni" in how))
    return Model([kind], to, lambda a: to_float(a, kind, to))


# ---- operands

INTEGER_EDGES = (
    0, 1, 2, 3, 7, 8, 15, 31, 32, 33, 63, 64, 127, 128, 255, 256, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31,
    2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
#: Zero, denormals, the least and greatest normal numbers, ties of conversions, bounds of integers.
FLOAT_EDGES = (0.0, 1.0, 1.5, 2.5, 0.5, 3.0, 1 / 3, 255.5, 256.0, 65504.0, 65519.0, 65520.0, 32767.5, 65535.5,
               2.0**31 - 1, 2.0**31, 2.0**32, 2.0**63, 2.0**64, 1e-40, 2.0**-149, 2.0**-126, 2.0**-24, 2.0**-25,
               3 * 2.0**-25, 2.0**-14, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 3.4028234663852886e38, 1e39,
               2.0**-1074, 2.0**-1022, 1.7976931348623157e308, math.pi)  # fmt: skip


def edges(kind: str) -> list[Bits]:
    if kind == "pred":
        return [0, 1]
    if kind not in FORMATS:
        return sorted({x & (1 << width(kind)) - 1 for x in INTEGER_EDGES})
    found = {encoded(Fraction(x), kind) for x in FLOAT_EDGES}
    found |= {x ^ 1 for x in found} | {infinity(0, kind), nan(kind), infinity(0, kind) | 1}
    return sorted(found | {negated(x, kind) for x in found})


def operands(kinds: list[str], generator: np.random.Generator, rows: int = 256) -> list[np.ndarray]:
    """Edges, random bits and random numbers. The bits of a register above its value are random."""
    columns = []
    for kind in kinds:
        known = np.array(edges(kind), np.uint64)
        column = generator.choice(known, rows)
        noise = generator.integers(0, 2**64, rows, np.uint64, endpoint=False)
        if kind in ("f32", "f64"):
            near = generator.standard_normal(rows).astype(np.float32 if kind == "f32" else np.float64)
            noise = np.where(
                generator.random(rows) < 0.5, near.view(f"u{width(kind) // 8}").astype(np.uint64), noise
            )
        column = np.where(generator.random(rows) < 0.6, column, noise)
        if kind == "pred":
            column = column & np.uint64(1)
        low = np.uint64((1 << width(kind)) - 1)
        above = generator.integers(0, 2**64, rows, np.uint64, endpoint=False)
        columns.append(column & low | (above & ~low if width(kind) < 64 else np.uint64(0)))
    return columns
