"""Scaled dot product attention, forward and backward, without a matrix of all scores."""

import math

import torch
from torch.utils._python_dispatch import _disable_current_modes

from exact.dropout import dropped, new_seed
from exact.functions import look_up, table
from exact.grids import bits_for, div, grid, in_slices, magnitude, scaled, to_grid
from exact.sums import total

LARGE = 1 << 18  # values of a chain at a time, as CACHED: this one has matrix products in it
aten = torch.ops.aten


def finite(x):
    """x with 0 for NaN and infinity; and for each row 0, or NaN if it had any of them."""
    return x.nan_to_num(0.0, 0.0, 0.0), (x * 0.0).sum(-1, keepdim=True).add_(0.0)


def score_factors(q, k, scale):
    """q and k as factors whose products are, exactly, minus the scores in steps of 2^-16: integers
    times a power of two for each row of q and each row of k."""
    bits = bits_for(q.shape[-1])
    (q, rest_q), (k, rest_k) = to_grid(q * scale, bits, -1), to_grid(k, bits, -1)
    return scaled(q, rest_q), scaled(k, rest_k).mul_(-65536.0)


def parts_of(length, columns, device):
    """How many heads, and which rows of them, to take at a time, so that their scores fit a cache
    or a GPU's memory."""
    values = LARGE if device.type == "cpu" else 1 << 27
    step = max(1, min(length, values // columns))
    rows = [slice(start, min(length, start + step)) for start in range(0, length, step)]
    return 1 if device.type == "cpu" else max(1, values // (length * columns)), rows


def attention_weights(q, k, mask, causal, heads, rows, top=None):
    """Integers of at most 2^20 for some heads and rows, and the rows' largest scores: `top`."""
    x = q[heads, rows] @ k[heads].mT
    if mask is not None:
        part = mask[heads, rows]
        x = x.masked_fill_(~part, math.inf) if part.dtype == torch.bool else x.sub_(part * 65536.0)
    if causal:
        columns = torch.arange(x.shape[2], device=x.device)
        own = torch.arange(rows.start, rows.stop, device=x.device)
        x.masked_fill_(columns > own[:, None], math.inf)
    if top is None:
        top = x.amin(2, keepdim=True).clamp_(max=1e300)  # a row may be masked completely
    place = x.sub_(top).clamp_(max=2.0**20 - 1).to(torch.int32)
    return look_up("attention", place), top


def drop(seed, heads, rows, length, columns, p, device):
    """bool[heads, rows, columns]: which weights dropout takes."""
    count = rows.stop - rows.start
    return torch.stack([dropped(seed, head * length + rows.start, count, columns, p, device)
                        for head in range(heads.start, heads.stop)])


def attention_forward(q, k, v, mask, causal, p, scale, seed):
    """The output[N, T, E], and each row's largest score and sum of weights, [N, T, 1]."""
    (q, bad_q), (k, bad_k) = finite(q), finite(k)
    (n, length, _), columns = q.shape, k.shape[1]
    q, k = score_factors(q, k, scale)
    v, rest_v = to_grid(v, 53 - 20 - (columns - 1).bit_length(), -2)
    out, top, sums = (q.new_empty(n, length, size) for size in (v.shape[2], 1, 1))

    heads_at_once, row_parts = parts_of(length, columns, q.device)
    table("attention", q.device)  # made once, not by each thread

    def work(heads):
        for rows in row_parts:
            weights, top[heads, rows] = attention_weights(q, k, mask, causal, heads, rows)
            torch.sum(weights, 2, keepdim=True, out=sums[heads, rows])
            if seed is not None:
                lost = drop(seed, heads, rows, length, columns, p, q.device)
                weights.masked_fill_(lost, 0.0)
            out[heads, rows] = weights @ v[heads]

    in_slices(work, n, heads_at_once, q.device)
    sums.clamp_(min=1.0)
    out = scaled(out, rest_v).div_(sums).mul_(1.0 / (1.0 - p) if p < 1 else 0.0)
    return out.add_(bad_q).add_(bad_k.sum(1, keepdim=True)), top, sums


def attention_backward(dout, q, k, v, mask, out, top, sums, causal, p, scale, seed):
    """Gradients of q, k and v. With weights W (integers), their row sums s and probabilities P = W
    / s: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)), dQ = scale · dS K, dK = scale · dSᵀ Q."""
    (q, bad_q), (k, bad_k) = finite(q), finite(k)
    (n, length, _), columns, device = q.shape, k.shape[1], q.device
    inner = div(total(dout * out, [2], True), sums)
    dout = div(dout, sums)
    dout = dout * (1.0 / (1.0 - p)) if 0 < p < 1 else dout
    minus_q, minus_k = score_factors(q, k, scale)
    bits = bits_for(v.shape[2])
    (g, rest_g), (vt, rest_v) = to_grid(dout, bits, -1), to_grid(v, bits, -1)
    columns_g, rest_dv = to_grid(dout, 53 - 20 - (length - 1).bit_length(), -2)
    bits = bits_for(max(length, columns))
    (q_, rest_q), (k_, rest_k) = to_grid(q * scale, bits, -2), to_grid(k, bits, -2)
    dq, dk, dv = torch.zeros_like(q_), torch.zeros_like(k_), torch.zeros_like(vt)
    heads_at_once, row_parts = parts_of(length, columns, device)
    table("attention", device)

    def work(heads):
        ds = q_.new_empty(heads.stop - heads.start, length, columns)
        largest = []
        for rows in row_parts:
            weights, _ = attention_weights(minus_q, minus_k, mask, causal, heads, rows,
                                           top[heads, rows])
            d = scaled(g[heads, rows] @ vt[heads].mT, rest_g[heads, rows], rest_v[heads].mT)
            d = torch.sub(d, inner[heads, rows], out=d) if seed is None else d
            if seed is None:
                dv[heads] += weights.mT @ columns_g[heads, rows]
            else:
                lost = drop(seed, heads, rows, length, columns, p, device)
                d.masked_fill_(lost, 0.0).sub_(inner[heads, rows])
                dv[heads] += weights.masked_fill(lost, 0.0).mT @ columns_g[heads, rows]
            torch.mul(d, weights, out=ds[:, rows])
            largest.append(magnitude(ds[:, rows], (1, 2)))
        up, down, rest = grid(torch.cat(largest, 1).amax(1, keepdim=True), bits)
        for rows in row_parts:
            part = ds[:, rows].mul_(up).round_()
            dq[heads, rows] = part @ k_[heads]
            dk[heads] += part.mT @ q_[heads, rows]
        for d, rest_factor in ((dq, rest_k), (dk, rest_q)):
            scaled(d[heads].mul_(down), rest, rest_factor[heads])

    in_slices(work, n, heads_at_once, device)
    bad = bad_q.sum(1, keepdim=True) + bad_k.sum(1, keepdim=True)
    return dq.mul_(scale).add_(bad), dk.add_(bad), scaled(dv, rest_dv).add_(bad)


class Attention(torch.autograd.Function):
    """softmax(scale · q kᵀ + mask) v for q[N, T, D], k[N, S, D], v[N, S, E]: N heads, each on its
    own grids. No T × S matrix is kept but for a mask: the backward pass computes the weights again,
    part by part.

    A score is an integer times a power of two of its row and column. Its distance from the row's
    largest, in steps of 2^-16, is a place in a table of e^-x, in integers of 20 bits. So the
    weights, their sums and their products with v are exact, and what is divided by the sums is the
    output."""

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
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    q, k, v = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:])
               for t in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*lead, q.shape[1], k.shape[1])
        attn_mask = attn_mask.reshape(-1, q.shape[1], k.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = Attention.apply(q, k, v, attn_mask, is_causal, dropout_p, scale)
    return out.view(*lead, q.shape[1], v.shape[2])
