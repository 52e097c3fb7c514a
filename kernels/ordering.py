"""Device functions that put float32 values in one total order: integer keys, key and index in one word, bins of a monotone key.

Comparisons of NaN are false both ways, which makes a comparison sort lose and duplicate elements. Everything here is therefore
ordered by integers: -NaN < -inf < .. < -0 < +0 < .. < inf < NaN.
"""

import triton
import triton.language as tl

KEY_LAST = tl.constexpr(0x7FFFFFFF)
WORD_LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
HALF_LIMIT = tl.constexpr(65504.0)  # the largest finite float16


@triton.jit
def to_key(x):
    """float32 -> int32 in the order above. On int32 the map is its own inverse."""
    b = x.to(tl.int32, bitcast=True)
    return b ^ ((b >> 31) & 0x7FFFFFFF)


@triton.jit
def from_key(k):
    """int32 key -> the float32 it was made of."""
    return (k ^ ((k >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(key, low):
    """key int32, low int32 >= 0 -> int64 ordered by key, then by low."""
    return (key.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def word_value(word):
    """The float32 value whose key is in the upper half of a packed word."""
    return from_key((word >> 32).to(tl.int32))


@triton.jit
def word_low(word):
    """The int32 in the lower half of a packed word."""
    return (word & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def bin_of(x, inverse_scale, LINEAR: tl.constexpr, LOG_BINS: tl.constexpr):
    """float32 -> int32 bin in [0, 2**LOG_BINS), never decreasing in x (a multiplication and a rounding are both monotone).

    LINEAR: equal widths over [0, 2**LOG_BINS / inverse_scale), for magnitudes x >= 0. Otherwise the leading bits of
    float16(x · inverse_scale), for signed values of many orders of magnitude. What lies outside falls into the outermost bins.
    """
    scaled = x * inverse_scale + 0.0  # -0 and +0 are equal everywhere else, so they must share a bin
    if LINEAR:
        last: tl.constexpr = (1 << LOG_BINS) - 1
        b = tl.minimum(tl.where(scaled == scaled, scaled, last), last).to(tl.int32)
        return tl.maximum(tl.minimum(b, last), 0)
    else:
        limited = tl.maximum(tl.minimum(tl.where(scaled == scaled, scaled, HALF_LIMIT), HALF_LIMIT), -HALF_LIMIT)
        h = limited.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return ((h ^ ((h >> 31) & 0x7FFF)) + 32768) >> (16 - LOG_BINS)
