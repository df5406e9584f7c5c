"""Quantizers of the field by name: a grid, a scale and a straight-through estimator each."""

from __future__ import annotations

from .checks import hinted
from .grid import Grid
from .hadamard import Hadamard
from .quantizer import Quantizer
from .scale import Alpha, Granularity, Scale
from .straight_through import StraightThrough

HINTED = hinted(
    group_size="the argument is granularity, the size of a group of a row, lsq(4, 128) say",
    per_channel="the argument is granularity, lsq(4, 'row') say",
)


def fixed(bits: int, alpha: Alpha) -> Quantizer:
    """``Grid.uniform(bits)`` with a scale that stays, and the clipped identity.

    Args:
        bits: 2 to 8.
        alpha: as for :meth:`Scale.fixed`.
    """
    return Quantizer(Grid.uniform(bits), Scale.fixed(alpha), StraightThrough("identity"))


def _checked_bits(bits: int) -> int:
    if isinstance(bits, bool) or bits not in range(1, 9):
        ternary = " (three values: bitnet() or seq(1.58))" if bits == 1.58 else ""
        raise ValueError(f"bits must be an int in 1..8, got {bits!r}{ternary}")
    return int(bits)


@HINTED
def lsq(bits: int, granularity: Granularity = "tensor") -> Quantizer:
    """``Grid.uniform(bits)``, for 1 bit ``Grid.sign()``, with a learned scale.

    LSQ (Esser et al. 2020, arXiv 1902.08153): alpha begins at 2 mean abs(w) / sqrt(qmax), and its gradient is
    divided by sqrt(n qmax), for n weights that share it. With 1 bit it begins at mean abs(w), and gradients
    pass a hardtanh.

    Args:
        bits: 1 to 8.
        granularity: which weights share an alpha: ``"tensor"``, ``"row"``, or the size of a group of a row.

    Raises:
        ValueError: an argument is out of range.
    """
    bits = _checked_bits(bits)
    if bits == 1:
        scale = Scale.learned(init=Scale.absmean(granularity))
        return Quantizer(Grid.sign(), scale, StraightThrough("hardtanh"))
    return Quantizer(Grid.uniform(bits), Scale.learned(granularity), StraightThrough("identity"))


@HINTED
def seq(bits: float, granularity: Granularity = "row") -> Quantizer:
    """Values -3/4, -1/4, 1/4, 3/4 of a learned range for 2 bits; -2/3, 0, 2/3 for 1.58.

    SEQ (ParetoQ, Liu et al. 2025, arXiv 2502.02631, equation 3): a grid of equal steps across the range
    max abs(w), which is where it begins. Alpha is the distance of neighbouring values: half of the range, or
    two thirds of it.

    Args:
        bits: 2, or 1.58 for three values.
        granularity: which weights share an alpha: ``"tensor"``, ``"row"``, or the size of a group of a row.

    Raises:
        ValueError: ``bits`` is another number.
    """
    if bits == 2:
        grid, share = Grid.half_offset(2), 1 / 2
    elif bits == 1.58:
        grid, share = Grid.ternary(), 2 / 3
    else:
        raise ValueError(f"bits must be 2 or 1.58, got {bits!r}")
    scale = Scale.learned(init=Scale.absmax(granularity, factor=share))
    return Quantizer(grid, scale, StraightThrough("identity"))


#: Of QuEST: the range, in standard deviations, that is clipped least harmfully for normal values, by bits.
CLIPS = (0.79788, 1.49353, 2.05107, 2.51393, 2.91609, 3.27660, 3.60105, 3.88494)


@HINTED
def quest(bits: int, block: int = 128, granularity: Granularity = "row") -> Quantizer:
    """Half-offset levels over a range of c sigma, after a Hadamard transform; gradients pass trusted values.

    QuEST (Panferov et al. 2025, arXiv 2502.05003, algorithm 1): each block of a row is rotated, which makes it
    nearly normal; sigma is the root mean square of what is rotated, c the best for a normal distribution. The
    gradient is that of the identity where a value is at most half a step away from its level. For weights and
    for activations.

    Args:
        bits: 1 to 8.
        block: of the transform: 16, 32, .. or 1024; it must divide the rows.
        granularity: which values share an alpha: ``"row"``, ``"tensor"``, or the size of a group of a row, a
            multiple of ``block``.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """
    bits = _checked_bits(bits)
    scale = Scale.rms(granularity, factor=2 * CLIPS[bits - 1] / (2**bits - 1), add=1e-8)
    trust = StraightThrough("identity", clip="trust")
    return Quantizer(Grid.half_offset(bits), scale, trust, Hadamard(block))


@HINTED
def dynamic(bits: int, granularity: Granularity = "row") -> Quantizer:
    """For activations: ``Grid.uniform(bits)`` across the largest value of each token, measured in each forward.

    What BitNet b1.58 (arXiv 2402.17764) takes, with 8 bits.

    Args:
        bits: 2 to 8.
        granularity: ``"row"``, a token, or ``"tensor"``, or the size of a group of a token.
    """
    grid = Grid.uniform(bits)
    scale = Scale.absmax(granularity, factor=1 / grid.qmax, least=1e-5 / grid.qmax)
    return Quantizer(grid, scale, StraightThrough("identity", clip=False))


def bitnet() -> Quantizer:
    """Three values, -alpha, 0 and alpha, with alpha the mean of abs(w) over the tensor, at least 1e-5.

    BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764, equations 1 to 3).
    """
    return Quantizer(Grid.ternary(), Scale.absmean(least=1e-5), StraightThrough("identity", clip=False))
