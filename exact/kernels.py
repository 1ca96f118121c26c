"""The rules of products, norms and GELU as single Triton kernels, products on int8 matrix units.

A number on a grid is an integer q of at most 23 bits times a power of two. q = d2·65536 + d1·256 +
d0, with digits from -128 to 127, so that a product of two such matrices is nine products of int8
matrices, which int32 adds up without rounding: at most 3K terms of 2^14 share an accumulator. There
are five, one for each weight of digits, joined in int64 at the end. That is the integer which
float64 adds up too, by other units: so the rules in float64, which are the definition, give the
same bits, and go on where these kernels do not run.

Everything else is one IEEE operation after another, as in the rules: no kernel is compiled with
fused multiply-add, and sums are those of integers. NaN and infinity make their row's `rest` NaN.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.multiprocessing.reductions import StorageWeakRef

from exact import grids
from exact.gpu import has_int8_products

OPTIONS = {"enable_fp_fusion": False}  # of every launch here
SMALL = 1 << 19  # numbers of an operand that is read twice rather than rounded in advance
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
def grid(top, bits):
    """grids.grid: (up, down, rest) for the bits_of the largest number."""
    exponent = (top + (1 << 46)) >> 52
    down = tl.minimum(tl.maximum(exponent, bits), 2046) + (1 - bits)
    near = tl.minimum(tl.maximum(down, 823), 1223)
    rest = tl.where(top >> 52 == 2047, float("nan"), power_of_two(down - near + 1023))
    return power_of_two(2046 - down), power_of_two(near), rest


@triton.jit
def nearest(x):
    """round(x), ties to even, for |x| <= 2^51."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def three_digits(q):
    """int32 of at most 23 bits → int8 digits of weight 1, 256 and 65536."""
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


@triton.jit(do_not_specialize=["rows", "bits"])
def row_digits_kernel(X, D, NEAR, REST, rows, K, padded, batch_stride, row_stride, stride, plane,
                      bits, BR: tl.constexpr, BK: tl.constexpr):
    """Whole rows of x: their largest numbers, then their digits."""
    g, r = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    k, real = tl.arange(0, BK)[None, :].to(tl.int64), (r < rows)[:, None]
    X += g * batch_stride + r[:, None] * row_stride
    row = g * rows + r
    top = tl.zeros((BR, BK), tl.int64)
    for start in range(0, K, BK):
        x = tl.load(X + (start + k) * stride, mask=real & (start + k < K), other=0.0)
        top = tl.maximum(top, bits_of(x))
    up, near, rest = grid(tl.max(top, 1), bits)
    for start in range(0, padded, BK):
        x = tl.load(X + (start + k) * stride, mask=real & (start + k < K), other=0.0)
        store_digits(D, plane, row[:, None] * padded + start + k, nearest(x * up[:, None]),
                     real & (start + k < padded))
    tl.store(NEAR + row, near, mask=r < rows)
    tl.store(REST + row, rest, mask=r < rows)


@triton.jit(do_not_specialize=["K", "bits"])
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


@triton.jit(do_not_specialize=["K", "bits"])
def column_digits_kernel(X, TOP, D, NEAR, REST, rows, K, padded, batch_stride, row_stride, stride,
                         plane, bits, BR: tl.constexpr, BK: tl.constexpr):
    """The digits of parts of rows that lie side by side in memory, of known largest numbers."""
    g, r = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    k = tl.program_id(1).to(tl.int64) * BK + tl.arange(0, BK)
    inside = (r < rows)[:, None] & (k < K)[None, :]
    place = g * batch_stride + r[:, None] * row_stride + k[None, :] * stride
    x = tl.load(X + place, mask=inside, other=0.0)
    row = g * rows + r
    up, near, rest = grid(tl.load(TOP + row, mask=r < rows, other=0), bits)
    store_digits(D, plane, row[:, None] * padded + k[None, :], nearest(x * up[:, None]),
                 (r < rows)[:, None] & (k < padded)[None, :])
    tl.store(NEAR + row, near, mask=r < rows)
    tl.store(REST + row, rest, mask=r < rows)


def ceil_div(a, b):
    return -(-a // b)  # Triton's own take ten times as long, and there are hundreds in a step


def power_of_two_from(n):
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def padded(k):
    return ceil_div(k, 64) * 64


def to_digits(x, bits):
    """x[G, R, K] of any strides, on a grid for each row → (digits int8[3, G, R, K padded with zeros
    to a multiple of 64], near float64[G, R], rest[G, R]), as of grids.grid."""
    groups, rows, k = x.shape
    if x.stride(2) != 1 and not (k > 1 and x.stride(1) == 1):
        x = x.contiguous()
    length = padded(k)
    digits = torch.empty(3, groups, rows, length, dtype=torch.int8, device=x.device)
    near, rest = torch.empty(2, groups, rows, dtype=torch.float64, device=x.device)
    plane = groups * rows * length
    contiguous = x.stride(2) == 1 or k == 1
    if contiguous or rows * k <= SMALL:
        bk = min(1024 if contiguous else 64, power_of_two_from(length))
        br = min(2048 // bk, power_of_two_from(rows))
        row_digits_kernel[ceil_div(rows, br), groups](
            x, digits, near, rest, rows, k, length, *x.stride(), plane, bits, br, bk, **OPTIONS)
        return digits, near, rest
    top = tops(x)
    column_digits_kernel[ceil_div(rows, 64), ceil_div(length, 64), groups](
        x, top, digits, near, rest, rows, k, length, *x.stride(), plane, bits, 64, 64, **OPTIONS)
    return digits, near, rest


def tops(x):
    """bits_of the largest number of each row of x[G, R, K]: int64[G, R]."""
    groups, rows, k = x.shape
    across = x.stride(2) != 1  # rows lie side by side
    br, bk = (64, 64) if across else (1, 4096)
    per_program = max(bk, power_of_two_from(ceil_div(k, 64)))
    top = torch.zeros(groups, rows, dtype=torch.int64, device=x.device)
    tops_kernel[ceil_div(rows, br), ceil_div(k, per_program), groups](
        x, top, rows, k, *x.stride(), per_program, br, bk, **OPTIONS)
    return top


@triton.jit(do_not_specialize=["length", "frames", "width", "step", "hop", "padding",
                               "batch_stride",
                               "channel_stride", "bits"])
def window_digits_kernel(X, D, NEAR, REST, channels, length, frames, width, pitch, step, hop,
                         padding, batch_stride, channel_stride, stride, plane, bits,
                         BF: tl.constexpr, BC: tl.constexpr):
    """The digits[frames, pitch] of what a block of a convolution's frames sees, on one grid. Number
    i of row f is channel i % channels of the input's frame f · step + i // channels."""
    block, group, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    X += clip * batch_stride + group.to(tl.int64) * channels * channel_stride
    row = (clip * tl.num_programs(1) + group) * tl.num_programs(0) + block
    first, f, i = block * hop - padding, tl.arange(0, BF)[:, None], tl.arange(0, BC)[None, :]
    top = tl.zeros((BF, BC), tl.int64)
    for start in range(0, frames, BF):
        for left in range(0, width, BC):
            t = first + (start + f) * step + (left + i) // channels
            seen = (t >= 0) & (t < length) & (start + f < frames) & (left + i < width)
            place = t.to(tl.int64) * stride + (left + i) % channels * channel_stride
            top = tl.maximum(top, bits_of(tl.load(X + place, mask=seen, other=0.0)))
    up, near, rest = grid(tl.max(tl.max(top, 1), 0), bits)
    for start in range(0, frames, BF):
        for left in range(0, pitch, BC):
            t = first + (start + f) * step + (left + i) // channels
            seen = (t >= 0) & (t < length) & (start + f < frames) & (left + i < width)
            place = t.to(tl.int64) * stride + (left + i) % channels * channel_stride
            x = tl.load(X + place, mask=seen, other=0.0)
            place = (row * frames + start + f) * pitch + left + i
            store_digits(D, plane, place, nearest(x * up),
                         (start + f < frames) & (left + i < pitch))
    tl.store(NEAR + row, near)
    tl.store(REST + row, rest)


# ---------------------------------------------------------------------------------------- products


@triton.jit(do_not_specialize=["M", "N", "blocks", "b_groups", "splits"],
            do_not_specialize_on_alignment=["row_stride", "column_stride"])
def product_kernel(A, NEAR_A, REST_A, B, NEAR_B, REST_B, BIAS, OUT, M, N, K, a_plane, b_plane,
                   blocks, block_stride, frame_stride, b_groups, chunk, splits, row_stride,
                   column_stride, FRAMES: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """OUT[G, M, N] = A · Bᵀ of digits, B[3, b_groups, N, K]. Row m of A begins at block_stride · (m
    // FRAMES) + frame_stride · (m % FRAMES): so the windows of a convolution, whose FRAMES share a
    grid, are rows that overlap. WHOLE: scaled, biased; else the sums over a `chunk` of K each."""
    # programs that follow each other share rows of A, the larger operand
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    g, split, k = tl.program_id(2) // splits, tl.program_id(2) % splits, tl.arange(0, BK)
    row, column, first = tl.minimum(m, M - 1), tl.minimum(n, N - 1), split * chunk
    a_row = g.to(tl.int64) * blocks + row // FRAMES
    b_row = (g % b_groups).to(tl.int64) * N + column
    A += (a_row * block_stride + (row % FRAMES) * frame_stride)[:, None] + (first + k)[None, :]
    B += (b_row * K)[None, :] + (first + k)[:, None]
    c0 = tl.zeros((BM, BN), tl.int32)
    c1, c2, c3, c4 = c0, c0, c0, c0
    for _ in range(first, tl.minimum(first + chunk, K), BK):
        c0, c1, c2, c3, c4 = nine(
            tl.load(A), tl.load(A + a_plane), tl.load(A + 2 * a_plane), tl.load(B),
            tl.load(B + b_plane), tl.load(B + 2 * b_plane), c0, c1, c2, c3, c4)
        A += BK
        B += BK
    y = joined_long(c0, c1, c2, c3, c4) * tl.load(NEAR_A + a_row)[:, None]
    y *= tl.load(NEAR_B + b_row)[None, :]
    if WHOLE:
        y = y * tl.load(REST_A + a_row)[:, None] * tl.load(REST_B + b_row)[None, :] + 0.0
    if BIASED:
        y += tl.load(BIAS + b_row)[None, :]
    OUT += tl.program_id(2).to(tl.int64) * M * N
    place = m[:, None].to(tl.int64) * row_stride + n[None, :].to(tl.int64) * column_stride
    tl.store(OUT + place, y, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M", "N", "bits"])
def small_product_kernel(A, B, BIAS, OUT, M, N, K, row_a, stride_a, stride_b, column_b, bits,
                         BIASED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                         BK: tl.constexpr):
    """OUT[M, N] = A · B (+ BIAS[N]) of float64 operands of any strides. Goes over K twice: for the
    largest number of each row and column, then for the digits and their products."""
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    in_rows, in_columns, k = (m < M)[:, None], (n < N)[None, :], tl.arange(0, BK).to(tl.int64)
    A += m[:, None].to(tl.int64) * row_a
    B += n[None, :].to(tl.int64) * column_b
    top_a, top_b = tl.zeros((BM, BK), tl.int64), tl.zeros((BK, BN), tl.int64)
    for start in range(0, K, BK):
        inside = start + k < K
        a = tl.load(A + (start + k)[None, :] * stride_a, mask=in_rows & inside[None, :], other=0.0)
        b = tl.load(B + (start + k)[:, None] * stride_b, mask=in_columns & inside[:, None],
                    other=0.0)
        top_a, top_b = tl.maximum(top_a, bits_of(a)), tl.maximum(top_b, bits_of(b))
    up_a, near_a, rest_a = grid(tl.max(top_a, 1), bits)
    up_b, near_b, rest_b = grid(tl.max(top_b, 0), bits)
    c0 = tl.zeros((BM, BN), tl.int32)
    c1, c2, c3, c4 = c0, c0, c0, c0
    for start in tl.range(0, K, BK, num_stages=1):
        inside = start + k < K
        a = tl.load(A + (start + k)[None, :] * stride_a, mask=in_rows & inside[None, :], other=0.0)
        b = tl.load(B + (start + k)[:, None] * stride_b, mask=in_columns & inside[:, None],
                    other=0.0)
        a0, a1, a2 = three_digits(nearest(a * up_a[:, None]).to(tl.int32))
        b0, b1, b2 = three_digits(nearest(b * up_b[None, :]).to(tl.int32))
        c0, c1, c2, c3, c4 = nine(a0, a1, a2, b0, b1, b2, c0, c1, c2, c3, c4)
    y = joined_long(c0, c1, c2, c3, c4) * near_a[:, None]
    y *= near_b[None, :]
    y = y * rest_a[:, None] * rest_b[None, :] + 0.0
    if BIASED:
        y += tl.load(BIAS + n, mask=n < N, other=0.0)[None, :]
    tl.store(OUT + m[:, None].to(tl.int64) * N + n[None, :], y, mask=in_rows & in_columns)


def small_product(a, b, bits, bias):
    """product() of matrices, in one launch."""
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty(m, n)
    small_product_kernel[ceil_div(n, 32), ceil_div(m, 32)](
        a, b, out if bias is None else bias, out, m, n, k, *a.stride(), *b.stride(), bits,
        bias is not None, 32, 32, 64, **OPTIONS)
    return out


BLOCK = 64  # rows, columns and digits along K that a program takes at a time: fast on all of sizes


def multiply(a, b, bias, out, splits, m, n, row, strides):
    """Launch a product of digits: out[G · splits, …] of m rows, n columns and `strides`. row: what
    the kernel is to know of the rows of a, (blocks, block_stride, frame_stride, FRAMES)."""
    (a, near_a, rest_a), (b, near_b, rest_b), whole = a, b, splits == 1
    _, b_groups, _, k = b.shape
    programs = ceil_div(n, BLOCK), ceil_div(m, BLOCK), len(out)
    product_kernel[programs](
        a, near_a, rest_a, b, near_b, rest_b, near_b if bias is None else bias, out, m, n, k,
        a.stride(0), b.stride(0), *row[:3], b_groups, padded(ceil_div(k, splits)), splits,
        *strides, row[3], whole and bias is not None, whole, BLOCK, BLOCK, BLOCK, **OPTIONS)
    return out


def multiply_by_library(a, b, bias, out, frames):
    """The same by torch._int_mm, where Triton has no int8 products: a[3, G, rows, K], out[G, m, n]
    of any strides, in which `frames` rows share a grid."""
    (a, near_a, rest_a), (b, near_b, rest_b), (groups, m, n) = a, b, out.shape
    # it takes more than 16 rows, and columns in eights
    a, b = F.pad(a, (0, 0, 0, max(0, 17 - a.shape[2]))), F.pad(b, (0, 0, 0, -n % 8))
    for g in range(groups):
        total, right = 0, g % b.shape[1]
        for start in range(0, b.shape[3], LONGEST):
            left_digits, right_digits = (digits[:, place, :, start:start + LONGEST]
                                         for digits, place in ((a, g), (b, right)))
            part = 0
            for weight in range(4, -1, -1):
                part = (part << 8) + sum(
                    torch._int_mm(left_digits[i], right_digits[weight - i].mT)
                    for i in range(3) if 0 <= weight - i < 3).to(torch.int64)
            total = total + part
        y = total[:m, :n].to(torch.float64)
        for rows, columns in ((near_a, near_b), (rest_a, rest_b)):
            rows = rows.view(groups, -1)[g].repeat_interleave(frames)[:m, None]
            y.mul_(rows).mul_(columns.view(-1, n)[right])
        y.add_(0.0)
        out[g] = y if bias is None else y.add_(bias.view(-1, n)[right])


_parameters, _last = {}, {}  # digits, by what was rounded


def kept(x, bits, dim, make):
    """make(), the digits of an operand along `dim`; what was made for a parameter that does not
    train, or for the last other operand, if its memory lives and nothing was written there since.
    (torch does not count what is written through .data: nothing may be, in frozen parameters.)"""
    parameter = x if x._base is None else x._base
    lasting = isinstance(parameter, torch.nn.Parameter)
    if x.is_inference() or lasting and parameter.requires_grad:
        return make()
    kept, storage = _parameters if lasting else _last, x.untyped_storage()
    what = storage._cdata, x.storage_offset(), x.shape, x.stride(), bits, dim
    alive, version, digits = kept.get(what, (None, None, None))
    if alive is None or alive.expired() or version != x._version:
        for each in [each for each, (alive, *_) in kept.items() if alive.expired() or not lasting]:
            del kept[each]
        digits = make()
        kept[what] = StorageWeakRef(storage), x._version, digits
    return digits


def product(a, b, bits, bias=None):
    """a[…, M, K] @ b[…, K, N] + bias[N], as products.product and then an addition."""
    lead, (m, k), n = a.shape[:-2], a.shape[-2:], b.shape[-1]
    bias = bias if bias is None else bias.contiguous()
    int8 = has_int8_products(a.device)
    if not lead and int8 and max(m, n) * k <= SMALL and k <= LONGEST:
        return small_product(a, b, bits, bias)
    b = kept(b, bits, -2, lambda: to_digits(b.mT.view(-1, n, k), bits))
    a = kept(a, bits, -1, lambda: to_digits(a.view(-1, m, k), bits))
    _, groups, _, length = a[0].shape
    programs = groups * ceil_div(m, BLOCK) * ceil_div(n, BLOCK)
    splits = max(1, ceil_div(length, LONGEST), min(256 // programs, length // 2048))
    if not int8:
        out = a[1].new_empty(groups, m, n)
        multiply_by_library(a, b, bias, out, 1)
        return out.view(*lead, m, n)
    out = a[1].new_empty(groups * splits, m, n)
    multiply(a, b, bias, out, splits, m, n, (m, length, 0, 1), (n, 1))
    if splits > 1:  # of integers on one grid: in any order
        out = out.view(groups, splits, m, n).sum(1)
        out = out.mul_(a[2][..., None]).mul_(b[2][:, None]).add_(0.0)
        out = out if bias is None else out.add_(bias)
    return out.view(*lead, m, n)


def convolution(x, w, bias, bits, stride, padding, frames, groups, block):
    """products.convolution of x[B, C, L] without dilation, with windows of at most LONGEST."""
    (outputs, channels, kernel), blocks = w.shape, ceil_div(frames, block)
    weights, near_w, rest_w = kept(w, bits, -1, lambda: to_digits(
        w.transpose(1, 2).reshape(1, outputs, -1), bits))
    rows, step, width, pitch = (block - 1) * stride + kernel, 1, channels, channels
    row_stride = stride * channels  # windows overlap in memory
    library = not has_int8_products(x.device)
    if row_stride % 16 or library:  # slow to read, or not at all: each in a row of its own
        rows, step, width = block, stride, kernel * channels
        pitch = row_stride = weights.shape[-1]
    plane = ceil_div(len(x) * groups * blocks * rows * pitch, 16) * 16
    # and room for what the last windows read past their end, which is multiplied by zeros
    digits = torch.empty(3 * plane + BLOCK, dtype=torch.int8, device=x.device)
    near, rest = x.new_empty(2, len(x) * groups * blocks)
    bc = min(64, power_of_two_from(pitch))
    bf = min(4096 // bc, power_of_two_from(rows))
    window_digits_kernel[blocks, groups, len(x)](
        x, digits, near, rest, channels, x.shape[2], rows, width, pitch, step, block * stride,
        padding, *x.stride(), plane, bits, bf, bc, **OPTIONS)
    out = x.new_empty(len(x) * groups, outputs // groups, frames)
    weights = weights.view(3, groups, outputs // groups, -1), near_w, rest_w
    bias = bias if bias is None else bias.contiguous()
    if library:
        shape = 3, len(out), blocks * block, pitch
        digits = digits.as_strided(shape, (plane, blocks * block * pitch, pitch, 1)), near, rest
        multiply_by_library(digits, weights, bias, out.mT, block)
    else:
        multiply((digits.as_strided((3, plane), (plane, 1)), near, rest), weights, bias, out, 1,
                 frames, outputs // groups, (blocks, rows * pitch, row_stride, block), (1, frames))
    return out.view(len(x), outputs, frames)


# --------------------------------------------------------------------------- GELU, norms and sums


@triton.jit
def near_normal(x):
    """functions.near_normal: the nearest x of the table, how far x is from it, and its place."""
    near = tl.minimum(tl.maximum(x, -8.5), 8.5)
    steps = nearest(near * 256.0)
    centre = steps * 0.00390625
    return centre, near - centre, tl.minimum(tl.maximum(steps.to(tl.int32) + 2176, 0), 4352)


@triton.jit
def gelu_kernel(X, Y, count, NORMAL, DENSITY, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < count, other=0.0)
    centre, r, place = near_normal(x)
    s = (1.0 - centre * 0.5 * r) * r
    y = (s * tl.load(DENSITY + place) + tl.load(NORMAL + place)) * x
    tl.store(Y + i, y, mask=i < count)


@triton.jit
def gelu_backward_kernel(DY, X, DX, count, NORMAL, DENSITY, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < count, other=0.0)
    centre, r, place = near_normal(x)
    s = (1.0 - centre * 0.5 * r) * r
    t = ((centre * centre - 1.0) * 0.5 * r - centre) * r + 1.0
    slope = (t * x + s) * tl.load(DENSITY + place) + tl.load(NORMAL + place)
    tl.store(DX + i, slope * tl.load(DY + i, mask=i < count, other=0.0), mask=i < count)


def gelu(x, normal, density):
    x = x.contiguous()
    y, count = torch.empty_like(x), x.numel()
    gelu_kernel[(ceil_div(count, 1024),)](x, y, count, normal, density, 1024, **OPTIONS)
    return y


def gelu_backward(dy, x, normal, density):
    dy, x = dy.contiguous(), x.contiguous()
    dx, count = torch.empty_like(x), x.numel()
    gelu_backward_kernel[(ceil_div(count, 1024),)](dy, x, dx, count, normal, density, 1024,
                                                   **OPTIONS)
    return dx


@triton.jit
def steps_of(x, up, inside):
    """The integers that sums add up."""
    return tl.where(inside, nearest(x * up).to(tl.int64), 0)


@triton.jit
def sum_of(steps, near, rest):
    return steps.to(tl.float64) * near * rest + 0.0


@triton.jit(do_not_specialize=["groups", "per_group", "bits"])
def norm_kernel(X, W, B, Y, MEAN, RECIPROCAL, N, groups, per_group, length, EPS: tl.constexpr,
                bits, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
                BLOCK: tl.constexpr):
    """norms.norm_forward of a row: once over it for its largest number, for the mean, for that of
    squares and for the result. The largest square is that of the number farthest from the mean."""
    r, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    X += r * N
    count = N.to(tl.float64)
    top, low = tl.zeros((BLOCK,), tl.int64), tl.full((BLOCK,), float("inf"), tl.float64)
    high = -low
    for start in range(0, N, BLOCK):
        inside = start + k < N
        x = tl.load(X + start + k, mask=inside, other=0.0)
        top = tl.maximum(top, bits_of(x))
        low, high = tl.where(inside & (x < low), x, low), tl.where(inside & (x > high), x, high)
    up, near, rest = grid(tl.max(top, 0), bits)
    sums = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, N, BLOCK):
        inside = start + k < N
        sums += steps_of(tl.load(X + start + k, mask=inside, other=0.0), up, inside)
    mean = sum_of(tl.sum(sums, 0), near, rest) * (1.0 / count)
    far = tl.maximum(bits_of(tl.max(high, 0) - mean), bits_of(tl.min(low, 0) - mean))
    far = far.to(tl.float64, bitcast=True)
    up, near, rest = grid(bits_of(far * far), bits)
    sums = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, N, BLOCK):
        inside = start + k < N
        d = tl.load(X + start + k, mask=inside, other=0.0) - mean
        sums += steps_of(d * d, up, inside)
    variance = sum_of(tl.sum(sums, 0), near, rest) * (1.0 / count)
    reciprocal = 1.0 / tl.sqrt(variance + EPS)
    for start in range(0, N, BLOCK):
        inside = start + k < N
        y = (tl.load(X + start + k, mask=inside, other=0.0) - mean) * reciprocal
        place = (r % groups) * per_group + (start + k) // length
        if WEIGHTED:
            y *= tl.load(W + place, mask=inside, other=0.0)
        if BIASED:
            y += tl.load(B + place, mask=inside, other=0.0)
        tl.store(Y + r * N + start + k, y, mask=inside)
    tl.store(MEAN + r, mean)
    tl.store(RECIPROCAL + r, reciprocal)


def norm(x, w, b, eps, bits, groups=1, per_group=1, length=1):
    """x[rows, N], normed row by row; then times w and plus b[groups · per_group], of which a row
    has `per_group`, each for `length` numbers. Returns it, the means and 1 / sqrt()."""
    x, (rows, n) = x.contiguous(), x.shape
    y, (mean, reciprocal) = torch.empty_like(x), x.new_empty(2, rows, 1)
    block = min(8192, power_of_two_from(n))
    norm_kernel[(rows,)](
        x, x if w is None else w, x if b is None else b, y, mean, reciprocal, n, groups, per_group,
        length, eps, bits, w is not None, b is not None, block,
        num_warps=16 if block == 8192 else 4, **OPTIONS)
    return y, mean, reciprocal


@triton.jit(do_not_specialize=["bits"])
def norm_backward_kernel(DY, X, W, MEAN, RECIPROCAL, DX, TERMS, N, bits, WEIGHTED: tl.constexpr,
                         BLOCK: tl.constexpr):
    """norms.layer_norm_backward's dx of a row, and the terms of which dw is the sum."""
    r, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = k < N
    dy = tl.load(DY + r * N + k, mask=inside, other=0.0)
    g = dy
    if WEIGHTED:
        g = dy * tl.load(W + k, mask=inside, other=0.0)
    reciprocal, count = tl.load(RECIPROCAL + r), N.to(tl.float64)
    h = (tl.load(X + r * N + k, mask=inside, other=0.0) - tl.load(MEAN + r)) * reciprocal
    h = tl.where(inside, h, 0.0)
    tl.store(TERMS + r * N + k, dy * h, mask=inside)
    up, near, rest = grid(tl.max(bits_of(g), 0), bits)
    mean_g = sum_of(tl.sum(steps_of(g, up, inside), 0), near, rest) * (1.0 / count)
    gh = g * h
    up, near, rest = grid(tl.max(bits_of(gh), 0), bits)
    mean_gh = sum_of(tl.sum(steps_of(gh, up, inside), 0), near, rest) * (1.0 / count)
    dx = ((g - mean_g) - h * mean_gh) * reciprocal
    tl.store(DX + r * N + k, dx, mask=inside)


def norm_backward(dy, x, w, mean, reciprocal, n, bits):
    """(dx, terms of dw) of a layer norm over the last n numbers of x, at most 8192."""
    dx, terms = torch.empty_like(x), torch.empty_like(x)
    norm_backward_kernel[(x.numel() // n,)](
        dy, x, x if w is None else w, mean, reciprocal, dx, terms, n, bits, w is not None,
        power_of_two_from(n), **OPTIONS)
    return dx, terms


@triton.jit(do_not_specialize=["K", "bits"])
def vector_norm_kernel(X, OUT, K, row_stride, stride, bits, BLOCK: tl.constexpr):
    """sums.norm of a row: over it for its largest number, then for the sum of squares, on grids."""
    r, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK).to(tl.int64)
    X += r * row_stride
    top = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, K, BLOCK):
        x = tl.load(X + (start + k) * stride, mask=start + k < K, other=0.0)
        top = tl.maximum(top, bits_of(x))
    top = tl.max(top, 0)
    up, near, rest = grid(top, 10)
    largest = top.to(tl.float64, bitcast=True) * up
    up_squares, near_squares, rest_squares = grid(bits_of(largest * largest), bits)
    sums = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, K, BLOCK):
        inside = start + k < K
        x = tl.load(X + (start + k) * stride, mask=inside, other=0.0) * up
        sums += steps_of(x * x, up_squares, inside)
    y = tl.sqrt(sum_of(tl.sum(sums, 0), near_squares, rest_squares))
    tl.store(OUT + r, y * near * rest)


def vector_norm(x, bits):
    """The norm of each row of x[R, K], of any strides."""
    out, block = x.new_empty(len(x)), min(8192, power_of_two_from(x.shape[1]))
    vector_norm_kernel[(len(x),)](x, out, x.shape[1], *x.stride(), bits, block,
                                  num_warps=16 if block == 8192 else 4, **OPTIONS)
    return out


@triton.jit(do_not_specialize=["K", "bits"])
def sum_kernel(X, TOP, SUM, OUT, rows, K, row_stride, stride, per_program, bits,
               WHOLE: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """WHOLE: OUT[row], the sum of a row. Else what a program's part adds to SUM[row], integers."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    k = tl.program_id(1).to(tl.int64) * per_program + tl.arange(0, BK)
    X += r[:, None] * row_stride
    if WHOLE:
        tops = tl.zeros((BR, BK), tl.int64)
        for start in range(0, per_program, BK):
            inside = (r < rows)[:, None] & (start + k < K)[None, :]
            x = tl.load(X + (start + k)[None, :] * stride, mask=inside, other=0.0)
            tops = tl.maximum(tops, bits_of(x))
        top = tl.max(tops, 1)
    else:
        top = tl.load(TOP + r, mask=r < rows, other=0)
    up, near, rest = grid(top, bits)
    sums = tl.zeros((BR, BK), tl.int64)
    for start in range(0, per_program, BK):
        inside = (r < rows)[:, None] & (start + k < K)[None, :]
        x = tl.load(X + (start + k)[None, :] * stride, mask=inside, other=0.0)
        sums += steps_of(x, up[:, None], inside)
    if WHOLE:
        tl.store(OUT + r, sum_of(tl.sum(sums, 1), near, rest), mask=r < rows)
    else:
        tl.atomic_add(SUM + r, tl.sum(sums, 1), mask=r < rows)


def total(x, bits):
    """The sum of each row of x[R, K], of any strides."""
    (rows, k), out = x.shape, x.new_empty(len(x))
    br, bk = (64, 64) if x.stride(1) != 1 and x.stride(0) == 1 else (
        max(1, 2048 // power_of_two_from(k)), min(2048, power_of_two_from(k)))
    br = min(br, power_of_two_from(rows))
    parts = min(ceil_div(k, 8 * bk), max(1, 512 * br // rows))
    per_program = ceil_div(k, parts * bk) * bk
    steps = top = out
    if parts > 1:
        top, steps = tops(x[None])[0], torch.zeros(rows, dtype=torch.int64, device=x.device)
    sum_kernel[ceil_div(rows, br), parts](x, top, steps, out, rows, k, *x.stride(), per_program,
                                          bits, parts == 1, br, bk, **OPTIONS)
    if parts > 1:
        _, near, rest = grids.grid(top.view(torch.float64), bits)
        out = steps.to(torch.float64).mul_(near).mul_(rest).add_(0.0)
    return out
