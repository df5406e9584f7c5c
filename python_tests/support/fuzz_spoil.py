"""What makes a call of a native op bad: a value of one argument that the op must refuse."""

import math

import torch

CODES = ("plus", "minus", "quantized")  # int8 is one of their dtypes
NAN, BIG = math.nan, 2**63 - 1
#: What no number may be, by argument.
NUMBERS = {
    "step": (-1, 2**32, BIG), "direction": (-1, 2**16, BIG), "qmin": (-129, 128, BIG, -BIG),
    "qmax": (-129, 128, BIG, 2**32), "offset": (NAN, 0.25, math.inf), "r": (0, 3, -1, BIG),
    "block": (-1, 8, 100, 2048, BIG),
    "optimizer_step": (0, -1, -BIG), "one_minus_beta": (NAN, math.inf, -1.0, 1.5, 1e308),
    "lr": (NAN, math.inf, -math.inf, -1.0), "factor": (NAN, math.inf, -1.0, 0.0, 1e-39, 1e39),
    "held": ([-1], [BIG], [0, 2**40]), "guided": (True,),
    "add": (NAN, math.inf, -1e-9, 1e39), "least": (NAN, math.inf, -1e-9, 1e39),
}  # fmt: skip
#: What floats may be without a crash; nothing is said about the result.
ODD = dict.fromkeys(("epsilon", "noise_scale"), (NAN, math.inf, -math.inf, -1.0, 0.0, 1e308))
STRINGS = ("distribution", "straight_through", "rule", "statistic")
LAYOUTS = ((-1, 1, 1), (0, 0, 1), (0, 1, 0), (2**51, 1, 1), (BIG, BIG, BIG), (0, -BIG, 1))


def freed(t):
    t.untyped_storage().resize_(0)
    return t


def cut(t):
    """Of full size, with a storage that holds half of it."""
    t.untyped_storage().resize_(t.nbytes // 2)
    return t


def misaligned(t):
    memory = bytearray(t.nbytes + 1)
    return torch.frombuffer(memory, dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)


def spread(t):
    """The same shape, every other element of its memory."""
    return torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0]


#: Each gives a tensor that must be refused in the place of one with at least 2 elements.
ITEMS = {
    "float64": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    "int64": lambda t: t.long() if t.dtype != torch.int64 else t.int(),
    "bool": lambda t: t.bool(), "complex": lambda t: t.to(torch.complex64),
    "int8": lambda t: torch.zeros(t.shape, dtype=torch.int8),
    "longer": lambda t: torch.ones(t.numel() * 2 + 97, dtype=t.dtype),
    "shorter": lambda t: torch.ones(t.numel() - 1, dtype=t.dtype),
    "empty": lambda t: torch.zeros(0, dtype=t.dtype),
    "meta": lambda t: t.to("meta"), "sparse": lambda t: t.to_sparse(), "spread": spread,
    "freed": lambda t: freed(t.clone()), "cut": lambda t: cut(t.clone()), "misaligned": misaligned,
    "onednn": lambda t: t.float().to_mkldnn(),
}  # fmt: skip
#: Lists that no other gives a shape.
FIRST = (("guide_sumsq", "grads"), ("estimate_gradient", "grads"), ("measure_alphas", "tensors"))
#: What an empty tensor takes in the place of an alpha; "shorter" may fit others too.
SHAPES = ("longer", "shorter", "empty", "misshaped")
#: Of ITEMS, for a tensor of one element.
SCALAR_ITEMS = ["float64", "int64", "meta", "freed", "misaligned", "longer"]


def misshaped(alpha, like, number):
    """The same scales in a shape that does not fit ``like``, which has rows and columns."""
    scales, rows = alpha.numel(), like.shape[0]
    shapes = [(1, 1, 1, scales)] + [(scales,)] * (scales != rows) + [(1, scales)] * (rows != 1)
    return alpha.view(shapes[number % len(shapes)])


def places(name, arguments, how):
    """Which tensors of that list can be spoiled so."""
    found = [i for i, t in enumerate(arguments[name]) if t.numel() >= 2]
    if name == "alphas" and how in SHAPES:
        found = [i for i in found if like_of(arguments)[i].numel()]
    return found


def like_of(arguments):
    """The tensors that alphas belong to."""
    return next(arguments[name] for name in ("latents", "tensors", "grads") if name in arguments)


def applicable(op, name, arguments):
    """How that argument can be spoiled, so that the call is bad for sure (or odd)."""
    value = arguments[name]
    if name == "guided" and not arguments["losses_plus"].numel():
        return []
    if name in NUMBERS:
        return ["number", *SCALAR_ITEMS] if isinstance(value, torch.Tensor) else ["number"]
    if name in ODD:
        return ["odd"]
    if name in STRINGS:
        return ["unknown"]
    if name == "held":
        return ["number"]
    if name == "layouts":
        return ["double", "drop", "layout"] if value else []
    if name in ("tensor_ids", "names", "values") or (op, name) == ("learned_backward", "factors"):
        return ["double", "drop"] if value else []
    if isinstance(value, torch.Tensor):
        if value.numel() < 2:  # a number or one loss
            found = SCALAR_ITEMS if value.numel() else ["float64", "int64", "meta", "longer"]
            return [how for how in found if how != "longer" or (op, name) != ("noise", "out")]
        found = [how for how in ITEMS if how not in ("longer", "shorter", "empty")]
        return found if op == "noise" else [*found, "longer", "shorter", "empty"]
    if not isinstance(value, list) or not value:
        return []
    if name == "counters":
        return ["double", *[how for how in ITEMS if how != "int64"]]
    if max(t.numel() for t in value) < 2:
        return ["double"]
    found = ["double", *ITEMS] + (["drop"] if len(value) > 1 else [])
    takes_codes = name in CODES or (op == "quantize" and name == "out")
    pair = name in ("plus", "minus") and arguments["plus"] and arguments["minus"]
    if takes_codes and not (pair and value[0].dtype != torch.int8):
        found.remove("int8")
    if value[0].dtype == torch.int8:
        found.remove("misaligned")
    if (op, name) in FIRST:  # alphas may fit another shape, too
        found = [how for how in found if how not in SHAPES]
    if name == "alphas":
        found.remove("shorter")
        found = [how for how in (*found, "misshaped") if how not in SHAPES or places(name, arguments, how)]
    return found


def spoil(name, arguments, how, number):
    """The bad value of that argument."""
    value = arguments[name]
    if how in ("number", "odd"):
        values = NUMBERS.get(name) or ODD[name]
        bad = values[number % len(values)]
        return torch.tensor(bad, dtype=value.dtype) if isinstance(value, torch.Tensor) else bad
    if how in ITEMS and isinstance(value, torch.Tensor):
        return ITEMS[how](value)
    if how in ITEMS or how == "misshaped":
        where = places(name, arguments, how)
        i, number = where[number % len(where)], number // len(where)
        bad = ITEMS[how](value[i]) if how in ITEMS else misshaped(value[i], like_of(arguments)[i], number)
        return [*value[:i], bad, *value[i + 1 :]]
    if how == "drop":
        return value[:-1]
    if how == "double":
        return [*value, value[-1]]
    if how == "unknown":
        return ("", "unknown", value.upper(), value + "\0")[number % 4]
    if how == "layout":
        i = 3 * (number % (len(value) // 3))
        return [*value[:i], *LAYOUTS[number % len(LAYOUTS)], *value[i + 3 :]]
    raise ValueError(f"how must be a known one, got {how}")
