"""Sums, means, norms and scattered additions of terms on one grid."""

import math

import torch

from exact.gpu import kernels
from exact.grids import grid, in_slices, magnitude, rows_of, sqrt

aten = torch.ops.aten


def listed(x, dim):
    """A `dim` argument (None or []: all) as a list of dimensions from 0."""
    dims = range(x.ndim) if dim is None or dim == [] or dim == () else dim
    return sorted(d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)) if x.ndim else []


def without(x, dims, keepdim):
    return x if keepdim else x.reshape([n for d, n in enumerate(x.shape) if d not in dims])


def sum_bits(count):
    """Bits for each term, such that a sum of `count` terms is an integer of at most 2^53."""
    return min(50, 53 - (max(count, 1) - 1).bit_length())


def by_rows(kernel, x, dims, keepdim):
    """kernel(x[R, K], bits) → [R], over dims of x."""
    stay = [d for d in range(x.ndim) if d not in dims]
    count = math.prod(x.shape[d] for d in dims)
    found = kernel(x.permute(*stay, *dims).reshape(-1, count), sum_bits(count))
    return found.view([1 if d in dims else n for d, n in enumerate(x.shape) if keepdim
                       or d not in dims])


def total(x, dim=None, keepdim=False, dtype=None):
    """The sum over dim: of integers of 53 - log2(count) bits. Adding 0.0, here and below, makes a
    -0 a 0: the sign of a sum of -0s follows where its addition begins."""
    if dtype not in (None, torch.float64):
        raise NotImplementedError(f"exact arithmetic sums in float64, not in {dtype}")
    dims = listed(x, dim)
    count = math.prod(x.shape[d] for d in dims)
    if count == 1:
        return without(x.clone(), dims, keepdim)
    if fast := kernels(x.device):
        return by_rows(fast.total, x, dims, keepdim)
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
    # the kernel gives a row to one program: too much for longer ones, whose sum programs share
    if (fast := kernels(x.device)) and 1 < math.prod(x.shape[d] for d in dims) <= 1 << 20:
        return by_rows(fast.vector_norm, x, dims, keepdim)
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
