"""Attention, forward and backward, as single Triton kernels on int8 matrix units; and dropout.

The rules are those of attention.py, which says what the letters mean. All that is multiplied there
are integers of at most 23 bits, so three int8 digits, and a product of two such matrices is nine
products of int8 matrices (exact/kernels.py). A program holds a block of rows of one head and goes
over the columns, block by block: scores, weights, what dropout takes, and the product of the
weights, or of the scores' gradients, with columns of values. No matrix of all scores is written.

The gradients are one kernel: for those of k and v the scores are transposed, a block of keys going
over the queries.
"""

import torch
import triton
import triton.language as tl

from exact.kernels import (LONGEST, OPTIONS, bits_of, ceil_div, grid, joined_long, nine,
                           power_of_two_from, store_digits, three_digits, to_digits, tops)

ROWS, COLUMNS, WARPS = 64, 32, 4  # of a block of scores

# ------------------------------------------------------------------------------------------- parts


@triton.jit
def integer_product(a0, a1, a2, b, plane):
    """The integers of A·B as float64, of digits of A and pointers to those of B, for up to 128
    terms: pairs of accumulators fit into 32 bits."""
    zero = tl.zeros((a0.shape[0], b.shape[1]), tl.int32)
    c0, c1, c2, c3, c4 = nine(a0, a1, a2, tl.load(b), tl.load(b + plane), tl.load(b + 2 * plane),
                              zero, zero, zero, zero, zero)
    high, low = (c4 << 8) + c3, (c1 << 8) + c0
    return ((high.to(tl.int64) << 24) + (c2.to(tl.int64) << 16) + low.to(tl.int64)).to(tl.float64)


@triton.jit
def integer_of(x):
    """round(x), ties to even, as int32."""
    return (x + 6755399441055744.0).to(tl.int64, bitcast=True).to(tl.int32)


@triton.jit
def weights_of(x, top):
    """attention.exponentials of x - top, in steps of 2^-18: the weight in integers of 20 bits. top:
    half a step less, since the conversion cuts off."""
    place = tl.minimum(x - top, 5767167.0).to(tl.int32)  # the last is 0
    u, j = ((place >> 11) & 127) << 24, place & 2047
    high = 79363323 - tl.umulhi(u, tl.full(u.shape, 16457946, tl.int32))
    high = 237625254 - tl.umulhi(high, u)
    high = 515804055 - tl.umulhi(high, u)
    high = 744258478 - tl.umulhi(high, u)
    high = ((1 << 29) - tl.umulhi(high, u)) >> ((place >> 18) + 3)
    low = ((1 << 26) - ((j * (726817 - ((j * 123) >> 7))) >> 12)) | 1
    return ((high.to(tl.int64) * low + (1 << 31)) >> 32).to(tl.int32)


@triton.jit
def hash_of(x, SEED):
    """dropout.dropped's splitmix64."""
    x = x * -7046029254386353131 + SEED
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def dropped(SEED, THRESHOLD, row, keys, start, COUNT: tl.constexpr, FLIP: tl.constexpr):
    """dropout.dropped for some rows of `keys` weights: COUNT of each from `start`, four out of each
    hash. FLIP: transposed."""
    word, part = start // 4 + tl.arange(0, COUNT // 4), tl.arange(0, 4) * 16
    row = row * ((keys + 3) // 4)
    if FLIP:
        x = hash_of(row[None, :] + word[:, None], SEED)[:, None, :] >> part[None, :, None]
        lost = (x.to(tl.int16) < THRESHOLD).reshape(COUNT, row.shape[0])
    else:
        x = hash_of(row[:, None] + word[None, :], SEED)[:, :, None] >> part[None, None, :]
        lost = (x.to(tl.int16) < THRESHOLD).reshape(row.shape[0], COUNT)
    return lost


# ------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(X, TOP, DIGITS, UNIT, BAD, SQUARES, rows, FACTOR: tl.constexpr,
                SMALLEST: tl.constexpr, LARGEST: tl.constexpr, K: tl.constexpr,
                PADDED: tl.constexpr, BITS: tl.constexpr, OWN: tl.constexpr, BM: tl.constexpr):
    """Rows of FACTOR · x in integers: their digits, padded with zeros; units and NaN as of
    attention.in_range; each row's sum of squares. The grid is each row's OWN or, by TOP, its
    head's."""
    h, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * BM + tl.arange(0, BM)
    k, row = tl.arange(0, PADDED), h * rows + r
    inside = (r < rows)[:, None] & (k < K)[None, :]
    x = tl.load(X + row[:, None] * K + k[None, :], mask=inside, other=0.0) * FACTOR
    if OWN:
        top = tl.max(bits_of(x), 1)
    else:
        top = tl.load(TOP + h + 0 * row)
    up, near, rest = grid(top, BITS)
    q = integer_of(x * up[:, None])
    plane = tl.num_programs(1).to(tl.int64) * rows * PADDED
    store_digits(DIGITS, plane, row[:, None] * PADDED + k[None, :], q, (r < rows)[:, None])
    unit, q = near * rest, q.to(tl.int64)
    fits = unit < LARGEST
    tl.store(UNIT + row, tl.where(fits & (unit > SMALLEST), unit, 0.0), mask=r < rows)
    tl.store(BAD + row, tl.where(fits, 0.0, float("nan")), mask=r < rows)
    tl.store(SQUARES + row, tl.sum(q * q, 1).to(tl.float64), mask=r < rows)


@triton.jit(do_not_specialize=["SEED", "THRESHOLD", "T", "S"])
def forward_kernel(Q, UNIT_Q, K, UNIT_K, V, UNIT_V, BAD, OUT, TOP, SUMS, SEED: tl.int64,
                   THRESHOLD, T, S, padded, D: tl.constexpr, E: tl.constexpr,
                   WIDTH: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Twice over the columns: the row's largest score; then weights, their sum, and the product of
    those that dropout leaves with V, whose digits lie transposed: [3, N, E, padded]."""
    h, m = tl.program_id(1).to(tl.int64), tl.program_id(0) * BM + tl.arange(0, BM)
    heads, d, e = tl.num_programs(1).to(tl.int64), tl.arange(0, D), tl.arange(0, WIDTH)
    first, row = tl.arange(0, BN), h * T + tl.minimum(m, T - 1)
    plane_q, plane_k, plane_v = heads * T * D, heads * S * D, heads * E * padded
    q = Q + row[:, None] * D + d[None, :]
    q0, q1, q2 = tl.load(q), tl.load(q + plane_q), tl.load(q + 2 * plane_q)
    top = tl.full((BM,), -1e300, tl.float64)
    for start in range(0, S, BN):
        key = h * S + tl.minimum(start + first, S - 1)
        y = integer_product(q0, q1, q2, K + key[None, :] * D + d[:, None], plane_k)
        top = tl.maximum(top, tl.max(y * tl.load(UNIT_K + key)[None, :], 1))
    unit = tl.load(UNIT_Q + row)
    top *= unit
    tl.store(TOP + row, top, mask=m < T)
    half_less, total = top - 0.5, tl.zeros((BM,), tl.int64)
    o0 = tl.zeros((BM, WIDTH), tl.int32)
    o1, o2, o3, o4 = o0, o0, o0, o0
    v = V + (h * E + tl.minimum(e, E - 1))[None, :] * padded + first[:, None]
    for start in tl.range(0, S, BN, num_stages=1):  # pipelined, this does not compile for Hopper
        key = h * S + tl.minimum(start + first, S - 1)
        y = integer_product(q0, q1, q2, K + key[None, :] * D + d[:, None], plane_k)
        x = y * tl.load(UNIT_K + key)[None, :] * unit[:, None]
        w = weights_of(x, half_less[:, None])
        w = tl.where((start + first < S)[None, :], w, 0)
        total += tl.sum(w, 1).to(tl.int64)
        if DROP:
            w = tl.where(dropped(SEED, THRESHOLD, row, S, start, BN, False), 0, w)
        w0, w1, w2 = three_digits(w)
        o0, o1, o2, o3, o4 = nine(
            w0, w1, w2, tl.load(v + start), tl.load(v + start + plane_v),
            tl.load(v + start + 2 * plane_v), o0, o1, o2, o3, o4)
    sums = total.to(tl.float64)
    out = joined_long(o0, o1, o2, o3, o4) / sums[:, None]
    out *= tl.load(UNIT_V + h * E + e, mask=e < E, other=0.0)[None, :]
    out += tl.load(BAD + row)[:, None]
    tl.store(SUMS + row, sums, mask=m < T)
    tl.store(OUT + row[:, None] * E + e[None, :], out, mask=(m < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["SEED", "THRESHOLD", "M", "L"])
def gradient_kernel(A, B, AG, BG, C, UNIT_Q, TOP, UNIT_K, UP, INNER, UNIT_C, UNIT, BAD,
                    OUT, SEED: tl.int64, THRESHOLD, M, L, padded, D: tl.constexpr,
                    E: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, OF: tl.constexpr,
                    DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """OF "q": N K; "k": Nᵀ Q; "v": W'ᵀ G. Scores are A·B, what N takes from the output AG·BG: for q
    a block of queries goes over the keys, for k and v keys over queries. C: the digits of K, Q or G
    by columns, transposed: [3, N, SIZE, padded]."""
    FLIP: tl.constexpr = OF != "q"
    h, m = tl.program_id(1).to(tl.int64), tl.program_id(0) * BM + tl.arange(0, BM)
    heads, d, e = tl.num_programs(1).to(tl.int64), tl.arange(0, D), tl.arange(0, E)
    first, width = tl.arange(0, BN), tl.arange(0, WIDTH)
    own = h * M + tl.minimum(m, M - 1)
    a, plane = A + own[:, None] * D + d[None, :], heads * M * D
    a0, a1, a2 = tl.load(a), tl.load(a + plane), tl.load(a + 2 * plane)
    if OF != "v":
        a, plane = AG + own[:, None] * E + e[None, :], heads * M * E
        g0, g1, g2 = tl.load(a), tl.load(a + plane), tl.load(a + 2 * plane)
    o0 = tl.zeros((BM, WIDTH), tl.int32)
    o1, o2, o3, o4 = o0, o0, o0, o0
    c = C + (h * SIZE + tl.minimum(width, SIZE - 1))[None, :] * padded + first[:, None]
    plane_c = heads * SIZE * padded
    for start in tl.range(0, L, BN, num_stages=1):  # as above
        other = h * L + tl.minimum(start + first, L - 1)
        if FLIP:
            query, key = other[None, :], own[:, None]
        else:
            query, key = own[:, None], other[None, :]
        y = integer_product(a0, a1, a2, B + other[None, :] * D + d[:, None], heads * L * D)
        x = y * tl.load(UNIT_K + key) * tl.load(UNIT_Q + query)
        w = weights_of(x, tl.load(TOP + query) - 0.5)
        if DROP:
            if FLIP:
                lost = dropped(SEED, THRESHOLD, other, M, tl.program_id(0) * BM, BM, True)
            else:
                lost = dropped(SEED, THRESHOLD, own, L, start, BN, False)
        if OF == "v":
            n = tl.where(lost, 0, w) if DROP else w
        else:
            g = integer_product(g0, g1, g2, BG + other[None, :] * E + e[:, None], heads * L * E)
            g = g * tl.load(UP + query)
            g = tl.where(lost, 0.0, g) if DROP else g
            n = integer_of((g - tl.load(INNER + query)) * w.to(tl.float64))
        n0, n1, n2 = three_digits(n)
        o0, o1, o2, o3, o4 = nine(
            n0, n1, n2, tl.load(c + start), tl.load(c + start + plane_c),
            tl.load(c + start + 2 * plane_c), o0, o1, o2, o3, o4)
    out = joined_long(o0, o1, o2, o3, o4)
    out *= tl.load(UNIT_C + h * SIZE + width, mask=width < SIZE, other=0.0)[None, :]
    if OF == "q":
        out *= tl.load(UNIT + own)[:, None]
    out += tl.load(BAD + h)
    tl.store(OUT + own[:, None] * SIZE + width[None, :], out,
             mask=(m < M)[:, None] & (width < SIZE)[None, :])


@triton.jit(do_not_specialize=["SEED", "THRESHOLD", "rows", "length"])
def mask_kernel(KEPT, SEED: tl.int64, THRESHOLD, rows, length, BLOCK: tl.constexpr):
    """A mask of dropout by itself, for BLOCK hashes."""
    words = (length + 3) // 4
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part, row, column = tl.arange(0, 4), word // words, word % words * 4
    kept = (hash_of(word, SEED)[:, None] >> part[None, :] * 16).to(tl.int16) >= THRESHOLD
    column = column[:, None] + part[None, :]
    tl.store(KEPT + row[:, None] * length + column, kept.to(tl.int8),
             mask=(row < rows)[:, None] & (column < length))


# ------------------------------------------------------------------------------------------- launch


def padded_width(size):
    return max(32, power_of_two_from(size))


def fit(q, k, v):
    """Whether int32 holds all sums, and a launch all heads."""
    return (max(q.shape[2], v.shape[2]) <= 128 and max(q.shape[1], k.shape[1]) <= LONGEST
            and len(q) < 1 << 16)


def threshold(p):
    return round(p * 65536) - 32768


def kept_mask(seed, rows, length, p, device):
    """bool[rows, length]: what dropout.dropped does not take."""
    kept = torch.empty(rows, length, dtype=torch.bool, device=device)
    mask_kernel[ceil_div(rows * ceil_div(length, 4), 1024),](
        kept.view(torch.int8), seed, threshold(p), rows, length, 1024, **OPTIONS)
    return kept


def by_rows(x, bits, limits, factor=1.0, one_grid=False):
    """x[N, T, K] · factor → int8[3, N, T, K padded]; unit, NaN and sum of squares, each [N, T, 1].
    one_grid: for all rows of a head."""
    x = x.contiguous()
    top = tops(x.view(len(x), 1, -1)) if one_grid else x
    heads, rows, k = x.shape
    width = padded_width(k)
    digits = torch.empty(3, heads, rows, width, dtype=torch.int8, device=x.device)
    numbers = torch.empty(3, heads, rows, 1, dtype=torch.float64, device=x.device)
    rows_kernel[ceil_div(rows, 32), heads](
        x, top, digits, *numbers, rows, factor, *limits, k, width, bits, not one_grid, 32,
        **OPTIONS)
    return digits, *numbers


def by_columns(x, bits):
    """x[N, T, K] → int8[3, N, K, T padded], unit[N, K]."""
    digits, near, rest = to_digits(x.mT, bits)
    return digits, near.mul_(rest)


def forward(q, unit_q, k, unit_k, columns_v, unit_v, bad, seed, p):
    """The output[N, T, E], and rows' largest scores and sums of weights, [N, T, 1]."""
    (_, heads, t, d), s, (e, padded) = q.shape, k.shape[2], columns_v.shape[2:]
    out = torch.empty(heads, t, e, dtype=torch.float64, device=q.device)
    top, sums = torch.empty(2, heads, t, 1, dtype=torch.float64, device=q.device)
    forward_kernel[ceil_div(t, ROWS), heads](
        q, unit_q, k, unit_k, columns_v, unit_v, bad, out, top, sums, seed or 0,
        threshold(p), t, s, padded, d, e, padded_width(e), seed is not None, ROWS, COLUMNS,
        num_warps=WARPS, **OPTIONS)
    return out, top, sums


def gradient(of, a, b, ag, bg, columns, unit_columns, query_factors, unit_k, unit, bad, seed,
             p):
    """The gradient of q, k or v. query_factors: unit of q, largest score, up and inner."""
    unit_q, top, up, inner = query_factors
    (_, heads, m, d), length, (size, padded) = a.shape, b.shape[2], columns.shape[2:]
    out = torch.empty(heads, m, size, dtype=torch.float64, device=a.device)
    gradient_kernel[ceil_div(m, ROWS), heads](
        a, b, ag, bg, columns, unit_q, top, unit_k, up, inner, unit_columns, unit, bad, out,
        seed or 0, threshold(p), m, length, padded, d, ag.shape[3], size, padded_width(size),
        of, seed is not None, ROWS, COLUMNS, num_warps=WARPS, **OPTIONS)
    return out
