"""Scaled dot product attention, forward and backward, without a matrix of all scores.

Per head, with whole numbers in capitals, each times a unit, a power of two (`integers`):

  scores     Q[i] · K[j], log2(e) in the unit of Q; x is how far they are below row i's largest,
             in steps of 2^-18
  weights    W = 2^-x in integers of 20 bits, the product of two small tables (`exponentials`)
  output     rows of W' V / sums of W, where W' is W without what dropout takes
  gradients  G = dout / sums; N = W ∘ (G Vᵀ - inner), rounded to 23 bits on a unit for each row;
             dV = W'ᵀ G, dQ = N K, dK = Nᵀ Q with the units of N's rows multiplied into Q

Every sum is one of integers below 2^53: float64 holds it exactly, in whatever order it is taken.
"""

import functools
import importlib
import math

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from exact.dropout import dropped, new_seed
from exact.gpu import has_int8_products, kernels
from exact.grids import bits_for, div, grid, in_slices, magnitude, reciprocal, sqrt
from exact.sums import sum_bits

STEPS = 2.0**18  # of 2^-x, from x to x + 1; it ends at 22
LOG2_E = 1.4426950408889634
SMALLEST, LARGEST = 2.0**-400, 2.0**400  # units of operands: below counts as 0, beyond as NaN
LARGE = 1 << 18  # values of a chain at a time, as CACHED: this one has matrix products in it
aten = torch.ops.aten


def column_bits(bits, count):
    """Bits of columns of `count` numbers, to be multiplied with integers of `bits` bits."""
    return min(23, 53 - bits - (count - 1).bit_length())


@functools.cache
def exponentials(device):
    """Two tables float64[2816] and [2048] whose product, rounded, is 2^-x in integers of 20 bits,
    where x is 2048·i + j steps of 2^-18: 2^(-i/128) · 2^20 and 2^(-j/2^18), in integers of 26 bits
    times a power of two, so that the product is exact. The second are odd, so that no product lies
    halfway between two integers, where roundings differ.

    They are polynomials in integer arithmetic, which exact/attention_kernels.py evaluates instead
    of looking them up. The first's coefficients, times 2^29, are fitted to 2^-2u for 128 places u
    below 1/2 (largest relative error 2^-22); the second is 1 - aj + a²j²/2 with a = ln(2)/2^18."""
    u, j, p = torch.arange(128) << 24, torch.arange(2048), 0
    for coefficient in (16457946, 79363323, 237625254, 515804055, 744258478, 1 << 29):
        p = coefficient - (p * u >> 32)
    high = p >> torch.arange(3, 25)[:, None]
    low = ((1 << 26) - ((j * (726817 - ((j * 123) >> 7))) >> 12)) | 1
    with torch.inference_mode(False):
        return tuple((table.flatten().double() * unit).to(device)
                     for table, unit in ((high, 2.0**-6), (low, 2.0**-26)))


def integers(x, bits, dim):
    """x[N, M, K] as integers of at most 2^bits, and their unit: a power of two for each slice along
    dim, which stays with length 1. Where a slice has NaN or infinity its unit is NaN."""
    up, near, rest = grid(magnitude(x, dim), bits)
    x, unit = x.mul(up).round_(), near.mul_(rest)
    if x.device.type != "cpu" or not unit.isfinite().all():  # on a GPU asking costs more
        x.nan_to_num_(0.0)
    return x, unit


def in_range(unit):
    """Units of which a product of two is exact: 0 for smaller ones, and for larger ones and NaN.
    And 0, or NaN for those."""
    fits = unit < LARGEST
    return (torch.where(fits & (unit > SMALLEST), unit, 0.0),
            torch.where(fits, 0.0, math.nan))


def score_factors(q, k, scale):
    """q and k as factors whose products are, exactly, minus the scores in steps of 2^-18; and for
    each row of q 0, or NaN where it or any of k is not finite."""
    (q, unit_q), (k, unit_k) = (integers(x, bits_for(q.shape[-1]), -1)
                                for x in (q * (scale * LOG2_E), k))
    (unit_q, bad_q), (unit_k, bad_k) = in_range(unit_q), in_range(unit_k)
    return q.mul_(unit_q * -STEPS), k.mul_(unit_k), bad_q + bad_k.sum(1, keepdim=True)


def parts_of(length, columns, device):
    """How many heads, and which rows of them, to take at a time, so that their scores fit a cache
    or a GPU's memory."""
    values = LARGE if device.type == "cpu" else 1 << 27
    step = max(1, min(length, values // columns))
    rows = [slice(start, min(length, start + step)) for start in range(0, length, step)]
    return 1 if device.type == "cpu" else max(1, values // (length * columns)), rows


def attention_weights(minus_q, k, mask, causal, rows, top=None):
    """Integers of at most 2^20 for some rows of some heads, and the rows' largest scores, as the
    factors count them: `top`."""
    x = minus_q[:, rows] @ k.mT
    if mask is not None:
        part = mask[:, rows]
        x = (x.masked_fill_(~part, math.inf) if part.dtype == torch.bool
             else x.sub_(part * (STEPS * LOG2_E)))
    if causal:
        columns = torch.arange(x.shape[2], device=x.device)
        own = torch.arange(rows.start, rows.stop, device=x.device)
        x.masked_fill_(columns > own[:, None], math.inf)
    if top is None:
        top = x.amin(2, keepdim=True).clamp_(max=1e300)  # a row may be masked completely
    high, low = exponentials(x.device)
    # half a step less: the conversion cuts off what the nearest step leaves
    place = x.sub_(top - 0.5).clamp_(max=22 * STEPS - 1).to(torch.int32).view(-1)
    factor, x = high.index_select(0, place >> 11), x.view(-1)
    torch.index_select(low, 0, place.bitwise_and_(2047), out=x)
    return x.mul_(factor).round_().view(-1, rows.stop - rows.start, k.shape[1]), top


def drop(seed, heads, rows, length, columns, p, device):
    """bool[heads, rows, columns]: which weights dropout takes."""
    count = rows.stop - rows.start
    return torch.stack([dropped(seed, head * length + rows.start, count, columns, p, device)
                        for head in range(heads.start, heads.stop)])


def kept_factor(p):
    return 1.0 / (1.0 - p) if p < 1 else 0.0


def kernels_for(q, k, v, mask, causal):
    """exact.attention_kernels, where they run and hold such an attention, else None."""
    if mask is not None or causal or not kernels(q.device) or not has_int8_products(q.device):
        return None
    module = importlib.import_module("exact.attention_kernels")
    return module if module.fit(q, k, v) else None


def forward_by_kernels(module, q, k, v, p, scale, seed):
    """attention_forward on a GPU."""
    bits, limits = bits_for(q.shape[2]), (SMALLEST, LARGEST)
    rows_q, unit_q, bad_q, _ = module.by_rows(q, bits, limits, scale * LOG2_E)
    rows_k, unit_k, bad_k, _ = module.by_rows(k, bits, limits)
    columns_v, unit_v = module.by_columns(v, column_bits(20, v.shape[1]))
    return module.forward(rows_q, unit_q * -STEPS, rows_k, unit_k, columns_v,
                          unit_v * kept_factor(p), bad_q + bad_k.sum(1, keepdim=True),
                          seed, p)


def backward_by_kernels(module, dout, q, k, v, out, top, sums, p, scale, seed):
    """attention_backward on a GPU."""
    bits, limits, size = bits_for(q.shape[2]), (SMALLEST, LARGEST), bits_for(v.shape[2])
    g, inner = inner_products(dout, out, sums, p)
    rows_q, unit_q, bad_q, _ = module.by_rows(q, bits, limits, scale * LOG2_E)
    rows_k, unit_k, bad_k, _ = module.by_rows(k, bits, limits)
    rows_g, unit_g, bad_g, squares_g = module.by_rows(g, size, limits)
    rows_v, unit_v, bad_v, squares_v = module.by_rows(v, size, limits, one_grid=True)
    bad = sum((each.sum(1) for each in (bad_q, bad_k, bad_g, inner * 0.0)), bad_v[:, 0])
    up, inner, unit = row_scales(squares_g, squares_v, unit_g, unit_v[:, :1], inner)
    factors = unit_q * -STEPS, top, up, inner

    def gradient(of, a, b, ag, bg, x, x_bits):
        columns, unit_columns = module.by_columns(x, column_bits(x_bits, x.shape[1]))
        return module.gradient(of, a, b, ag, bg, columns, unit_columns, factors, unit_k,
                               unit * scale, bad, seed, p)

    dv = gradient("v", rows_k, rows_q, rows_v, rows_g, g, 20)
    dq = gradient("q", rows_q, rows_k, rows_g, rows_v, k, 23)
    return dq, gradient("k", rows_k, rows_q, rows_v, rows_g, q * scale * unit, 23), dv


def attention_forward(q, k, v, mask, causal, p, scale, seed):
    """The output[N, T, E], and each row's largest score and sum of weights, [N, T, 1]."""
    if module := kernels_for(q, k, v, mask, causal):
        return forward_by_kernels(module, q, k, v, p, scale, seed)
    (n, length, _), columns = q.shape, k.shape[1]
    out, top, sums = (q.new_empty(n, length, size) for size in (v.shape[2], 1, 1))
    heads_at_once, row_parts = parts_of(length, columns, q.device)
    exponentials(q.device)  # made once, not by each thread

    def work(heads):
        minus_q, keys, bad = score_factors(q[heads], k[heads], scale)
        values, unit = integers(v[heads], column_bits(20, columns), -2)
        for rows in row_parts:
            weights, top[heads, rows] = attention_weights(
                minus_q, keys, None if mask is None else mask[heads], causal, rows)
            torch.sum(weights, 2, keepdim=True, out=sums[heads, rows])
            if seed is not None:
                lost = drop(seed, heads, rows, length, columns, p, q.device)
                weights.masked_fill_(lost, 0.0)
            out[heads, rows] = weights @ values
        sums[heads].clamp_(min=1.0)
        out[heads].div_(sums[heads]).mul_(unit * kept_factor(p)).add_(bad)

    in_slices(work, n, heads_at_once, q.device)
    return out, top, sums


def inner_products(dout, out, sums, p):
    """G, the gradient of the unnormalised output, and `inner`[N, T, 1], that of the sums."""
    inner, unit = integers(dout * out, sum_bits(out.shape[2]), -1)
    inner = div(inner.sum(2, keepdim=True).mul_(unit), sums)
    return div(dout, sums).mul_(kept_factor(p)), inner


def row_scales(squares_g, squares_v, unit_g, unit_v, inner):
    """For each row: `up`, a power of two, times which G Vᵀ - inner, times a weight of at most 2^20,
    has at most 23 bits; `inner` in that unit; the unit. |G Vᵀ| is at most the product of the norms,
    whose squares are given."""
    unit = unit_g * unit_v
    inner = inner.nan_to_num(0.0, 0.0, 0.0) * torch.where(unit > 0, reciprocal(unit), 0.0)
    bound = sqrt(squares_g) * sqrt(squares_v.amax(1, keepdim=True)) + inner.abs()
    up, _, _ = grid(bound.clamp_(1.0, LARGEST) * 2.0**20, 23)
    return up, inner.mul_(up), unit / up


def gradient_factors(dout, q, k, v, out, sums, p, scale):
    """What the gradients of some heads are made of: G, V and `inner`, of which N consists; the unit
    of N's rows; columns of K, Q and G, each with its unit; and for each head 0, or NaN where
    anything is not finite."""
    g, inner = inner_products(dout, out, sums, p)
    rows_g, unit_g = integers(g, bits_for(v.shape[2]), -1)
    values, unit_v = integers(v, bits_for(v.shape[2]), (-2, -1))
    (unit_g, bad_g), (unit_v, bad_v) = in_range(unit_g), in_range(unit_v)
    bad = (inner * 0.0 + bad_g).sum(1, keepdim=True) + bad_v
    squares = (x.square().sum(2, keepdim=True) for x in (rows_g, values))
    up, inner, unit = row_scales(*squares, unit_g, unit_v, inner)
    by_columns = [integers(x, column_bits(bits, x.shape[1]), -2)
                  for x, bits in ((k, 23), (q * scale * unit, 23), (g, 20))]
    return rows_g.mul_(up), values, inner, unit, by_columns, bad


def attention_backward(dout, q, k, v, mask, out, top, sums, causal, p, scale, seed):
    """Gradients of q, k and v."""
    if module := kernels_for(q, k, v, mask, causal):
        return backward_by_kernels(module, dout, q, k, v, out, top, sums, p, scale, seed)
    (n, length, _), columns, device = q.shape, k.shape[1], q.device
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    heads_at_once, row_parts = parts_of(length, columns, device)
    exponentials(device)

    def work(heads):
        minus_q, keys, bad_scores = score_factors(q[heads], k[heads], scale)
        g, values, inner, unit, by_columns, bad = gradient_factors(
            *(x[heads] for x in (dout, q, k, v, out, sums)), p, scale)
        (columns_k, unit_k), (columns_q, unit_q), (columns_g, unit_g) = by_columns
        for rows in row_parts:
            weights, _ = attention_weights(minus_q, keys, None if mask is None else mask[heads],
                                           causal, rows, top[heads, rows])
            scores = g[:, rows] @ values.mT
            lost = None
            if seed is not None:
                lost = drop(seed, heads, rows, length, columns, p, device)
                scores.masked_fill_(lost, 0.0)
            scores.sub_(inner[:, rows]).mul_(weights).round_()
            dq[heads, rows] = scores @ columns_k
            dk[heads].baddbmm_(scores.mT, columns_q[:, rows])
            weights = weights if lost is None else weights.masked_fill_(lost, 0.0)
            dv[heads].baddbmm_(weights.mT, columns_g[:, rows])
        bad = bad_scores.sum(1, keepdim=True) + bad
        dq[heads].mul_(unit_k).mul_(unit * scale).add_(bad)
        dk[heads].mul_(unit_q).add_(bad)
        dv[heads].mul_(unit_g).add_(bad)

    in_slices(work, n, heads_at_once, device)
    return dq, dk, dv


class Attention(torch.autograd.Function):
    """softmax(scale · q kᵀ + mask) v for q[N, T, D], k[N, S, D], v[N, S, E]: N heads, each on its
    own grids. No T × S matrix is kept but for a mask: the backward pass computes the weights again,
    part by part."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal, p, scale):
        ctx.settings = causal, p, scale, new_seed() if p > 0 else None
        with _disable_current_modes():
            out, top, sums = attention_forward(q, k, v, mask, *ctx.settings)
        ctx.save_for_backward(q, k, v, mask, out, top, sums)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        with _disable_current_modes():
            gradients = attention_backward(dout, *ctx.saved_tensors, *ctx.settings)
        return *gradients, None, None, None, None


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """F.scaled_dot_product_attention in exact arithmetic. A mask that trains, or holds NaN or
    +infinity, goes through torch's formula, in exact steps."""
    if attn_mask is not None and is_causal:
        raise RuntimeError("a mask is given, and is_causal asks for another: choose one")
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    other_mask = attn_mask is not None and attn_mask.is_floating_point() and (
        attn_mask.requires_grad or not bool((attn_mask < math.inf).all()))
    if query.dtype != torch.float64 or other_mask or 0 in (*query.shape, *key.shape, *value.shape):
        return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p,
                                                       is_causal, scale=scale)[0]
    # numpy's, because torch's would import torch's compiler, for seconds
    lead = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    q, k, v = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:])
               for t in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*lead, q.shape[1], k.shape[1])
        attn_mask = attn_mask.reshape(-1, q.shape[1], k.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = Attention.apply(q, k, v, attn_mask, is_causal, dropout_p, scale)
    return out.view(*lead, q.shape[1], v.shape[2])
