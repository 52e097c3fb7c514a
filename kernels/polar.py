"""Device functions for complex64 read as one 64-bit word: modulus, angle and their derivatives, with plain arithmetic.

The angle is a minimax polynomial in t = min(|re|, |im|) / max(|re|, |im|), so that it needs no vendor library and is the same on
every GPU and in the interpreter: atan(t) = t + t·s·q(s), s = t². q has degree 8 and a relative error of 2.6e-9 before rounding;
the angle is within 2 units in the last place of the exact one, 3e-7 at most, and the modulus within 1.5. A number of modulus below
FLOOR counts as zero: modulus, angle and both derivatives are 0.
"""

import triton
import triton.language as tl

HALF_PI = tl.constexpr(1.5707963705062866)  # float32, and what it misses of pi/2
HALF_PI_REST = tl.constexpr(-4.371139000186241e-08)
FLOOR = tl.constexpr(
    1.0842021724855044e-19
)  # 2**-63: the square of anything smaller underflows, and the angle's slope with it
LARGE, SMALL = tl.constexpr(1e18), tl.constexpr(1e-16)
GROW, SHRINK = tl.constexpr(2.0**64), tl.constexpr(2.0**-64)


@triton.jit
def load_complex(z_ptr, offset, mask):
    """complex64 behind an int64 pointer -> (re, im) float32; one 8-byte load where two of 4 bytes would not be coalesced."""
    word = tl.load(z_ptr + offset, mask=mask, other=0)
    return word.to(tl.int32).to(tl.float32, bitcast=True), (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def complex_word(re, im):
    """(re, im) float32 -> complex64 as int64."""
    low = re.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (im.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def modulus_of(re, im):
    """|z|, without a square that overflows or underflows: what is very large or small is scaled by a power of two first."""
    a, b = tl.abs(re), tl.abs(im)
    larger = tl.maximum(a, b)
    up = tl.where(larger > LARGE, SHRINK, tl.where(larger < SMALL, GROW, 1.0))
    down = tl.where(larger > LARGE, GROW, tl.where(larger < SMALL, SHRINK, 1.0))
    a, b = a * up, b * up
    m = tl.sqrt_rn(tl.fma(a, a, b * b)) * down
    m = tl.where(m < FLOOR, 0.0, m)
    return tl.where((re != re) | (im != im), re + im, m)


@triton.jit
def modulus_and_angle(re, im):
    """-> |z| and angle(z) in (-pi, pi]; angle(0) = 0, the sign of a zero imaginary part is ignored, NaN stays NaN."""
    m = modulus_of(re, im)
    a, b = tl.abs(re), tl.abs(im)
    larger, smaller = tl.maximum(a, b), tl.minimum(a, b)
    t = tl.where(larger == smaller, 1.0, tl.div_rn(smaller, tl.where(larger == 0.0, 1.0, larger)))
    s = t * t
    q = tl.fma(s, -0.001793615306, 0.01091457793)
    q = tl.fma(s, q, -0.03117779563)
    q = tl.fma(s, q, 0.05795754483)
    q = tl.fma(s, q, -0.08403447584)
    q = tl.fma(s, q, 0.1095218487)
    q = tl.fma(s, q, -0.1426424152)
    q = tl.fma(s, q, 0.1999854827)
    q = tl.fma(s, q, -0.3333329909)
    r = tl.fma(t, s * q, t)
    r = tl.where(tl.abs(im) > tl.abs(re), (HALF_PI - r) + HALF_PI_REST, r)
    r = tl.where(re < 0.0, (2.0 * HALF_PI - r) + 2.0 * HALF_PI_REST, r)
    r = tl.where(im < 0.0, -r, r)
    r = tl.where(m == 0.0, 0.0, r)
    return m, tl.where(m != m, m, r)


@triton.jit
def polar_gradient(re, im, d_modulus, d_angle):
    """Gradients with respect to |z| and angle(z) -> gradient with respect to (re, im); 0 at z = 0."""
    m = modulus_of(re, im)
    inverse = tl.where(m == 0.0, 0.0, tl.div_rn(1.0, tl.where(m == 0.0, 1.0, m)))
    c, s = re * inverse, im * inverse
    turn = d_angle * inverse
    return d_modulus * c - turn * s, d_modulus * s + turn * c
