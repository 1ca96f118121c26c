"""The rules of products, norms and GELU as single Triton kernels, products on int8 matrix units.

A number on a grid is an integer q of at most 22 bits times a power of two. q = d2·65536 + d1·256 +
d0, with digits from -128 to 127, so that a product of two such matrices is nine products of int8
matrices, which int32 adds up without rounding: at most 3K terms of 2^14 share an accumulator. There
are five, one for each weight of digits, joined in int64 at the end. That is the integer which
float64 adds up too, by other units: so the rules in float64, which are the definition, give the
same bits, and go on where these kernels do not run.

Everything else is one IEEE operation after another, as in the rules: no kernel is compiled with
fused multiply-add, and sums are those of integers. NaN and infinity make their row's `rest` NaN.
"""

import torch
import triton
import triton.language as tl

OPTIONS = {"enable_fp_fusion": False}  # of every launch here
STEP = tl.constexpr(64)  # digits along K at a time: rows of digits are padded with zeros to that
LONGEST = 1 << 15  # K that five int32 accumulators hold, with room: 3 · 2^14 · K < 2^31

# ------------------------------------------------------------------------------------------- parts


@triton.jit
def power_of_two(exponent):
    """2.0 ** (exponent - 1023)."""
    return (exponent.to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def bits_of(x):
    """|x| as an integer in the same order; NaN is above infinity."""
    return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def grid(top, BITS: tl.constexpr):
    """grids.grid: (up, down, rest) for the bits_of the largest number."""
    exponent = top >> 52
    down = tl.minimum(tl.maximum(exponent, BITS), 2046) + (1 - BITS)
    near = tl.minimum(tl.maximum(down, 823), 1223)
    rest = tl.where(exponent == 2047, float("nan"), power_of_two(down - near + 1023))
    return power_of_two(2046 - down), power_of_two(near), rest


@triton.jit
def nearest(x):
    """round(x), ties to even, for |x| <= 2^51."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def three_digits(q):
    """int32 of at most 22 bits → int8 digits of weight 1, 256 and 65536."""
    d0 = ((q + 128) & 255) - 128
    q = (q - d0) >> 8
    d1 = ((q + 128) & 255) - 128
    return d0.to(tl.int8), d1.to(tl.int8), ((q - d1) >> 8).to(tl.int8)


@triton.jit
def nine(a0, a1, a2, b0, b1, b2, c0, c1, c2, c3, c4):
    """The accumulators c, of digits of equal weight, plus the products of the digits of a and b."""
    c0 = tl.dot(a0, b0, c0, out_dtype=tl.int32)
    c1 = tl.dot(a0, b1, c1, out_dtype=tl.int32)
    c1 = tl.dot(a1, b0, c1, out_dtype=tl.int32)
    c2 = tl.dot(a0, b2, c2, out_dtype=tl.int32)
    c2 = tl.dot(a1, b1, c2, out_dtype=tl.int32)
    c2 = tl.dot(a2, b0, c2, out_dtype=tl.int32)
    c3 = tl.dot(a1, b2, c3, out_dtype=tl.int32)
    c3 = tl.dot(a2, b1, c3, out_dtype=tl.int32)
    c4 = tl.dot(a2, b2, c4, out_dtype=tl.int32)
    return c0, c1, c2, c3, c4


@triton.jit
def joined(c0, c1, c2, c3, c4):
    """The integer of five accumulators as float64, for K up to 64: pairs fit into 32 bits."""
    high, low = (c4 << 8) + c3, (c1 << 8) + c0
    low = (c2.to(tl.int64) << 16) + low.to(tl.int64)
    return (high.to(tl.int64) << 24).to(tl.float64) + low.to(tl.float64)


@triton.jit
def joined_long(c0, c1, c2, c3, c4):
    """The integer of five accumulators as float64, for any K."""
    s = (((c4.to(tl.int64) << 8) + c3.to(tl.int64)) << 8) + c2.to(tl.int64)
    return ((((s << 8) + c1.to(tl.int64)) << 8) + c0.to(tl.int64)).to(tl.float64)


# ------------------------------------------------------------------------------------------ digits


@triton.jit
def store_digits(D, plane, place, q, mask):
    d0, d1, d2 = three_digits(q.to(tl.int32))
    tl.store(D + place, d0, mask=mask)
    tl.store(D + plane + place, d1, mask=mask)
    tl.store(D + 2 * plane + place, d2, mask=mask)


@triton.jit
def row_digits_kernel(X, D, NEAR, REST, rows, K, padded, batch_stride, row_stride, plane,
                      BITS: tl.constexpr, BLOCK: tl.constexpr):
    """A row of x, contiguous: its largest number, then its digits."""
    r, g, k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    X += g * batch_stride + r * row_stride
    r += g * rows
    top = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, K, BLOCK):
        top = tl.maximum(top, bits_of(tl.load(X + start + k, mask=start + k < K, other=0.0)))
    up, near, rest = grid(tl.max(top, 0), BITS)
    for start in range(0, padded, BLOCK):
        x = tl.load(X + start + k, mask=start + k < K, other=0.0)
        store_digits(D, plane, r * padded + start + k, nearest(x * up), start + k < padded)
    tl.store(NEAR + r, near)
    tl.store(REST + r, rest)


@triton.jit
def tops_kernel(X, TOP, rows, K, batch_stride, row_stride, stride, per_program,
                BR: tl.constexpr, BK: tl.constexpr):
    """TOP[row]: bits_of the largest number of a row, of which a program sees `per_program`."""
    g, r = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    first = tl.program_id(1).to(tl.int64) * per_program
    top = tl.zeros((BR, BK), tl.int64)
    for start in range(0, per_program, BK):
        k = first + start + tl.arange(0, BK)
        inside = (r < rows)[:, None] & (k < K)[None, :]
        place = g * batch_stride + r[:, None] * row_stride + k[None, :] * stride
        top = tl.maximum(top, bits_of(tl.load(X + place, mask=inside, other=0.0)))
    tl.atomic_max(TOP + g * rows + r, tl.max(top, 1), mask=r < rows)


@triton.jit
def column_digits_kernel(X, TOP, D, NEAR, REST, rows, K, padded, batch_stride, row_stride, stride,
                         plane, BITS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """The digits of rows that do not lie in memory as such, of known largest numbers."""
    g, r = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    k = tl.program_id(1).to(tl.int64) * BK + tl.arange(0, BK)
    inside = (r < rows)[:, None] & (k < K)[None, :]
    place = g * batch_stride + r[:, None] * row_stride + k[None, :] * stride
    x = tl.load(X + place, mask=inside, other=0.0)
    row = g * rows + r
    up, near, rest = grid(tl.load(TOP + row, mask=r < rows, other=0), BITS)
    store_digits(D, plane, row[:, None] * padded + k[None, :], nearest(x * up[:, None]),
                 (r < rows)[:, None] & (k < padded)[None, :])
    tl.store(NEAR + row, near, mask=r < rows)
    tl.store(REST + row, rest, mask=r < rows)


def padded_to_step(k):
    return triton.cdiv(k, STEP.value) * STEP.value


def to_digits(x, bits):
    """x[G, R, K] of any strides, on a grid for each row → (digits int8[3, G, R, K padded with zeros
    to a multiple of 64], near float64[G, R], rest[G, R]), as of grids.grid."""
    groups, rows, k = x.shape
    if x.stride(2) != 1 and not (k > 1 and x.stride(1) == 1):
        x = x.contiguous()
    padded = padded_to_step(k)
    digits = torch.empty(3, groups, rows, padded, dtype=torch.int8, device=x.device)
    near, rest = torch.empty(2, groups, rows, dtype=torch.float64, device=x.device)
    plane = groups * rows * padded
    if x.stride(2) == 1 or k == 1:
        block = min(4096, triton.next_power_of_2(padded))
        row_digits_kernel[rows, groups](
            x, digits, near, rest, rows, k, padded, x.stride(0), x.stride(1), plane, bits, block,
            **OPTIONS)
        return digits, near, rest
    top = tops(x)
    column_digits_kernel[triton.cdiv(rows, 64), triton.cdiv(padded, 64), groups](
        x, top, digits, near, rest, rows, k, padded, *x.stride(), plane, bits, 64, 64, **OPTIONS)
    return digits, near, rest


def tops(x):
    """bits_of the largest number of each row of x[G, R, K]: int64[G, R]."""
    groups, rows, k = x.shape
    across = x.stride(2) != 1  # rows lie side by side
    br, bk = (64, 64) if across else (1, 4096)
    per_program = max(bk, triton.next_power_of_2(triton.cdiv(k, 64)))
    top = torch.zeros(groups, rows, dtype=torch.int64, device=x.device)
    tops_kernel[triton.cdiv(rows, br), triton.cdiv(k, per_program), groups](
        x, top, rows, k, *x.stride(), per_program, br, bk, **OPTIONS)
    return top
