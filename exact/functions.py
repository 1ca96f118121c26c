"""Functions out of tables and short polynomials: exp, log, the normal distribution and theirs."""

import functools
import math

import numpy as np
import torch

from exact.gpu import kernels
from exact.grids import div, elementwise, power_of_two
from exact.sums import total


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
    else:  # of -8.5, … 8.5 in steps of 2^-8; beyond, the distribution is 0 or 1
        x = np.arange(-2176, 2177) / 256
        inside = np.abs(x) < 8.5
        density = np_exp(-0.5 * x * x) * 0.3989422804014327
        values = np.where(inside, np_normal(x), x > 0) if name == "normal" else density * inside
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(device)


def look_up(name, index):
    return table(name, index.device).index_select(0, index.flatten()).view(index.shape)


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
    steps = (y * 256.0).round_()
    centre = steps * 2.0**-8
    # NaN: anything
    return centre, y.sub_(centre), steps.add_(2176.0).to(torch.int32).clamp_(0, 4352)


@elementwise
def gelu_in_slices(x):
    centre, r, place = near_normal(x)
    s = centre.mul_(-0.5).mul_(r).add_(1.0).mul_(r)
    return s.mul_(look_up("density", place)).add_(look_up("normal", place)).mul_(x)


@elementwise
def gelu_backward_in_slices(dy, x):
    c, r, place = near_normal(x)
    s = (c * -0.5).mul_(r).add_(1.0).mul_(r)
    t = (c * c).sub_(1.0).mul_(0.5).mul_(r).sub_(c).mul_(r).add_(1.0)
    slope = t.mul_(x).add_(s).mul_(look_up("density", place)).add_(look_up("normal", place))
    return slope.mul_(dy)


def gelu(x):
    """x·Φ(x). Around the nearest c of the table Φ is Φ(c) + φ(c)·s, s = r - cr²/2, with r = x - c,
    to 5e-10."""
    if fast := kernels(x.device):
        return fast.gelu(x, table("normal", x.device), table("density", x.device))
    return gelu_in_slices(x)


def gelu_backward(dy, x):
    """dy·(Φ + x·φ), with φ = φ(c)·t, t = 1 - cr + (c² - 1)r²/2."""
    if fast := kernels(x.device):
        return fast.gelu_backward(dy, x, table("normal", x.device), table("density", x.device))
    return gelu_backward_in_slices(dy, x)


def sigmoid(x):
    e = exp(-x.abs())
    return torch.where(x < 0, e, 1.0) / (e + 1.0)


def tanh(x):
    e = exp(x.abs() * -2.0)
    return torch.copysign((1.0 - e) / (e + 1.0), x)


def softmax(x, dim, *_):
    e = exp(x - x.amax(dim, keepdim=True))
    return div(e, total(e, dim, True))
