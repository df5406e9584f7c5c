"""Quantizers from the literature by name: each is a grid, a scale and a straight-through estimator."""

from __future__ import annotations

from .checks import hinted
from .grid import Grid
from .hadamard import Hadamard
from .quantizer import Quantizer
from .scale import Alpha, Granularity, Scale
from .straight_through import StraightThrough

__all__ = ["bitnet", "dynamic", "fixed", "lsq", "quest", "seq"]

HINTED = hinted(
    group_size="the argument is granularity, the size of a group of a row, lsq(4, 128) say",
    per_channel="the argument is granularity, lsq(4, 'row') say",
)


def fixed(bits: int, alpha: Alpha) -> Quantizer:
    """Return ``Grid.uniform(bits)`` with a scale that training does not change, and the clipped identity.

    Args:
        bits: 2 to 8.
        alpha: the scale, as for :meth:`fogzo_kernels.Scale.fixed`: a number, a tensor, or a function of the
            weight's rows.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Example:
        >>> fk.presets.fixed(2, 0.05).scale
        Scale.fixed(0.05)
    """
    return Quantizer(Grid.uniform(bits), Scale.fixed(alpha), StraightThrough("identity"))


def _checked_bits(bits: int) -> int:
    if isinstance(bits, bool) or bits not in range(1, 9):
        ternary = " (three values: bitnet() or seq(1.58))" if bits == 1.58 else ""
        raise ValueError(f"bits must be an int in 1..8, got {bits!r}{ternary}")
    return int(bits)


@HINTED
def lsq(bits: int, granularity: Granularity = "tensor") -> Quantizer:
    """Return LSQ: ``Grid.uniform(bits)``, or ``Grid.sign()`` for 1 bit, with a learned scale.

    Alpha starts at 2 mean abs(w) / sqrt(qmax). Its gradient is divided by sqrt(n qmax), where n weights share
    it (arXiv 1902.08153, sections 2.1 and 2.2). With 1 bit alpha starts at mean abs(w), and gradients pass a
    hardtanh.

    Args:
        bits: 1 to 8.
        granularity: which weights share an alpha: ``"tensor"``, ``"row"``, or the size of a group of a row.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Example:
        >>> fk.presets.lsq(2).scale, fk.presets.lsq(1).straight_through.kind
        (Scale.learned(), 'hardtanh')
    """
    bits = _checked_bits(bits)
    if bits == 1:
        scale = Scale.learned(init=Scale.absmean(granularity))
        return Quantizer(Grid.sign(), scale, StraightThrough("hardtanh"))
    return Quantizer(Grid.uniform(bits), Scale.learned(granularity), StraightThrough("identity"))


@HINTED
def seq(bits: float, granularity: Granularity = "row") -> Quantizer:
    """Return ParetoQ's SEQ: equal steps across a learned range, without 0 for 2 bits.

    The values are -3/4, -1/4, 1/4 and 3/4 of the range for 2 bits, and -2/3, 0 and 2/3 for 1.58 (ParetoQ, arXiv
    2502.02631, equation 3). The range starts at max abs(w). Alpha is the distance of neighbouring values: 1/2
    or 2/3 of the range.

    Args:
        bits: 2, or 1.58 for three values.
        granularity: which weights share an alpha: ``"tensor"``, ``"row"``, or the size of a group of a row.

    Raises:
        ValueError: ``bits`` or ``granularity`` is none of these.

    Example:
        >>> fk.presets.seq(1.58).grid == fk.Grid.ternary()
        True
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
    """Return QuEST: half-offset levels after a Hadamard transform; gradients pass values that are near a level.

    The transform makes each block of a row nearly normal. The levels span c sigma on either side, where sigma
    is the root mean square of the transformed values and c the best factor for a normal distribution. Where a
    value is at most half a step from its level, the gradient is that of the identity; elsewhere it is 0 (QuEST,
    arXiv 2502.05003, algorithm 1). The quantizer suits weights and activations.

    Args:
        bits: 1 to 8.
        block: number of elements of a block of the transform: 16, 32, 64, ... 1024. It must divide the rows.
        granularity: which values share an alpha: ``"row"``, ``"tensor"``, or the size of a group of a row, a
            multiple of ``block``.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Example:
        >>> q = fk.presets.quest(4, block=64)
        >>> q.straight_through.clip, q.transform
        ('trust', Hadamard(block=64))
    """
    bits = _checked_bits(bits)
    scale = Scale.rms(granularity, factor=2 * CLIPS[bits - 1] / (2**bits - 1), add=1e-8)
    trust = StraightThrough("identity", clip="trust")
    return Quantizer(Grid.half_offset(bits), scale, trust, Hadamard(block))


@HINTED
def dynamic(bits: int, granularity: Granularity = "row") -> Quantizer:
    """Return a quantizer for activations: ``Grid.uniform(bits)`` up to the largest value of each token.

    Each forward measures the scale. BitNet b1.58 takes this with 8 bits (arXiv 2402.17764, section 2).

    Args:
        bits: 2 to 8.
        granularity: which values share an alpha: ``"row"`` (a token), ``"tensor"``, or the size of a group of a
            token.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.bitnet(), activation=fk.presets.dynamic(8))
        >>> model.activation.grid.levels
        256
    """
    grid = Grid.uniform(bits)
    scale = Scale.absmax(granularity, factor=1 / grid.qmax, least=1e-5 / grid.qmax)
    return Quantizer(grid, scale, StraightThrough("identity", clip=False))


def bitnet() -> Quantizer:
    """Return BitNet b1.58: the values -alpha, 0 and alpha, where alpha is the mean of abs(w), at least 1e-5.

    One alpha serves the whole tensor (arXiv 2402.17764, equations 1 to 3). Gradients pass unchanged.

    Example:
        >>> fk.presets.bitnet().grid.levels
        3
    """
    return Quantizer(Grid.ternary(), Scale.absmean(least=1e-5), StraightThrough("identity", clip=False))
