"""Device functions of counting (see `count`): what is known about a bin, and where single values stand among bins."""

import triton
import triton.language as tl

from .half_list import ODD, single
from .ordering import bin_of

# What is known about a bin, as bits: the sign is +1 (bit 0: of the values, or of the positive copies; bit 1: of the negative copies).
PLUS = tl.constexpr(1)
MINUS = tl.constexpr(2)
STRADDLES = tl.constexpr(4)


@triton.jit
def singles_before_bin(
    b, scale, t0, t1, t2, t3, FORM: tl.constexpr, S: tl.constexpr, LOG_BINS: tl.constexpr, NEGATIVE: tl.constexpr
):
    """Single values before bin b on the way from -inf to inf, and those in it; NEGATIVE: b is a bin of negative copies (ODD only)."""
    before = tl.zeros_like(b)
    inside = tl.zeros_like(b)
    for q in tl.static_range(S):
        t = single(q, t0, t1, t2, t3)
        if FORM == ODD:
            k = bin_of(tl.abs(t), scale, True, LOG_BINS)
            minus = (t < 0.0).to(tl.int32)
            if NEGATIVE:
                before += minus * (k > b).to(tl.int32)
                inside += minus * (k == b).to(tl.int32)
            else:
                before += tl.maximum(minus, (k < b).to(tl.int32))
                inside += (1 - minus) * (k == b).to(tl.int32)
        else:
            k = bin_of(t, scale, False, LOG_BINS)
            before += (k < b).to(tl.int32)
            inside += (k == b).to(tl.int32)
    return before, inside


@triton.jit
def side_sign(code, BIT: tl.constexpr):
    """+1 or -1 out of the code of a decided bin."""
    return tl.where((code & BIT) != 0, 1, -1)
