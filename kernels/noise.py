"""Counter-based normal noise: Philox4x32 words turned into normals, regenerated wherever they are needed.

The stream is defined by (seed, draw, feature) alone; `klnorm/reference/noise.py` is its specification.
"""

import math

import triton
import triton.language as tl

SCALE_STREAM = tl.constexpr(0)
SHIFT_STREAM = tl.constexpr(1)
MERGED_STREAM = tl.constexpr(2)

ROUNDS = tl.constexpr(7)

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)
_TURN = tl.constexpr(2 * math.pi / 65536)


@triton.jit
def load_key(seed):
    """The two 32-bit key words of an int64 seed, a pointer to it or itself; zeros where there is none."""
    if seed is None:
        return tl.full((), 0, tl.uint32), tl.full((), 0, tl.uint32)
    else:
        key = tl.load(seed) if seed.dtype.is_ptr() else seed
        key = key.to(tl.uint64)
        return (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1, rounds: tl.constexpr):
    """Philox4x32 (Salmon et al., SC11): four uint32 words for the counter (c0, c1, c2, c3) and the key (k0, k1)."""
    # The multipliers are uint64 tensors, so one widening multiplication yields both halves of each product.
    m0 = tl.full((), _MULTIPLIER_0, tl.uint64)
    m1 = tl.full((), _MULTIPLIER_1, tl.uint64)
    w0 = tl.full((), _WEYL_0, tl.uint32)
    w1 = tl.full((), _WEYL_1, tl.uint32)
    for _ in tl.static_range(rounds):
        product_0 = c0.to(tl.uint64) * m0
        product_1 = c2.to(tl.uint64) * m1
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product_1.to(tl.uint32)
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product_0.to(tl.uint32)
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def _fast_normal_pair(word):
    """`normal_pair` with the hardware's own approximations (sm_80 and later), 15 instructions.

    A half h becomes the float 2^23 + h by setting the exponent bits above it, without the slow integer
    conversion; the fused multiply-adds that scale it are exact in their product and round once.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high;
        .reg .f32 uniform, angle, radius, cosine, sine;
        prmt.b32 low, $2, 0x4B00, 0x5410;
        prmt.b32 high, $2, 0x4B00, 0x5432;
        fma.rn.f32 uniform, low, 0f37800000, 0fC2FFFFFF;    // (h + 1/2) 2^-16
        fma.rn.f32 angle, high, 0f38C90FDB, 0fC4490FDB;     // 2 pi h 2^-16
        lg2.approx.ftz.f32 radius, uniform;
        mul.f32 radius, radius, 0fBFB17218;                 // -2 ln 2
        sqrt.approx.ftz.f32 radius, radius;
        cos.approx.ftz.f32 cosine, angle;
        sin.approx.ftz.f32 sine, angle;
        mul.f32 $0, radius, cosine;
        mul.f32 $1, radius, sine;
        }
        """,
        "=f,=f,r",
        [word],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def normal_pair(word, FAST: tl.constexpr):
    """Box-Muller on the two 16-bit halves of a uint32 word: two independent normals, fp32."""
    if FAST:
        return _fast_normal_pair(word)
    uniform = ((word & 0xFFFF).to(tl.float32) + 0.5) * (1.0 / 65536)
    angle = (word >> 16).to(tl.float32) * _TURN
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(k0, k1, draw, first_col, STREAM: tl.constexpr, BLOCK_N: tl.constexpr, FAST: tl.constexpr):
    """Normals [rows, BLOCK_N] of features first_col + (0 .. BLOCK_N - 1) for `draw` [rows, 1], uint32.

    One Philox call makes eight neighbouring features, which stay in the registers of one thread.
    """
    block = (first_col // 8 + tl.arange(0, BLOCK_N // 8)).to(tl.uint32)[None, :]
    draw, block = tl.broadcast(draw, block)
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = philox4x32(block, draw, zero + STREAM, zero, k0, k1, ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    even, odd = normal_pair(words, FAST)
    z = tl.join(even, odd)
    return tl.reshape(z, (z.shape[0], BLOCK_N))
