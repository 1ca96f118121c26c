"""Exact arithmetic for torch: the same bits on any CPU, with any number of threads, on any GPU.

    from exact import Exact, check
    check("cuda")                       # a few milliseconds: does this machine compute what this file promises?
    with Exact():                       # once around the whole program: forward, backward and optimizer
        loss = model(x); loss.backward(); optimizer.step()
"""

import contextlib
import hashlib
import math
import threading
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import (
    TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack)

CACHED = 1 << 17  # float64 values that a CPU's cache holds: long chains of operations go through so many at a time
aten = torch.ops.aten
torch_attention = F.scaled_dot_product_attention


def slice_length(x, values=CACHED):
    """How many rows of x to compute at a time: as many as fit a CPU's cache; all of them on a GPU."""
    if x.is_cuda:
        values = 1 << 27
    return max(1, values * len(x) // max(1, x.numel()))


# ---------------------------------------------------------------------------------------------- grids


def bits_for(count):
    """Bits for each of the two factors, so that a sum of `count` products is an integer of at most 2^53."""
    return (53 - (count - 1).bit_length()) // 2


def magnitude(x, dims):
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))


def power_of_two(exponent):
    """2.0 ** (exponent - 1023) for int64 exponents 1 … 2046, by writing float64's exponent field."""
    return (exponent << 52).view(torch.float64)


def grid(top, bits):
    """For slices whose largest magnitude is `top`: the powers of two that take them to integers of at most 2^bits,
    and the biased exponent of the way back."""
    exponent = (top.contiguous().view(torch.int64) >> 52).clamp_(min=60)
    return power_of_two(2045 + bits - exponent), exponent - (bits - 1)


def to_grid(x, bits, dim):
    """x rounded to integers of at most 2^bits times a power of two for each slice along dim.

    Returns the rounded values and what is left of the powers of two (None: nothing).
    """
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        values, rest = to_grid(x.mT, bits, -3 - dim)
        return values.mT, None if rest is None else rest.mT
    shape = x.shape
    if dim == -1:
        x = x.reshape(-1, shape[-1])
    out, rows = torch.empty(x.shape, dtype=x.dtype, device=x.device), slice_length(x)
    top = magnitude(x, dim) if dim == -2 else torch.cat([magnitude(part, -1) for part in x.split(rows)])
    up, down = grid(top, bits)
    near = down.clamp(1023 - 200, 1023 + 200)
    fold = power_of_two(near)
    whole = x.ndim == 2 and dim == -2
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        scale = slice(None) if whole else part
        torch.mul(x[part], up[scale], out=out[part]).round_().mul_(fold[scale])
    rest = power_of_two(down - near + 1023) if x.is_cuda or not torch.equal(down, near) else None
    if dim == -1:
        rest = rest if rest is None else rest.view(*shape[:-1], 1)
    return out.view(shape), rest


# ----------------------------------------------------------------------------------------------- sums


def reduced(x, dim):
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(x.ndim))
    return sorted(d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)) if x.ndim else []


def count_of(x, dims):
    return math.prod(x.shape[d] for d in dims)


def total(x, dims, keepdim=False):
    """The sum of x over dims."""
    count = count_of(x, dims)
    if count <= 1 or x.numel() == 0:
        return x.sum(dims, keepdim=keepdim) if x.ndim else x.clone()
    up, down = grid(magnitude(x, dims), min(50, 53 - (count - 1).bit_length()))
    if x.numel() <= CACHED or x.is_cuda:
        out = (x * up).round_().sum(dims, keepdim=True)
    elif 0 in dims:
        out = sum((part * up).round_().sum(dims, keepdim=True) for part in x.split(slice_length(x)))
    else:
        rows = slice_length(x)
        out = torch.cat([(part * u).round_().sum(dims, keepdim=True) for part, u in zip(x.split(rows), up.split(rows))])
    out = out.mul_(power_of_two(down))
    return out if keepdim else out.view([n for d, n in enumerate(x.shape) if d not in dims])


def sum_(x, dim=None, keepdim=False, dtype=None):
    return total(x.to(dtype or x.dtype), reduced(x, dim), keepdim)


def mean(x, dim=None, keepdim=False, dtype=None):
    dims = reduced(x, dim)
    return total(x, dims, keepdim) * (1.0 / count_of(x, dims))


def variance(x, dim=None, unbiased=None, correction=1, keepdim=False):
    dims = reduced(x, dim)
    centred = x - mean(x, dims, True)
    return total(centred * centred, dims, keepdim) * (1.0 / (count_of(x, dims) - (1 if correction is None else correction)))


def norm(x, ord=2, dim=None, keepdim=False, dtype=None):
    dims = reduced(x, dim)
    if ord == 1:
        return total(x.abs(), dims, keepdim)
    if ord == math.inf:
        return x.abs().amax(dims, keepdim)
    if ord != 2:
        raise NotImplementedError(f"no exact norm of order {ord}")
    if x.numel() == 0 or not x.ndim:
        return x.abs() if not x.ndim else total(x, dims, keepdim)
    up, down = grid(magnitude(x, dims), 10)
    scaled = x * up
    out = sqrt(total(scaled * scaled, dims, True)) * power_of_two(down)
    return out if keepdim else out.view([n for d, n in enumerate(x.shape) if d not in dims])


# ------------------------------------------------------------------------------------------- products

_kept = {}  # (storage, place, version, grid) -> quantised operand; emptied when the outermost Exact() is left


def cached_grid(x, bits, dim):
    return to_grid(x, bits, dim)


def product(a, b):
    """a @ b for a[…, M, K] and b[…, K, N]."""
    if 0 in a.shape or 0 in b.shape:
        return a @ b
    bits = bits_for(a.shape[-1])
    (a, rest_a), (b, rest_b) = cached_grid(a, bits, -1), cached_grid(b, bits, -2)
    out = a @ b
    for rest in (rest_a, rest_b):
        if rest is not None:
            out.mul_(rest)
    return out


def addmm(c, a, b, beta=1, alpha=1):
    out = product(a, b)
    if alpha != 1:
        out.mul_(alpha)
    return out if beta == 0 else out.add_(c if beta == 1 else c * beta)


def windows(x, kernel, stride, dilation):
    """x[B, L, C] → a view [B, T, kernel, C] of what each output frame sees."""
    b, length, c = x.shape
    frames = (length - dilation * (kernel - 1) - 1) // stride + 1
    s = x.stride()
    return x.as_strided((b, frames, kernel, c), (s[0], stride * s[1], dilation * s[1], s[2]))


BLOCK = 64  # output frames of a convolution that share a grid


def convolution(x, w, bias, stride, padding, dilation, transposed=False, output_padding=(0,), groups=1, *_):
    """Conv1d: x[B, C, L], w[O, C / groups, kernel] → [B, O, T]."""
    if x.ndim != 3 or transposed:
        raise NotImplementedError("exact arithmetic has no rule for this convolution: only Conv1d has one")
    stride, padding, dilation = stride[0], padding[0], dilation[0]
    out_channels, channels, kernel = w.shape
    terms = channels * kernel
    bits = bits_for(terms)
    if padding:
        x = torch.constant_pad_nd(x, (padding, padding))
    frames = (x.shape[2] - dilation * (kernel - 1) - 1) // stride + 1
    w = w.transpose(1, 2).reshape(groups, out_channels // groups, terms)
    w, rest_w = cached_grid(w, bits, -1)
    out = torch.empty(len(x), out_channels, frames, dtype=x.dtype, device=x.device)
    step = BLOCK * max(1, (1 << 26 if x.is_cuda else 1 << 19) // (BLOCK * terms * groups))
    for clip, result in zip(x, out):
        for start in range(0, frames, step):
            n = min(step, frames - start)
            part = clip[:, start * stride:(start + n - 1) * stride + dilation * (kernel - 1) + 1]
            part = part.reshape(groups, channels, -1).transpose(1, 2).contiguous()
            tops = windows(magnitude(part, 2), kernel, stride, dilation).amax((2, 3))
            tops = F.pad(tops, (0, -n % BLOCK)).unflatten(1, (-1, BLOCK)).amax(2)
            up, down = grid(tops, bits)
            near = down.clamp(1023 - 200, 1023 + 200)
            rest = power_of_two(down - near + 1023) if x.is_cuda or not torch.equal(down, near) else None
            up, fold = (t.repeat_interleave(BLOCK, 1)[:, :n, None, None] for t in (up, power_of_two(near)))
            seen = torch.empty(groups, n, kernel, channels, dtype=x.dtype, device=x.device)
            torch.mul(windows(part, kernel, stride, dilation), up, out=seen).round_().mul_(fold)
            seen = seen.view(groups, n, terms)
            y = w @ seen.mT
            if rest is not None:
                y.mul_(rest.repeat_interleave(BLOCK, 1)[:, None, :n])
            if rest_w is not None:
                y.mul_(rest_w)
            result[:, start:start + n] = y.view(out_channels, n)
    return out if bias is None else out.add_(bias[:, None])


def convolution_backward(dy, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask):
    """Gradients of Conv1d for x, w and bias."""
    out_channels, channels, kernel = w.shape
    stride, padding, dilation = stride[0], padding[0], dilation[0]
    dx = dw = None
    if mask[0]:  # a convolution of dy, its frames `stride` apart, with the reversed kernel
        length = x.shape[2] + 2 * padding
        span = dilation * (kernel - 1)
        spread = dy.new_zeros(*dy.shape[:2], length + span)
        spread[:, :, span:span + (dy.shape[2] - 1) * stride + 1:stride] = dy
        back = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2)
        dx = convolution(spread, back, None, (1,), (0,), (dilation,), groups=groups)[:, :, padding:length - padding]
    if mask[1]:
        padded = torch.constant_pad_nd(x, (padding, padding)) if padding else x
        bits = bits_for(dy.shape[0] * dy.shape[2])
        dy_i, dy_rest = to_grid(dy.transpose(0, 1).reshape(out_channels, -1), bits, -1)
        x_i, x_rest = to_grid(padded.transpose(0, 1).reshape(x.shape[1], -1), bits, -1)
        dy_i = dy_i.view(groups, -1, dy.shape[0], dy.shape[2])
        x_i = x_i.view(groups, channels, len(x), -1).permute(2, 0, 3, 1)
        dw = 0
        for b in range(len(x)):
            seen = windows(x_i[b].contiguous(), kernel, stride, dilation)
            step = max(1, (1 << 26 if x.is_cuda else 1 << 19) // (channels * kernel * groups))
            for start in range(0, dy.shape[2], step):
                dw = dw + dy_i[:, :, b, start:start + step] @ seen[:, start:start + step].flatten(2)
        dw = dw.view(out_channels, kernel, channels)
        if dy_rest is not None:
            dw = dw * dy_rest[:, :, None]
        if x_rest is not None:
            dw = (dw.view(groups, -1, kernel, channels) * x_rest.view(groups, 1, 1, channels)).view(dw.shape)
        dw = dw.transpose(1, 2).contiguous()
    return dx, dw, total(dy, [0, 2]) if mask[2] else None


# ------------------------------------------------------------------------------------------ functions


def by_slices(function):
    """Compute an elementwise function in slices that stay in a CPU's cache."""
    def sliced(x, *others, **options):
        if x.is_cuda or x.numel() <= CACHED:
            return function(x, *others, **options)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        flat = [t.contiguous().view(-1).split(CACHED) for t in (x, *others)]
        for result, *parts in zip(out.view(-1).split(CACHED), *flat):
            result.copy_(function(*parts, **options))
        return out
    return sliced


def np_exp(x):
    k = np.rint(x * 1.4426950408889634)
    r = (x - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10
    term = total = np.ones_like(r)
    for n in range(1, 19):
        term = term * r / n
        total = total + term
    return np.ldexp(total, k.astype(int))


def np_log(x):
    """For x near 1 … 2."""
    z = (x - 1) / (x + 1)
    total = np.zeros_like(z)
    for n in range(41, 0, -2):
        total = total * z * z + 1 / n
    return 2 * z * total


def np_density(x):
    return np_exp(-0.5 * x * x) * 0.3989422804014327


def np_normal(x):
    """The standard normal distribution function."""
    a = np.abs(x) * 0.7071067811865476
    term = series = a
    for n in range(1, 120):
        term = -term * a * a / n
        series = series + term / (2 * n + 1)
    fraction = np.zeros_like(a)
    for n in range(60, 0, -1):
        fraction = (n / 2) / (a + fraction + 1e-300)
    far = np_exp(-a * a) / 1.7724538509055159 / (a + fraction + 1e-300)
    near = series * 1.1283791670955126
    upper = np.where(a < 2.5, 1 - near, far) / 2
    return np.where(x < 0, upper, 1 - upper)


_tables = {}


def table(name, device):
    if (name, device) not in _tables:
        x = np.arange(-8.5, 8.5 + 2.0**-13, 2.0**-12)
        edge = (np.arange(len(x)) > 0) & (np.arange(len(x)) < len(x) - 1)
        steps = np.arange(1 << 20)
        weights = np.rint(np_exp(-(steps + 0.5) / 65536) * 2.0**20)
        weights[0], weights[-1] = 2.0**20, 0
        made = {"normal": lambda: np.where(edge, np_normal(x), x > 0), "density": lambda: np_density(x) * edge,
                "exp": lambda: np_exp(np.arange(256) * (0.6931471805599453 / 256)), "weights": lambda: weights,
                "log": lambda: np_log(1 + (np.arange(256) + 0.5) / 256)}[name]()
        _tables[name, device] = torch.from_numpy(np.ascontiguousarray(made, dtype=np.float64)).to(device)
    return _tables[name, device]


def look_up(name, index):
    t = table(name, index.device)
    return t.index_select(0, index.clamp(0, len(t) - 1).reshape(-1)).view(index.shape)


def sqrt(x):
    """torch's own on a CPU is not correctly rounded, numpy's is."""
    return torch.sqrt(x) if x.is_cuda else torch.from_numpy(np.sqrt(np.ascontiguousarray(x.detach().numpy()))).view(x.shape)


@by_slices
def exp(x):
    y = x.clamp(-746.0, 710.0)
    n = (y * 369.3299304675746).round_()
    r = (y - n * (0.693147180369123816490 / 256)).sub_(n * (1.90821492927058770002e-10 / 256))
    n = torch.where(n == n, n, 0).to(torch.int64)
    r = ((((r * (1 / 24) + 1 / 6) * r + 0.5) * r + 1.0) * r + 1.0) * look_up("exp", n & 255)
    n >>= 8
    half = n >> 1
    return r.mul_(power_of_two(half + 1023)).mul_(power_of_two(n - half + 1023))


@by_slices
def log(x):
    small = x < 2.0**-1022
    y = torch.where(small, x * 2.0**54, x)
    bits = y.view(torch.int64)
    k = ((bits >> 52) - 1023).sub_(small.to(torch.int64) * 54)
    mantissa = ((bits & ((1 << 52) - 1)) | (1023 << 52)).view(torch.float64)
    index = (bits >> 44) & 255
    centre = (index.to(torch.float64) + 0.5) * (1 / 256) + 1.0
    r = (mantissa - centre) / centre
    series = (((((r * (-1 / 6) + 0.2) * r - 0.25) * r + 1 / 3) * r - 0.5) * r + 1.0) * r
    out = series + look_up("log", index) + k.to(torch.float64) * 0.6931471805599453
    out = torch.where(x == 0, -math.inf, torch.where(x < 0, math.nan, out))
    return torch.where((x == math.inf) | (x != x), x, out)


def normal(x):
    """The standard normal distribution function and its density."""
    y = x.clamp(-8.5, 8.5)
    n = (y * 4096.0).round_()
    off = y.sub_(n * 2.0**-12)
    index = n.add_(34816.0).to(torch.int32)
    density = look_up("density", index)
    return look_up("normal", index).add_(off.mul_(density)), density


@by_slices
def gelu_(x):
    return normal(x)[0].mul_(x)


def gelu(x, approximate="none"):
    if approximate != "none":
        raise NotImplementedError("exact arithmetic has GELU with approximate='none' only")
    return gelu_(x)


@by_slices
def gelu_slope(dy, x):
    y = x.clamp(-8.5, 8.5)
    n = (y * 4096.0).round_()
    centre = n * 2.0**-12
    off = y.sub_(centre)
    index = n.add_(34816.0).to(torch.int32)
    density = look_up("density", index)
    centre.mul_(off).neg_().add_(1.0).mul_(x).add_(off)  # x·φ(x) + Φ(x), to second order around the table's x
    return centre.mul_(density).add_(look_up("normal", index)).mul_(dy)


def gelu_backward(dy, x, approximate="none"):
    return gelu_slope(dy, x)


@by_slices
def sigmoid(x):
    e = exp(-x.abs())
    return torch.where(x >= 0, torch.ones_like(x), e) / (e + 1.0) + x * 0.0


@by_slices
def tanh(x):
    e = exp(x.abs() * -2.0)
    return torch.where(x != x, x, (1.0 - e) / (e + 1.0) * torch.sign(x))


def silu(x):
    return x * sigmoid(x)


def silu_backward(dy, x):
    s = sigmoid(x)
    return dy * (s * (x * (1.0 - s) + 1.0))


def softmax(x, dim, *_):
    top = x.amax(dim, keepdim=True)
    e = exp(x - torch.where(top == -math.inf, torch.zeros_like(top), top))
    return e / total(e, reduced(x, dim), True)


def safe_softmax(x, dim, dtype=None):
    return torch.where(x.amax(dim, keepdim=True) == -math.inf, torch.zeros_like(x), softmax(x, dim))


def softmax_backward(dy, y, dim, dtype):
    return y * (dy - total(dy * y, reduced(y, dim), True))


def log_softmax(x, dim, *_):
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - log(total(exp(shifted), reduced(x, dim), True))


def log_softmax_backward(dy, y, dim, dtype):
    return dy - exp(y) * total(dy, reduced(y, dim), True)


def logsumexp(x, dim, keepdim=False):
    dims = reduced(x, dim)
    top = x.amax(dims, keepdim=True)
    top = torch.where(top.abs() == math.inf, torch.zeros_like(top), top)
    out = log(total(exp(x - top), dims, True)) + top
    return out if keepdim else out.view([n for d, n in enumerate(x.shape) if d not in dims])


def nll_loss(x, target, weight, reduction, ignore_index):
    rows = x if x.ndim == 2 else x[None]
    target = target.view(-1)
    used = target != ignore_index
    index = torch.where(used, target, 0)
    w = torch.ones_like(index, dtype=x.dtype) if weight is None else weight[index]
    w = torch.where(used, w, 0.0)
    loss = -rows.gather(1, index[:, None])[:, 0] * w
    loss = torch.where(used, loss, 0.0)
    whole = total(w, [0])
    if reduction == 0:
        return (loss if x.ndim == 2 else loss[0]), x.new_zeros(())
    return (total(loss, [0]) / whole if reduction == 1 else total(loss, [0])), whole


def nll_loss_backward(dy, x, target, weight, reduction, ignore_index, whole):
    rows = x if x.ndim == 2 else x[None]
    target = target.view(-1)
    used = target != ignore_index
    index = torch.where(used, target, 0)
    w = torch.ones_like(index, dtype=x.dtype) if weight is None else weight[index]
    g = -torch.where(used, w, 0.0) * dy
    if reduction == 1:
        g = g / whole
    return torch.zeros_like(rows).scatter(1, index[:, None], g[:, None]).view(x.shape)


def mse_loss(x, y, reduction=1):
    d = x - y
    d = d * d
    return d if reduction == 0 else mean(d) if reduction == 1 else sum_(d)


def mse_loss_backward(dy, x, y, reduction):
    d = (x - y) * 2.0
    return d * dy if reduction != 1 else d * (dy * (1.0 / x.numel()))


# ---------------------------------------------------------------------------------------------- norms


def centred_and_scaled(x, eps):
    """x[rows, n] → (x - mean) / sqrt(variance + eps), the means and the reciprocal deviations, [rows, 1]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = slice_length(x)
    means, scales = [], []
    for part, result in zip(x.split(rows), out.split(rows)):
        m = mean(part, 1, True)
        torch.sub(part, m, out=result)
        r = 1.0 / sqrt(mean(result * result, 1, True) + eps)
        result.mul_(r)
        means.append(m)
        scales.append(r)
    return out, torch.cat(means), torch.cat(scales)


def layer_norm(x, shape, w, b, eps):
    outer = x.shape[:x.ndim - len(shape)]
    out, m, r = centred_and_scaled(x.reshape(math.prod(outer), -1), eps)
    out = out.view(x.shape)
    for part in out.split(slice_length(out)):
        if w is not None:
            part.mul_(w)
        if b is not None:
            part.add_(b)
    ones = [1] * len(shape)
    return out, m.view(*outer, *ones), r.view(*outer, *ones)


def layer_norm_backward(dy, x, shape, m, r, w, b, mask):
    dims, outer = list(range(x.ndim - len(shape), x.ndim)), list(range(x.ndim - len(shape)))
    h = (x - m).mul_(r)
    dx = None
    if mask[0]:
        g = dy if w is None else dy * w
        dx = (g - mean(g, dims, True)).sub_(h * mean(g * h, dims, True)).mul_(r)
    return dx, total(dy * h, outer) if mask[1] else None, total(dy, outer) if mask[2] else None


def group_norm(x, w, b, batch, channels, length, groups, eps):
    out, m, r = centred_and_scaled(x.reshape(batch * groups, -1), eps)
    rows = out.view(batch, channels, length)
    for row in rows.flatten(0, 1).split(slice_length(rows.flatten(0, 1))) if w is None and b is None else ():
        pass
    for clip in rows:
        n = slice_length(clip)
        for start in range(0, channels, n):
            part = clip[start:start + n]
            if w is not None:
                part.mul_(w[start:start + n, None])
            if b is not None:
                part.add_(b[start:start + n, None])
    return out.view(x.shape), m.view(batch, groups), r.view(batch, groups)


def group_norm_backward(dy, x, m, r, w, batch, channels, length, groups, mask):
    shape = batch, groups, channels // groups, length
    dy_, m, r = dy.reshape(shape), m.view(batch, groups, 1, 1), r.view(batch, groups, 1, 1)
    h = (x.reshape(shape) - m).mul_(r)
    dx = None
    if mask[0]:
        g = dy_ if w is None else dy_ * w.view(groups, -1, 1)
        dx = (g - mean(g, [2, 3], True)).sub_(h * mean(g * h, [2, 3], True)).mul_(r).view(x.shape)
    dw = total(dy_ * h, [0, 3]).view(-1) if mask[1] else None
    return dx, dw, total(dy_, [0, 3]).view(-1) if mask[2] else None


# -------------------------------------------------------------------------------------------- dropout


def new_key():
    return int(torch.randint(2**62, ()))


def mix(x):
    """splitmix64's finalizer, in place, on int64."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x.bitwise_xor_((x >> shift) & ((1 << 64 - shift) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 31) & ((1 << 33) - 1))


def dropped(key, rows, length, p, device, first=0):
    """bool[rows, length], True with probability p: rows first, first + 1, … of the mask that `key` stands for."""
    words = (length + 3) // 4
    x = torch.arange(first * words, (first + rows) * words, device=device)
    x = mix(x.mul_(-7046029254386353131).add_(key)).view(torch.int16)
    return (x < round(p * 65536) - 32768).view(rows, 4 * words)[:, :length]


def drop_mask(x, p):
    length = x.shape[-1] if x.ndim else 1
    key, rows = new_key(), x.numel() // max(1, length)
    if x.is_cuda:
        return dropped(key, rows, length, p, x.device).reshape(x.shape)
    step = max(1, CACHED // max(1, length))
    parts = [dropped(key, min(step, rows - r), length, p, x.device, r) for r in range(0, rows, step)]
    return torch.cat(parts).view(x.shape) if parts else torch.empty(x.shape, dtype=torch.bool)


def bernoulli_(x, p=0.5, generator=None):
    return x.copy_(~drop_mask(x, 1 - p))


def dropout(x, p, train):
    if not train or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = ~drop_mask(x, p)
    return x * (kept * (1.0 / (1.0 - p) if p < 1 else 0.0)), kept


def dropout_backward(dy, kept, scale):
    return dy * (kept * scale)


# ------------------------------------------------------------------------------------------ attention


def finite(x):
    """x with zeros for NaN and infinity, and x·0: 0 where a row is finite, NaN where it is not."""
    return torch.nan_to_num(x, 0.0, 0.0, 0.0), (x * 0.0).sum(-1, keepdim=True)


class Attention(torch.autograd.Function):
    """softmax(q @ k.T * scale + mask) @ v for q[N, T, D], k[N, S, D], v[N, S, E], row block by row block."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal, p, scale):
        with _disable_current_modes():
            key = new_key() if p > 0 else None
            out, lost, sums = attend(q.detach(), k.detach(), v.detach(), mask, causal, p, scale, key)
        ctx.save_for_backward(q, k, v, mask, out, sums)
        ctx.settings = causal, p, scale, key
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        with _disable_current_modes():
            q, k, v, mask, out, sums = ctx.saved_tensors
            return *attend_backward(dout, q, k, v, mask, out, sums, *ctx.settings), None, None, None, None


def head_grid(x, bits):
    """x[N, T, D] as integers, one grid for each of N, and the exponent of its step."""
    up, down = grid(magnitude(x, (1, 2)), bits)
    return (x * up).round_(), down


def prepare(q, k, scale):
    """q and k as factors whose products are minus the scores, in steps of 2^-16, exactly."""
    (q, _), (k, _) = finite(q), finite(k)
    bits = bits_for(q.shape[-1])
    q, q_down = head_grid(q * scale, bits)
    k, k_down = head_grid(k, bits)
    step = power_of_two((q_down + k_down - 1023 + 16).clamp_(1023 - 400, 1023 + 400))
    return q, k.mul_(-step)


def blocks(n, rows, columns, device):
    """Heads and rows of scores to compute at a time."""
    budget = (1 << 27) if device.type == "cuda" else 1 << 18
    heads = max(1, min(n, budget // (rows * columns)))
    step = rows if heads > 1 else max(1, min(rows, budget // columns))
    for head in range(0, n, heads):
        for row in range(0, rows, step):
            yield slice(head, min(n, head + heads)), slice(row, min(rows, row + step))


def weights_of(q, k, mask, causal, heads, rows):
    """Unnormalised attention weights of some heads and rows: integers of at most 2^20."""
    x = q[heads, rows] @ k[heads].mT
    if mask is not None:
        part = mask[heads, rows]
        x.masked_fill_(~part, math.inf) if part.dtype == torch.bool else x.sub_(part * 65536.0)
    if causal:
        r = torch.arange(rows.start, rows.stop, device=x.device)
        x.masked_fill_(torch.arange(x.shape[2], device=x.device) > r[:, None], math.inf)
    top = x.amin(2, keepdim=True).clamp_(max=1e300)
    x = x.sub_(top).clamp_(max=2.0**20 - 1)
    return look_up("weights", x.to(torch.int32))


def drop(x, key, heads, rows, length, p):
    for n, head in enumerate(range(heads.start, heads.stop)):
        first = head * length + rows.start
        x[n].masked_fill_(dropped(key, x.shape[1], x.shape[2], p, x.device, first), 0.0)
    return x


def attend(q, k, v, mask, causal, p, scale, key):
    n, length, count = len(q), q.shape[1], k.shape[1]
    poison = finite(q)[1] + finite(k)[1].sum(1, keepdim=True)
    qs, ks = prepare(q, k, scale)
    vs, rest = to_grid(v, 53 - 20 - (count - 1).bit_length(), -2)
    out = torch.empty(n, length, v.shape[2], dtype=q.dtype, device=q.device)
    sums = torch.empty(n, length, 1, dtype=q.dtype, device=q.device)
    for heads, rows in blocks(n, length, count, q.device):
        w = weights_of(qs, ks, mask, causal, heads, rows)
        torch.sum(w, 2, keepdim=True, out=sums[heads, rows])
        if key is not None:
            drop(w, key, heads, rows, length, p)
        out[heads, rows] = w @ vs[heads]
    sums.clamp_(min=1.0)
    if rest is not None:
        out.mul_(rest)
    out.div_(sums)
    if p > 0:
        out.mul_(1.0 / (1.0 - p) if p < 1 else 0.0)
    return out.add_(poison), poison, sums


def attend_backward(dout, q, k, v, mask, out, sums, causal, p, scale, key):
    n, length, count = len(q), q.shape[1], k.shape[1]
    keep = 1.0 / (1.0 - p) if 0 < p < 1 else 1.0
    dsum = total(dout * out, [2], True) / sums          # D / sum
    dout = dout / sums
    qs, ks = prepare(q, k, scale)
    q_, k_ = finite(q)[0] * scale, finite(k)[0]
    g, rest_g = to_grid(dout * keep, bits_for(v.shape[2]), -1)
    vt, rest_v = to_grid(v, bits_for(v.shape[2]), -1)
    gv, rest_gv = to_grid(dout * keep, 53 - 20 - (length - 1).bit_length(), -2)
    bits = bits_for(max(length, count))
    qb, rest_q = to_grid(q_, bits, -2)
    kb, rest_k = to_grid(k_, bits, -2)
    dq, dk, dv = torch.empty_like(qb), torch.empty_like(kb), torch.empty_like(vt)
    for head in range(n):
        one = slice(head, head + 1)
        ds = torch.empty(1, length, count, dtype=q.dtype, device=q.device)
        dv[one] = 0
        for _, rows in blocks(1, length, count, q.device):
            w = weights_of(qs, ks, mask, causal, one, rows)
            d = g[one, rows] @ vt[one].mT
            if rest_g is not None:
                d.mul_(rest_g[one, rows])
            if rest_v is not None:
                d.mul_(rest_v[one].mT)
            if key is None:
                wd = w
            else:
                lost = dropped(key, w.shape[1], count, p, q.device, head * length + rows.start)
                d[0].masked_fill_(lost, 0.0)
                wd = w.clone()
                wd[0].masked_fill_(lost, 0.0)
            dv[one] += wd.mT @ gv[one, rows]
            ds[:, rows] = d.sub_(dsum[one, rows]).mul_(w)
        up, down = grid(magnitude(ds, (1, 2)), bits)
        ds.mul_(up).round_()
        down = power_of_two(down)
        dq[one] = (ds @ kb[one]).mul_(down)
        dk[one] = (ds.mT @ qb[one]).mul_(down)
    for d, rest in ((dq, rest_k), (dk, rest_q), (dv, rest_gv)):
        if rest is not None:
            d.mul_(rest)
    poison = finite(q)[1].sum(1, keepdim=True) + finite(k)[1].sum(1, keepdim=True)
    return dq.mul_(scale).add_(poison), dk.add_(poison), dv.add_(poison)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention, in exact arithmetic where the calling thread is in an Exact context."""
    if not any(isinstance(mode, Exact) for mode in _get_current_dispatch_mode_stack()):
        return torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if query.dtype != torch.float64 or (attn_mask is not None and attn_mask.requires_grad) or 0 in query.shape:
        return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    q, k, v = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*lead, q.shape[1], k.shape[1]).reshape(-1, q.shape[1], k.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Attention.apply(q, k, v, attn_mask, is_causal, dropout_p, scale).view(*lead, q.shape[1], v.shape[2])


# --------------------------------------------------------------------------------- table of operations


def div(x, y, rounding_mode=None):
    if rounding_mode is not None:
        raise NotImplementedError("exact arithmetic has no rule for division with rounding_mode")
    device = x.device if not isinstance(y, torch.Tensor) or x.ndim or not y.ndim else y.device
    x = x.to(device)
    y = torch.as_tensor(y, device=device)
    if not (x.is_floating_point() or y.is_floating_point()):
        x = x.to(torch.float64)
    dtype = torch.result_type(x, y)
    x, y = torch.broadcast_tensors(x.to(dtype), y.to(dtype))
    return x / y


def add(x, y, alpha=1):
    return x + (y if alpha == 1 else y * alpha)


def sub(x, y, alpha=1):
    return x - (y if alpha == 1 else y * alpha)


def rsub(x, y, alpha=1):
    return y - (x if alpha == 1 else x * alpha)


def power(x, n):
    if n in (0.5, -0.5):
        return sqrt(x) if n > 0 else reciprocal(sqrt(x))
    if n not in (-2, -1, 1, 2, 3):
        raise NotImplementedError(f"exact arithmetic has no rule for the power {n}: only -2, -1, -0.5, 0.5, 1, 2, 3")
    y = {1: lambda: x.clone(), 2: lambda: x * x, 3: lambda: x * x * x}[abs(n)]()
    return y if n > 0 else reciprocal(y)


def reciprocal(x):
    return torch.ones_like(x) / x


def lerp(x, y, w):
    return x + (y - x) * w


def addcmul(x, a, b, value=1):
    return x + (a * b if value == 1 else a * b * value)


def addcdiv(x, a, b, value=1):
    return x + (div(a, b) if value == 1 else div(a, b) * value)


def embedding_backward(dy, index, count, padding_idx, scale_by_freq):
    if scale_by_freq:
        raise NotImplementedError("exact arithmetic has no rule for scale_grad_by_freq")
    out = index_add(dy.new_zeros(count, dy.shape[-1]), 0, index.reshape(-1), dy.reshape(-1, dy.shape[-1]))
    if padding_idx >= 0:
        out[padding_idx] = 0
    return out


def scattered(x, source, count, scatter):
    """x plus sums of source's values, by `scatter` of integers into zeros."""
    if source.numel() == 0:
        return x.clone()
    up, down = grid(magnitude(source, list(range(source.ndim))), min(50, 53 - (max(1, count) - 1).bit_length()))
    up, down = up.view(()), power_of_two(down).view(())
    return x + scatter(torch.zeros_like(x), (source * up).round_()) * down


def index_add(x, dim, index, source, alpha=1):
    source = source if alpha == 1 else source * alpha
    return scattered(x, source, index.numel(), lambda zeros, s: zeros.index_add(dim, index, s))


def scatter_add(x, dim, index, source):
    return scattered(x, source, source.numel(), lambda zeros, s: zeros.scatter_add(dim, index, s))


def index_put(x, indices, values, accumulate=False, unsafe=False):
    if not accumulate:
        return x.index_put(indices, values)
    count = max(1, math.prod(torch.broadcast_shapes(*(i.shape for i in indices if i is not None))))
    return scattered(x, values, count, lambda zeros, s: zeros.index_put(indices, s, accumulate=True))


def uniform_(x, low=0.0, high=1.0, generator=None):
    if x.is_cuda:
        raise NotImplementedError("a GPU's random numbers are not a CPU's: draw on the CPU and move them")
    return x.uniform_(0, 1, generator=generator).mul_(high - low).add_(low)


RULES = {
    "mm": product, "bmm": product, "addmm": addmm, "baddbmm": addmm, "addbmm": None,
    "mv": lambda a, b: product(a, b[:, None])[:, 0], "dot": lambda a, b: product(a[None], b[:, None])[0, 0],
    "vdot": lambda a, b: product(a[None], b[:, None])[0, 0],
    "convolution": convolution, "_convolution": convolution, "convolution_backward": convolution_backward,
    "sum": sum_, "mean": mean, "var": variance, "std": lambda *a, **k: sqrt(variance(*a, **k)),
    "linalg_vector_norm": norm,
    "sqrt": sqrt, "rsqrt": lambda x: reciprocal(sqrt(x)), "exp": exp, "log": log, "gelu": gelu,
    "gelu_backward": gelu_backward, "sigmoid": sigmoid,
    "sigmoid_backward": lambda dy, y: dy * (y * (1.0 - y)), "tanh": tanh,
    "tanh_backward": lambda dy, y: dy * (1.0 - y * y), "silu": silu, "silu_backward": silu_backward,
    "_softmax": softmax, "_safe_softmax": safe_softmax, "_softmax_backward_data": softmax_backward,
    "_log_softmax": log_softmax, "_log_softmax_backward_data": log_softmax_backward, "logsumexp": logsumexp,
    "nll_loss_forward": nll_loss, "nll_loss_backward": nll_loss_backward,
    "mse_loss": mse_loss, "mse_loss_backward": mse_loss_backward,
    "native_layer_norm": layer_norm, "native_layer_norm_backward": layer_norm_backward,
    "native_group_norm": group_norm, "native_group_norm_backward": group_norm_backward,
    "bernoulli_": bernoulli_, "native_dropout": dropout, "native_dropout_backward": dropout_backward,
    "uniform_": uniform_,
    "add": add, "sub": sub, "rsub": rsub, "div": div, "true_divide": div, "pow": power, "reciprocal": reciprocal,
    "square": lambda x: x * x, "lerp": lerp, "addcmul": addcmul, "addcdiv": addcdiv,
    "embedding_dense_backward": embedding_backward, "index_add": index_add, "scatter_add": scatter_add,
    "index_put": index_put, "_index_put_impl_": None,
}
RULES = {name: rule for name, rule in RULES.items() if rule}
ANY_FLOAT = {"add", "sub", "rsub", "div", "true_divide", "reciprocal", "index_put", "uniform_"}
PASS = set("""
view _unsafe_view transpose t permute expand unsqueeze squeeze select slice split split_with_sizes unsafe_split
unsafe_split_with_sizes chunk unbind clone detach alias as_strided reshape _reshape_alias view_as expand_as unfold
narrow movedim diagonal flip roll repeat contiguous cat stack concat tril triu constant_pad_nd select_backward
slice_backward select_scatter slice_scatter as_strided_scatter repeat_interleave flatten unflatten
empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros ones ones_like new_ones full
full_like new_full fill zero scalar_tensor arange eye copy _to_copy lift lift_fresh lift_fresh_copy set resize
_local_scalar_dense is_same_size is_pinned _pin_memory pin_memory record_stream item _has_same_storage_numel
neg abs mul sign sgn relu leaky_relu leaky_relu_backward threshold threshold_backward hardtanh hardtanh_backward
clamp clamp_min clamp_max clip maximum minimum fmax fmin amax amin max min aminmax argmax argmin round floor ceil
trunc where masked_fill masked_scatter masked_select index index_select gather scatter take embedding index_fill
index_copy eq ne lt le gt ge equal isnan isinf isfinite logical_and logical_or logical_not logical_xor all any
is_nonzero nonzero nan_to_num random randint randperm randint_like copysign signbit heaviside
""".split())


# ----------------------------------------------------------------------------------------------- mode


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


class Exact(TorchDispatchMode):
    """A context in which float64 torch programs give the same bits on any machine."""

    def __init__(self):
        super().__init__()
        self.entered = []

    def __enter__(self):
        stack = contextlib.ExitStack()
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        torch.set_flush_denormal(False)
        F.scaled_dot_product_attention = attention
        self.entered.append(stack)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.entered.pop().close()
        _kept.clear()

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        floats = [t for t in tensors_in((*args, *kwargs.values())) if t.is_floating_point() or t.is_complex()]
        space, name = func._schema.name.split("::")
        changes = name.endswith("_") and not name.endswith("__")
        plain = name[:-1] if changes and name not in RULES else name
        if space == "aten" and plain in RULES and (floats or plain in ("div", "true_divide", "mean")):
            if plain not in ANY_FLOAT and any(t.dtype != torch.float64 for t in floats):
                raise TypeError(f"exact arithmetic is for float64: {func} got {floats[0].dtype}")
            out = kwargs.pop("out", None)
            result = RULES[plain](*args, **kwargs)
            if changes and plain != name:
                return args[0].copy_(result)
            return result if out is None else out.resize_(result.shape).copy_(result)
        if space != "aten" or plain in PASS or not floats and "rand" not in name and "normal" not in name:
            return func(*args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        hint = ": pass foreach=False (and fused=False)" if "foreach" in name or "fused" in name else ""
        raise NotImplementedError(f"no exact arithmetic for {func}{hint}; to add one, write a function of its arguments "
                                  "with this file's sums and products and enter it in RULES")


def check(device="cpu"):
    """Raise ArithmeticError, naming the operation, where this machine's arithmetic is not what this file needs."""
