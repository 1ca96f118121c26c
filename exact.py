"""Exact arithmetic for torch: the same bits on any CPU, with any number of threads, on any GPU.

    from exact import Exact, check
    check("cuda")              # milliseconds: does this machine compute what this file relies on?
    with Exact():              # around the whole program: forward, backward and optimizer
        loss = loss_function(model(x), y)
        loss.backward()
        optimizer.step()       # SGD, Adam or AdamW, with foreach=False

Floating-point results differ between machines for two reasons, and both are removed.

1. Sums are taken in different orders. Here the terms of every sum are first rounded to integers
   times a power of two, with so few bits that no partial sum exceeds 2^53. float64 adds such
   numbers without rounding, so that no order, blocking or fused multiply-add can change the result.
2. exp, log and their like come from different libraries. Here they are tables and short polynomials
   in + - * / and square root, which IEEE 754 defines to the last bit; one operation at a time,
   since compilers may fuse two. The tables are themselves computed so.

A torch dispatch mode puts these rules in the place of torch's operations, below autograd: models,
losses and optimizers stay as they are. Rare operations, which have no rule, are taken apart as
torch's own table of decompositions says: their bits may change with torch's version, though not
with the machine; those of RULES do not. An operation with a part that has no rule raises, naming
itself.

It is for float64, and errors are those of fixed-point numbers: for a product some 2^-21 of the
largest value in its row times the largest in its column, for the features of a transformer with ten
layers 2e-6, for exp, log and tanh 2^-53 of 1 or of the result, whichever is larger. So features of
very unlike scale lose the small ones. In attention, weights below 2^-21 of a row's largest count as
0, and keys that are masked still share the values' grid. Grids belong to single rows, heads or
stretches of a clip: what is computed for an element of a batch does not depend on the others,
except for gradients of weights, which sum over them. Of several values that are written (not added)
to one place, torch says which one stays. NaN and infinity stay visible (which of a NaN's bit
patterns is not defined). Denormal numbers count as IEEE 754 says, flush-to-zero is switched off.

Every thread of Python enters an Exact of its own. Out of scope: torch.compile, random numbers drawn
on a GPU, and what Python computes itself (check() tests the powers that Adam takes).
"""

import contextlib
import functools
import hashlib
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch._decomp import decomposition_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import (
    TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack)

# float64 values that a chain of operations takes at a time, to stay in a core's cache
CACHED = 1 << 15
LARGE = 1 << 18  # the same for attention, whose chain has matrix products in it
aten, torch_attention = torch.ops.aten, F.scaled_dot_product_attention

# ------------------------------------------------------------------------------------------- slices


@functools.cache
def workers(threads, process):
    """Threads that use one CPU thread each inside torch. `process`: after a fork they are gone."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def in_slices(work, count, step, device):
    """Call work(slice) for slices of `step` rows of `count`, independent of each other. On a CPU
    threads share them out, each slice small enough for its cache; a GPU takes them one after
    another."""
    slices = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    if device.type == "cpu" and len(slices) > 1 and torch.get_num_threads() > 1:
        pool = workers(torch.get_num_threads(), os.getpid())
        list(pool.map(torch.inference_mode()(work), slices))
    else:
        for rows in slices:
            work(rows)


def rows_of(x, values=CACHED):
    """How many rows of x make a slice: `values` numbers on a CPU, a gigabyte on a GPU."""
    return max(1, (values if x.device.type == "cpu" else 1 << 27) // max(1, x[0].numel()))


def elementwise(function):
    """Compute function(x, …), whose result at a place depends on that place alone, in slices."""
    @functools.wraps(function)
    def sliced(*tensors):
        x = tensors[0]
        if x.numel() <= CACHED:
            return function(*tensors)
        out = x.new_empty(x.shape)
        flat, result = [t.contiguous().view(-1) for t in tensors], out.view(-1)
        in_slices(lambda part: result[part].copy_(function(*(t[part] for t in flat))), len(result),
                  rows_of(result), x.device)
        return out
    return sliced


# -------------------------------------------------------------------------------------------- grids


def bits_for(count):
    """Bits for each factor, such that a sum of `count` products is an integer of at most 2^53."""
    return (53 - (count - 1).bit_length()) // 2


def magnitude(x, dims):
    """The largest |x| over dims, which stay with length 1; NaN where there is a NaN."""
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))


def power_of_two(exponent):
    """2.0 ** (exponent - 1023) for int64 exponents from 1 to 2046: float64's own exponent field."""
    return (exponent << 52).view(torch.float64)


def grid(top, bits):
    """Powers of two (up, down, rest) for numbers of magnitude up to `top`: |x·up| <= 2^bits and
    up·down·rest = 1. `down` is kept within 2^±200, lest a product of two is out of range; what that
    leaves, nearly always 1, is `rest`. A `top` below 2^(bits - 1023) counts as that; NaN and
    infinity, which stay what they are on any grid, as 2^1023."""
    exponent = top.contiguous().view(torch.int64) & -(1 << 52)  # float64 without its fraction
    down = exponent.view(torch.float64).clamp_(2.0 ** (bits - 1023), 2.0**1023)
    down.mul_(2.0 ** (1 - bits))
    near = down.clamp(2.0**-200, 2.0**200)
    return torch.ones_like(down).div_(down), near, down / near


def scaled(x, *rests):
    """x, in place, times those `rests` that are not all 1 (on a GPU asking costs more than
    multiplying)."""
    for rest in rests:
        if rest.device.type != "cpu" or bool((rest != 1).any()):
            x.mul_(rest)
    return x


def to_grid(x, bits, dim):
    """x[…, M, K] rounded to integers of at most 2^bits times a power of two for each slice along
    dim, -1 or -2, times `rest`. Returns (what was rounded, rest)."""
    # a transposed matrix: the other way round in memory
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        return tuple(t.mT for t in to_grid(x.mT, bits, -3 - dim))
    shape = x.shape
    if dim == -1:
        x = x.reshape(-1, shape[-1])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    whole = dim == -2 and x.ndim == 2  # one matrix: its columns run through all slices of rows
    top = magnitude(x, -2) if whole else x.new_empty([1 if d == x.ndim + dim else n
                                                      for d, n in enumerate(x.shape)])

    def round_rows(rows):
        if not whole:
            top[rows] = magnitude(x[rows], dim)
        up, down, _ = grid(top if whole else top[rows], bits)
        torch.mul(x[rows], up, out=out[rows]).round_().mul_(down)

    in_slices(round_rows, len(x), rows_of(x), x.device)
    _, _, rest = grid(top, bits)
    return out.view(shape), rest.view((*shape[:-1], 1) if dim == -1 else top.shape)


# --------------------------------------------------------------------------------------------- sums


def listed(x, dim):
    """A `dim` argument (None or []: all) as a list of dimensions from 0."""
    dims = range(x.ndim) if dim is None or dim == [] or dim == () else dim
    return sorted(d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)) if x.ndim else []


def without(x, dims, keepdim):
    return x if keepdim else x.reshape([n for d, n in enumerate(x.shape) if d not in dims])


def sum_bits(count):
    """Bits for each term, such that a sum of `count` terms is an integer of at most 2^53."""
    return min(50, 53 - (max(count, 1) - 1).bit_length())


def total(x, dim=None, keepdim=False, dtype=None):
    """The sum over dim: of integers of 53 - log2(count) bits. Adding 0.0, here and below, makes a
    -0 a 0: the sign of a sum of -0s follows where its addition begins."""
    if dtype not in (None, torch.float64):
        raise NotImplementedError(f"exact arithmetic sums in float64, not in {dtype}")
    dims = listed(x, dim)
    count = math.prod(x.shape[d] for d in dims)
    if count == 1:
        return without(x.clone(), dims, keepdim)
    up, down, rest = grid(magnitude(x, dims), sum_bits(count))
    across, rows = 0 in dims, rows_of(x)
    shape = list(up.shape)
    shape[0] = -(-len(x) // rows) if across else shape[0]
    sums = x.new_empty(shape)

    def add_up(part):
        place = slice(part.start // rows, part.start // rows + 1) if across else part
        sums[place] = (x[part] * (up if across else up[part])).round_().sum(dims, keepdim=True)

    in_slices(add_up, len(x), rows, x.device)
    sums = sums.sum(0, keepdim=True) if across else sums
    return without(sums.mul_(down).mul_(rest).add_(0.0), dims, keepdim)


def mean(x, dim=None, keepdim=False, dtype=None):
    if not x.is_floating_point() and dtype is None:
        raise RuntimeError("the mean of integers needs a floating-point dtype")
    count = math.prod(x.shape[d] for d in listed(x, dim))
    return total(x.to(torch.float64), dim, keepdim, dtype) * (1.0 / count)


def var_mean(x, dim=None, unbiased=None, keepdim=False, *, correction=None):
    if isinstance(dim, bool):  # var_mean(x, unbiased)
        dim, unbiased = None, dim
    if unbiased is not None:
        correction = int(unbiased)
    correction = 1 if correction is None else correction
    count = math.prod(x.shape[d] for d in listed(x, dim)) - correction
    middle = mean(x, dim, True)
    squares = (x - middle) * (x - middle)
    variance = total(squares, dim, keepdim) * (1.0 / count if count > 0 else math.nan)
    return variance, without(middle, listed(x, dim), keepdim)


def norm(x, ord=2, dim=None, keepdim=False, dtype=None):
    if dtype not in (None, torch.float64):
        raise NotImplementedError(f"exact arithmetic has norms in float64, not in {dtype}")
    if ord not in (1, 2, math.inf):
        raise NotImplementedError(f"exact arithmetic has no norm of order {ord}: 1, 2 or infinity")
    dims = listed(x, dim)
    if ord == 1:
        return total(x.abs(), dims, keepdim)
    if ord == math.inf or not dims:
        return x.abs().amax(dims, keepdim)
    up, down, rest = grid(magnitude(x, dims), 10)  # squares of these do not overflow
    near = x * up
    return without(sqrt(total(near * near, dims, True)).mul_(down).mul_(rest), dims, keepdim)


def scatter_add(x, dim, index, source):
    """x plus each value of source at the place that index gives: every place of x has a grid of its
    own, that of the largest value added there."""
    source = source[tuple(slice(n) for n in index.shape)]
    top = torch.zeros_like(x).scatter_reduce_(dim, index, source.abs(), "amax")
    up, down, rest = grid(top, sum_bits(index.shape[dim] if index.ndim else 1))
    terms = source.mul(up.gather(dim, index)).round_()
    return x + torch.zeros_like(x).scatter_add_(dim, index, terms).mul_(down).mul_(rest)


def index_add(x, dim, index, source, alpha=1):
    shape = [-1 if d == dim % x.ndim else 1 for d in range(x.ndim)]
    return scatter_add(x, dim, index.view(shape).expand_as(source), source * alpha)


def index_put(x, indices, values, accumulate=False, unsafe=False):
    if not accumulate:
        return aten.index_put(x, indices, values)
    if x.dtype != torch.float64:
        raise NotImplementedError(f"exact arithmetic is for float64, but index_put got {x.dtype}")
    places = aten.index(torch.arange(x.numel(), device=x.device).view(x.shape), indices)
    values = values.expand(places.shape).reshape(-1)
    return scatter_add(x.reshape(-1), 0, places.reshape(-1), values).view(x.shape)


# ----------------------------------------------------------------------------------------- products

def product(a, b):
    """a @ b for a[…, M, K] and b[…, K, N]: a grid for each row of a and each column of b."""
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise RuntimeError(f"no product of shapes {list(a.shape)} and {list(b.shape)}")
    bits = bits_for(a.shape[-1])
    (a, rest_a), (b, rest_b) = to_grid(a, bits, -1), to_grid(b, bits, -2)
    return scaled(a @ b, rest_a, rest_b).add_(0.0)


def addmm(c, a, b, *, beta=1, alpha=1):
    out = product(a, b)
    out = out if alpha == 1 else out.mul_(alpha)
    return out if beta == 0 else out.add_(c if beta == 1 else c * beta)


BLOCK = 64  # output frames of a convolution that share one grid


def windows(x, frames, kernel, stride, dilation):
    """x[…, L, C] → a view […, frames, kernel, C] of what each output frame sees."""
    *lead, frame, channel = x.stride()
    return x.as_strided((*x.shape[:-2], frames, kernel, x.shape[-1]),
                        (*lead, stride * frame, dilation * frame, channel))


def frames_of(x, terms):
    """How many whole BLOCKs of frames, of `terms` values each, to compute at a time."""
    return BLOCK * max(1, (1 << 21 if x.device.type == "cpu" else 1 << 27) // (BLOCK * terms))


def convolution(x, w, bias, stride, padding, dilation, transposed=False, _output_padding=0,
                groups=1):
    """Conv1d as products of windows: x[B, C, L], w[O, C / groups, kernel], bias[O] → [B, O, T].
    What a BLOCK of frames sees is on one grid."""
    if x.ndim != 3 or transposed:
        raise NotImplementedError("exact arithmetic has one convolution, Conv1d")
    outputs, channels, kernel = w.shape
    stride, dilation, bits = stride[0], dilation[0], bits_for(channels * kernel)
    w, rest_w = to_grid(w.flatten(1), bits, -1)
    w = w.view(outputs, channels, kernel).transpose(1, 2).reshape(groups, -1, kernel * channels)
    frames = (x.shape[2] + 2 * padding[0] - dilation * (kernel - 1) - 1) // stride + 1
    if frames < 1:
        raise RuntimeError(f"a kernel of {kernel} is longer than its input of {x.shape[2]}")
    span = (BLOCK - 1) * stride + dilation * (kernel - 1) + 1  # input frames that a block sees
    out = x.new_empty(len(x), outputs, frames)

    def convolve(part):
        count, first = -(-(part.stop - part.start) // BLOCK), part.start * stride - padding[0]
        length = (count - 1) * BLOCK * stride + span
        seen = clip[:, max(first, 0):max(first + length, 0)]
        left = min(max(-first, 0), length)
        right = length - left - seen.shape[1]
        if left or right:  # only here: padding the whole clip would copy it
            seen = F.pad(seen, (left, right))
        seen = seen.reshape(groups, channels, -1).transpose(1, 2).contiguous()
        seen = seen.as_strided((groups, count, span, channels),
                               (seen.stride(0), BLOCK * stride * channels, channels, 1))
        up, down, rest = grid(magnitude(seen, (2, 3)), bits)
        seen = torch.mul(seen, up, out=x.new_empty(seen.shape))
        seen = windows(seen.round_().mul_(down), BLOCK, kernel, stride, dilation)
        y = w @ seen.reshape(groups, count * BLOCK, -1).mT
        rest = rest.flatten(1).repeat_interleave(BLOCK, 1)[:, None]
        y = scaled(y, rest, rest_w.view(groups, -1, 1))
        y = y.flatten(0, 1)[:, :part.stop - part.start]
        torch.add(y, 0.0 if bias is None else bias[:, None] + 0.0, out=result[:, part])

    for clip, result in zip(x, out):
        in_slices(convolve, frames, frames_of(x, channels * kernel * groups), x.device)
    return out


def convolution_backward(dy, x, w, _bias, stride, padding, dilation, _transposed, _output_padding,
                         groups, mask):
    """Gradients of Conv1d with respect to x, w and bias, where `mask` asks for them."""
    outputs, channels, kernel = w.shape
    stride, padding, dilation, dx, dw = stride[0], padding[0], dilation[0], None, None
    if mask[0]:  # a convolution of dy, `stride` apart, with the reversed kernel
        span = dilation * (kernel - 1)
        spread = dy.new_zeros(*dy.shape[:2], x.shape[2] + 2 * padding + span)
        spread[:, :, span:span + (dy.shape[2] - 1) * stride + 1:stride] = dy
        reversed_w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2)
        dx = convolution(spread, reversed_w, None, (1,), (0,), (dilation,), groups=groups)
        dx = dx[:, :, padding:padding + x.shape[2]]
    if mask[1]:  # a product over all frames of all clips, added up clip by clip
        bits, frames = bits_for(len(dy) * dy.shape[2]), dy.shape[2]
        g, rest_g = to_grid(dy.transpose(0, 1).reshape(outputs, -1), bits, -1)
        x = F.pad(x, (padding, padding)).transpose(0, 1)
        seen, rest_x = to_grid(x.reshape(len(x), -1), bits, -1)
        g, dw = g.view(groups, -1, *dy.shape[::2]), 0
        seen = seen.view(groups, channels, *x.shape[1:])
        step = frames_of(dy, channels * kernel * groups)
        for clip in range(len(dy)):
            view = seen[:, :, clip].transpose(1, 2).contiguous()
            view = windows(view, frames, kernel, stride, dilation)
            for start in range(0, frames, step):
                part = slice(start, start + step)
                dw = dw + g[:, :, clip, part] @ view[:, part].flatten(2)
        dw = dw.view(groups, -1, kernel, channels)
        dw = scaled(dw, rest_g.view(groups, -1, 1, 1), rest_x.view(groups, 1, 1, channels))
        dw = dw.flatten(0, 1).transpose(1, 2).contiguous()
    return dx, dw, total(dy, [0, 2]) if mask[2] else None


# ---------------------------------------------------------------------------------------- functions


def np_exp(x):
    k = np.rint(x * 1.4426950408889634)
    r = (x - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10  # ln 2 in two parts
    term = series = np.ones_like(r)
    for n in range(1, 19):
        term = term * r / n
        series = series + term
    return np.ldexp(series, k.astype(int))


def np_log(x):
    """For x from 1 to 2."""
    z = (x - 1) / (x + 1)
    series = functools.reduce(lambda series, n: series * (z * z) + 1 / n, range(41, 0, -2), 0 * z)
    return 2 * z * series


def np_normal(x):
    """The standard normal distribution function: a series near 0, a continued fraction far out."""
    a = np.abs(x) * 0.7071067811865476
    term = series = a
    for n in range(1, 120):
        term = -term * a * a / n
        series = series + term / (2 * n + 1)
    fraction = 0 * a
    for n in range(60, 0, -1):
        fraction = (n / 2) / (a + fraction + 1e-300)
    tail = np.where(a < 2.5, 0.5 - series * 0.5641895835477563,
                    np_exp(-a * a) * 0.28209479177387814 / (a + fraction + 1e-300))
    return np.where(x < 0, tail, 1 - tail)


@functools.cache
def table(name, device):
    """A table of float64 values, computed with + - * / alone."""
    if name == "exp":  # of 0, ln(2)/256, … below ln 2
        values = np_exp(np.arange(256) * (0.6931471805599453 / 256))
    elif name == "log":  # of the middles of 256 steps from 1 to 2
        values = np_log(1 + (np.arange(256) + 0.5) / 256)
    elif name == "attention":  # e^-x in steps of 2^-16 to 16, as integers of 20 bits: the last is 0
        values = np.rint(np_exp(-(np.arange(1 << 20) + 0.5) / 65536) * 2.0**20)
        values[0], values[-1] = 2.0**20, 0
    else:  # of -8.5, … 8.5 in steps of 2^-12; beyond, the distribution is 0 or 1
        x = np.arange(-34816, 34817) / 4096
        inside = np.abs(x) < 8.5
        density = np_exp(-0.5 * x * x) * 0.3989422804014327
        values = np.where(inside, np_normal(x), x > 0) if name == "normal" else density * inside
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(device)


def look_up(name, index):
    return table(name, index.device).index_select(0, index.flatten()).view(index.shape)


def sqrt(x):
    """numpy's on a CPU, since torch's is not correctly rounded there."""
    if x.device.type != "cpu":
        return torch.sqrt(x)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.detach().contiguous().numpy()))).view(x.shape)


@elementwise
def exp(x):
    """e^x = 2^k · 2^(n/256) · e^r with |r| < ln(2)/512."""
    steps = (x.clamp(-746.0, 710.0) * (256 * 1.4426950408889634)).round_()
    steps = torch.where(x == x, steps, 0.0)
    r = x.clamp(-746.0, 710.0).sub_(steps * (0.693147180369123816490 / 256))
    r = r.sub_(steps * (1.90821492927058770002e-10 / 256))
    series = (((r * (1 / 24) + 1 / 6) * r + 0.5) * r + 1.0) * r + 1.0
    steps = steps.to(torch.int64)
    k = steps >> 8
    half = k >> 1  # 2^k in two factors: on its own it may be out of range
    out = series * look_up("exp", steps & 255) * power_of_two(half + 1023)
    return out * power_of_two(k - half + 1023)


@elementwise
def log(x):
    """log x = k · log 2 + log c + log(1 + r), c the nearest of 256 steps from 1 to 2."""
    tiny = x < 2.0**-1022
    bits = torch.where(tiny, x * 2.0**54, x).view(torch.int64)
    k = (bits >> 52) - 1023 - tiny * 54
    index = (bits >> 44) & 255
    c = (index.to(torch.float64) + 0.5) * (1 / 256) + 1.0
    r = (((bits & (1 << 52) - 1) | 1023 << 52).view(torch.float64) - c) / c
    series = (((((r * (-1 / 6) + 0.2) * r - 0.25) * r + 1 / 3) * r - 0.5) * r + 1.0) * r
    out = series + look_up("log", index) + k.to(torch.float64) * 0.6931471805599453
    out = torch.where(x > 0, out, torch.where(x == 0, -math.inf, math.nan))
    return torch.where(x == math.inf, x, out)


def near_normal(x):
    """The nearest x of the normal table, how far x is from it, and its place."""
    y = x.clamp(-8.5, 8.5)
    steps = (y * 4096.0).round_()
    centre = steps * 2.0**-12
    # NaN: anything
    return centre, y.sub_(centre), steps.add_(34816.0).to(torch.int32).clamp_(0, 69632)


@elementwise
def gelu(x):
    """x·Φ(x): Φ of the table with its slope, the density."""
    _, off, place = near_normal(x)
    return off.mul_(look_up("density", place)).add_(look_up("normal", place)).mul_(x)


@elementwise
def gelu_backward(dy, x):
    centre, off, place = near_normal(x)
    slope = centre.mul_(off).neg_().add_(1.0).mul_(x).add_(off)  # Φ and x·φ around the table's x
    return slope.mul_(look_up("density", place)).add_(look_up("normal", place)).mul_(dy)


def sigmoid(x):
    e = exp(-x.abs())
    return torch.where(x < 0, e, 1.0) / (e + 1.0)


def tanh(x):
    e = exp(x.abs() * -2.0)
    return torch.copysign((1.0 - e) / (e + 1.0), x)


def softmax(x, dim, *_):
    e = exp(x - x.amax(dim, keepdim=True))
    return div(e, total(e, dim, True))


# -------------------------------------------------------------------------------------------- norms


def norm_forward(x, rows, eps, affine):
    """x as [rows, n]: (x - mean) / sqrt(variance + eps) of each row, then affine(some rows in
    place, which). Returns that, means[rows, 1] and 1 / sqrt()."""
    x = x.reshape(rows, -1)
    out, m, r = torch.empty_like(x), x.new_empty(rows, 1), x.new_empty(rows, 1)

    def work(part):
        m[part] = mean(x[part], 1, True)
        y = torch.sub(x[part], m[part], out=out[part])
        r[part] = reciprocal(sqrt(mean(y * y, 1, True) + eps))
        affine(y.mul_(r[part]), part)

    in_slices(work, rows, rows_of(x), x.device)
    return out, m, r


def layer_norm(x, shape, w, b, eps):
    if list(x.shape[x.ndim - len(shape):]) != list(shape):
        raise RuntimeError(f"layer_norm over {list(shape)} of an input {list(x.shape)}")

    def affine(y, _):
        y = y if w is None else y.mul_(w.reshape(-1))
        return y if b is None else y.add_(b.reshape(-1))

    outer = x.shape[:x.ndim - len(shape)]
    out, m, r = norm_forward(x, math.prod(outer), eps, affine)
    return out.view(x.shape), *(t.view(*outer, *[1] * len(shape)) for t in (m, r))


def group_norm(x, w, b, batch, channels, length, groups, eps):
    def affine(y, part):
        group = torch.arange(part.start, part.stop, device=y.device) % groups
        y = y.view(len(y), channels // groups, -1)
        y = y if w is None else y.mul_(w.view(groups, -1, 1)[group])
        return y if b is None else y.add_(b.view(groups, -1, 1)[group])

    out, m, r = norm_forward(x, batch * groups, eps, affine)
    return out.view(x.shape), m.view(batch, groups), r.view(batch, groups)


def layer_norm_backward(dy, x, shape, m, r, w, b, mask):
    dims, dx = list(range(x.ndim - len(shape), x.ndim)), None
    h = (x - m).mul_(r)
    if mask[0]:
        g = dy if w is None else dy * w
        dx = (g - mean(g, dims, True)).sub_(h * mean(g * h, dims, True)).mul_(r)

    def over_rows(terms):
        return total(terms.reshape(-1, math.prod(shape)), 0).view(shape)

    return dx, over_rows(dy * h) if mask[1] else None, over_rows(dy) if mask[2] else None


# ------------------------------------------------------------------------------------------ dropout


def new_seed(generator=None):
    """A mask's seed, drawn on the CPU by torch: manual_seed and checkpointing apply to it."""
    return int(torch.randint(2**62, (), generator=generator))


def dropped(seed, first, rows, length, p, device):
    """bool[rows, length]: rows `first`, … of the mask of `seed`, True with probability p (in steps
    of 2^-16). A hash of the position (splitmix64) in integer arithmetic; four values from each."""
    words = -(-length // 4)
    x = torch.arange(first * words, (first + rows) * words, device=device)
    x.mul_(-7046029254386353131).add_(seed)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
    threshold = round(p * 65536) - 32768  # 32768, for p = 1, is no int16
    lost = x.view(torch.int16) < threshold if threshold < 32768 else torch.ones_like(
        x.view(torch.int16), dtype=torch.bool)
    return lost.view(rows, -1)[:, :length]


def kept_mask(shape, p, device, generator=None):
    """bool of that shape, False with probability p."""
    length = shape[-1] if len(shape) else 1
    seed, rows = new_seed(generator), math.prod(shape[:-1])
    out = torch.empty(rows, length, dtype=torch.bool, device=device)

    def work(part):
        lost = dropped(seed, part.start, part.stop - part.start, length, p, device)
        torch.logical_not(lost, out=out[part])

    if out.numel():
        in_slices(work, rows, rows_of(out), device)
    return out.view(shape)


def bernoulli_(x, p=0.5, generator=None):
    if isinstance(p, torch.Tensor):
        raise NotImplementedError("exact arithmetic has bernoulli_ with a number for p")
    return x.copy_(kept_mask(x.shape, 1 - p, x.device, generator))


def dropout(x, p, train):
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = kept_mask(x.shape, p, x.device)
    return dropout_backward(x, kept, 1.0 / (1.0 - p) if p < 1 else 0.0), kept


def dropout_backward(dy, kept, scale):
    return dy * (kept.to(dy.dtype) * scale)  # bool times a number would be float32


# ---------------------------------------------------------------------------------------- attention


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
    """F.scaled_dot_product_attention: exact if the calling thread is in an Exact context, else
    torch's. A mask that trains, or holds NaN or +infinity, goes through torch's formula, in exact
    steps."""
    if not in_exact():
        return torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                               enable_gqa=enable_gqa)
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


# ------------------------------------------------------------------------------ table of operations


def div(x, y):
    """A division of tensors: by a number, CUDA would multiply with its reciprocal."""
    dtype = torch.result_type(x, y)
    dtype = dtype if dtype.is_floating_point else torch.float64
    device = y.device if isinstance(y, torch.Tensor) and not x.ndim else x.device
    y = torch.as_tensor(y, dtype=dtype).to(device)
    x, y = torch.broadcast_tensors(x.to(device, dtype), y)
    return x / y


def add(x, y, *, alpha=1):
    return x + (y if alpha == 1 else y * alpha)


def sub(x, y, *, alpha=1):
    return x - (y if alpha == 1 else y * alpha)


def lerp(x, y, weight):
    return x + (y - x) * weight


def addcmul(x, a, b, *, value=1):
    return x + a * b * value


def addcdiv(x, a, b, *, value=1):
    return x + div(a, b) * value


def reciprocal(x):
    return torch.ones_like(x) / x


def power(x, n):
    """x^n by products, a square root and a reciprocal."""
    if isinstance(n, torch.Tensor) or n not in [half / 2 for half in range(-8, 9)]:
        raise NotImplementedError("exact arithmetic has powers from -4 to 4 in steps of a half, "
                                  "given as a number")
    factors = [x] * int(abs(n)) + [sqrt(x)] * (n % 1 != 0)
    out = functools.reduce(torch.mul, factors, torch.ones_like(x))
    return out if n >= 0 else reciprocal(out)


def arange(*bounds, dtype=None, **options):
    """Its numbers in float64: start plus a whole number of steps."""
    if not any(isinstance(bound, float) for bound in bounds) and not (
            dtype and dtype.is_floating_point):
        return torch.arange(*bounds, dtype=dtype, **options)
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    count = torch.arange(math.ceil((end - start) / step), **options)
    return count.double().mul_(step).add_(start).to(dtype or torch.get_default_dtype())


def drawn_on_cpu(x):
    if x.device.type != "cpu":
        raise NotImplementedError("random numbers of a GPU are others: draw on the CPU, then .to()")


def uniform_(x, low=0.0, high=1.0, *, generator=None):
    drawn_on_cpu(x)
    return x.uniform_(0, 1, generator=generator).mul_(high - low).add_(low)


def normal_(x, mean=0.0, std=1.0, *, generator=None):
    """Normally distributed numbers by Box and Muller's formula; torch's own follow the CPU's
    vectors."""
    drawn_on_cpu(x)
    u, turn = torch.rand(2, *x.shape, dtype=torch.float64, generator=generator)
    squared = ((turn - 0.5) * 6.283185307179586)**2
    cosine = functools.reduce(lambda series, n: 1.0 - series * squared * (1 / (n * (n - 1))),
                              range(28, 0, -2), torch.ones_like(turn))
    return x.copy_(sqrt(log(1.0 - u) * -2.0) * cosine * -std + mean)


def randn(size, *, generator=None, **options):
    return normal_(torch.empty(size, **options), generator=generator)


# The rules, by the name of the ATen operation. One serves its in-place and out= variants as well.
RULES = {
    "mm": product, "bmm": product, "addmm": addmm, "baddbmm": addmm,
    "convolution": convolution, "convolution_backward": convolution_backward,
    "sum": total, "mean": mean, "var_mean": var_mean, "linalg_vector_norm": norm,
    "var": lambda *args, **options: var_mean(*args, **options)[0],
    "std": lambda *args, **options: sqrt(var_mean(*args, **options)[0]),
    "index_add": index_add, "scatter_add": scatter_add, "index_put": index_put,
    "_index_put_impl": index_put,
    "add": add, "sub": sub, "rsub": lambda x, y, *, alpha=1: sub(y, x, alpha=alpha), "div": div,
    "reciprocal": reciprocal, "lerp": lerp, "addcmul": addcmul, "addcdiv": addcdiv,
    "sqrt": sqrt, "rsqrt": lambda x: reciprocal(sqrt(x)), "pow": power,
    "exp": exp, "expm1": lambda x: exp(x) - 1.0, "log": log, "log1p": lambda x: log(x + 1.0),
    "sigmoid": sigmoid, "tanh": tanh, "gelu": gelu, "gelu_backward": gelu_backward,
    "_softmax": softmax,
    "native_layer_norm": layer_norm, "native_layer_norm_backward": layer_norm_backward,
    "native_group_norm": group_norm,
    "bernoulli_": bernoulli_, "native_dropout": dropout,
    "native_dropout_backward": dropout_backward,
    "uniform_": uniform_, "normal_": normal_, "arange": arange, "randn": randn,
    "randn_like": lambda x, **options: normal_(torch.empty_like(x, **options)),
}
# rules that take float32 as well
ANY_FLOAT = {"add", "sub", "rsub", "div", "reciprocal", "index_put", "_index_put_impl", "uniform_",
             "normal_", "randn_like"}
# what makes floating-point numbers of integers, or of nothing
FROM_INTEGERS = {"add", "sub", "rsub", "div", "mean", "randn", "arange", "bernoulli_"}
# Exact as they are: they move, compare or select numbers, or are one IEEE operation.
EXACT = set("""
view _unsafe_view _reshape_alias reshape view_as expand expand_as as_strided t transpose permute
movedim squeeze unsqueeze flatten unflatten select slice narrow diagonal split split_with_sizes
unsafe_split unsafe_split_with_sizes chunk unbind unfold flip roll repeat cat stack tril triu
constant_pad_nd clone contiguous copy detach alias lift lift_fresh lift_fresh_copy _to_copy set
resize _pin_memory is_pinned record_stream _local_scalar_dense is_same_size _has_same_storage_numel
select_backward slice_backward diagonal_backward select_scatter slice_scatter as_strided_scatter
index index_select index_fill index_copy gather scatter take embedding masked_fill masked_scatter
masked_select where nonzero empty empty_like empty_strided empty_permuted new_empty
new_empty_strided zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full fill
zero scalar_tensor eye neg abs mul sign sgn signbit copysign relu leaky_relu leaky_relu_backward
threshold threshold_backward hardtanh hardtanh_backward clamp clamp_min clamp_max maximum minimum
fmax fmin amax amin max min aminmax argmax argmin round floor ceil trunc nan_to_num isnan isinf
isfinite eq ne lt le gt ge equal logical_and logical_or logical_not logical_xor all any is_nonzero
""".split())
# those of them that may give a zero either sign, as the CPU's vectors fall: here it is always +
EITHER_ZERO = {"relu", "threshold", "hardtanh", "clamp", "clamp_min", "clamp_max", "maximum",
               "minimum", "fmax", "fmin", "amax", "amin", "max", "min", "aminmax"}
# exact where they are drawn on a CPU
RANDOM = {"rand", "rand_like", "random", "randint", "randint_like", "randperm"}
# arguments that make another operation of the one that RULES and EXACT name
OTHERWISE = {"approximate", "reduce", "rounding_mode"}
# its composition is another one on a GPU than on a CPU
UNLIKE = {aten._addmm_activation.default, aten._addmm_activation.out}

# --------------------------------------------------------------------------------------------- mode


def floats_in(values):
    """The floating-point tensors in (lists of) values. Raises NotImplementedError for complex ones:
    a compiler may fuse the operations of which their product is made."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from floats_in(value)
        elif isinstance(value, torch.Tensor) and value.is_complex():
            raise NotImplementedError("exact arithmetic has no complex numbers")
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value


def in_exact():
    """Whether the calling thread is in an Exact context."""
    return any(isinstance(mode, Exact) for mode in _get_current_dispatch_mode_stack())


_lock, _inside, _switches = threading.Lock(), 0, contextlib.ExitStack()


def count_inside(change):
    """Torch's switches between its fused kernels and what these are composed of are the process's:
    they are set from the time that the first thread enters until the last one has left."""
    global _inside
    with _lock:
        _inside += change
        if _inside == 1 and change == 1:
            _switches.enter_context(sdpa_kernel(SDPBackend.MATH))  # for code that holds torch's own
            fused = torch.backends.mha
            _switches.callback(fused.set_fastpath_enabled, fused.get_fastpath_enabled())
            fused.set_fastpath_enabled(False)
        elif _inside == 0:
            _switches.close()


class Exact(TorchDispatchMode):
    """The context in which float64 torch programs give the same bits on any machine.

    Forward, backward and optimizer step belong inside; so do backward threads, checkpointing,
    no_grad and inference_mode, and it may be entered again inside itself. Raises
    NotImplementedError, naming it, for an operation that has no rule and cannot be taken apart into
    some that have, and for float32 sums."""

    def __init__(self, apart=()):
        """apart: the operations that are being taken apart, the outermost first."""
        super().__init__()
        self.outermost, self.apart = [], apart

    def __enter__(self):
        self.outermost.append(not in_exact())
        if not self.outermost[-1]:  # within itself: nothing to add
            return self
        count_inside(1)
        F.scaled_dot_product_attention = attention  # stays: outside this context it is torch's
        torch.set_flush_denormal(False)
        return super().__enter__()

    def __exit__(self, *error):
        if self.outermost.pop():
            super().__exit__(*error)
            count_inside(-1)

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs, hint = kwargs or {}, ""
        space, name = func._schema.name.split("::")
        floats = list(floats_in((*args, *kwargs.values())))
        in_place = name.endswith("_") and name not in RULES
        name = name[:-1] if in_place else name
        known = space == "aten" and all(kwargs.get(each) in (None, "none") for each in OTHERWISE)
        if known:
            kwargs = {each: value for each, value in kwargs.items() if each not in OTHERWISE}
        if known and name in RULES and (floats or name in FROM_INTEGERS):
            return by_rule(func, name, in_place, floats, args, kwargs)
        if known and name in RANDOM:
            drawn = func(*args, **kwargs)
            if drawn.device.type == "cpu":
                return drawn
            hint = ": draw on the CPU, then move"
        elif known and name in EXACT:
            result = func(*args, **kwargs)
            for values in floats_in([result]) if name in EITHER_ZERO else ():
                values.add_(0.0)
            return result
        elif not floats:
            result = func(*args, **kwargs)
            if next(floats_in([result]), None) is None:  # integers and booleans
                return result
            hint = " of integers: convert them first, with .double()"
        compositions = [func.decompose]
        # torch's table, but not for what draws random numbers: Python's log makes some of them
        if (not hint and func in decomposition_table and func not in (*self.apart, *UNLIKE)
                and torch.Tag.nondeterministic_seeded not in func.tags):
            compositions.append(decomposition_table[func])
        with Exact((*self.apart, func)):  # the parts come here in turn
            for composition in compositions:
                result = composition(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if "foreach" in name or "fused" in name:
            hint = ": pass foreach=False, fused=False"
        # torch's primitives, which only its table calls, are not what was asked for
        asked = next((each for each in (func, *reversed(self.apart)) if each.namespace != "prims"),
                     func)
        raise NotImplementedError(
            f"no exact arithmetic for {asked}{hint if asked is func else ''}. To add it, write a "
            "function of its arguments with the sums and products of exact.py and enter it in "
            "RULES")


def by_rule(func, name, in_place, floats, args, kwargs):
    """What the rule of an operation gives. Where an operand is empty nothing is added up: torch's
    own result."""
    if not all(x.numel() for x in floats_in(args)):
        return func(*args, **kwargs)
    if name not in ANY_FLOAT and any(x.dtype != torch.float64 for x in floats):
        raise NotImplementedError(f"exact arithmetic is for float64, but {func} got "
                                  f"{floats[0].dtype}")
    out = kwargs.pop("out", None)
    result = RULES[name](*args, **kwargs)
    if in_place:
        if not torch.can_cast(result.dtype, args[0].dtype):
            raise RuntimeError(f"{func} would turn {result.dtype} into {args[0].dtype}")
        return args[0].copy_(result)
    return result if out is None else out.resize_(result.shape).copy_(result)


# ------------------------------------------------------------------------------- known-answer check


def sample(device, *shape):
    """Numbers from -1 to 1 that are the same everywhere: a hash of their place."""
    x = torch.arange(1, math.prod(shape) + 1).mul_(-7046029254386353131)
    x = x.bitwise_xor_((x >> 30) & (1 << 34) - 1).mul_(-4658895280553007687)
    x >>= 11
    return (x.to(torch.float64) * 2.0**-52).view(shape).to(device)


CASES = {  # of x[60, 500] and y[500, 40]: the digest of the answer, and what to compute
    "product": ("0946f3a3", lambda x, y: x @ y),
    "sum": ("e84c220b", lambda x, y: x.repeat(20, 1).sum()),
    "index_add": ("281e0fda", lambda x, y: torch.zeros_like(x[:7]).index_add(
        0, torch.arange(60, device=x.device) % 7, x)),
    "division": ("1a143734", lambda x, y: x / 3.0),
    "square root": ("b50d9d82", lambda x, y: (x + 2.0).sqrt()),
    "addition": ("271ef2bc", lambda x, y: torch.lerp(x, x * x, 0.3).addcmul(x, x, value=0.7)),
    # so many that all of torch's threads take part
    "denormal numbers": ("c2670832", lambda x, y: x.repeat(20, 1) * 2.0**-1030),
    "exp": ("a58f73ce", lambda x, y: torch.exp(x * 20.0)),
    "log": ("63c8543d", lambda x, y: torch.log(x + 1.5)),
    "gelu": ("9a120eb2", lambda x, y: F.gelu(x * 6.0)),
    "softmax": ("296f9a5f", lambda x, y: x.softmax(1)),
    "layer norm": ("15cdbc6b", lambda x, y: F.layer_norm(x, x.shape[1:], y[:, 0], y[:, 1])),
    "convolution": ("896f9178", lambda x, y: F.conv1d(
        x[None], y.view(100, 40, 5)[:20, :30], groups=2)),
    "dropout": ("f599be47", lambda x, y: F.dropout(x, 0.3)
                + torch.native_dropout(x, 0.3, True)[0]),
    "attention": ("feecf199", lambda x, y: F.scaled_dot_product_attention(
        *x.view(3, 4, 50, 50))),
    "Python's power": ("3808ebb3", lambda x, y: torch.tensor([
        (1 - beta**n)**0.5 for beta in (0.9, 0.99, 0.999) for n in range(1, 300)],
        dtype=torch.float64)),
}


def answers(device):
    """{operation: the first eight hexadecimal digits of the sha256 of its result}."""
    x, y = sample(device, 60, 500), sample(device, 500, 40)
    with Exact(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        results = {name: case(x, y) for name, (_, case) in CASES.items()}
    return {name: hashlib.sha256(value.cpu().numpy().astype("<f8").tobytes()).hexdigest()[:8]
            for name, value in results.items()}


def check(device="cpu"):
    """Compute known answers on a device, in milliseconds once it is warm. Raises ArithmeticError,
    which names the first operation whose bits are others."""
    for name, digest in answers(torch.device(device)).items():
        if digest != CASES[name][0]:
            raise ArithmeticError(f"{name} on {device} gives other bits than it must ({digest}, "
                                  f"not {CASES[name][0]}): results there are not those of other "
                                  "machines")
