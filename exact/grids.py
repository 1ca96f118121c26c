"""Numbers on grids of powers of two, and the slices in which rows of them are computed."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

# float64 values that a chain of operations takes at a time: fewer are not worth handing to a
# thread, more do not stay in a cache
CACHED = 1 << 17

# ------------------------------------------------------------------------------------------- slices


@functools.cache
def workers(threads, process):
    """Threads that use one CPU thread each inside torch. `process`: after a fork they are gone."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def in_slices(work, count, step, device):
    """Call work(slice) for slices of `step` rows of `count`, independent of each other. On a CPU
    threads share them out; a GPU takes them one after another."""
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
    """Bits for each factor, such that a sum of `count` products is an integer of at most 2^53; and
    at most 23, which three signed bytes hold (exact/kernels.py)."""
    return min(23, (53 - (count - 1).bit_length()) // 2)


def magnitude(x, dims):
    """The largest |x| over dims, which stay with length 1; NaN where there is a NaN."""
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))


def power_of_two(exponent):
    """2.0 ** (exponent - 1023) for int64 exponents from 1 to 2046: float64's own exponent field."""
    return (exponent << 52).view(torch.float64)


def grid(top, bits):
    """Powers of two (up, down, rest) for numbers of magnitude up to `top`: |x·up| <= 2^bits · (1 -
    2^-7), at 23 bits the largest integer of three signed bytes, and up·down·rest = 1. `down` is
    kept within 2^±200, lest a product of two is out of range; what that leaves, nearly always 1, is
    `rest`. A `top` below 2^(bits - 1023) counts as that. If it is NaN or infinity, `rest` is NaN:
    so is what is computed with any of these numbers."""
    # float64 without its fraction, if that is below 1 - 2^-6, else the next power of two
    exponent = top.contiguous().view(torch.int64).add(1 << 46) & -(1 << 52)
    down = exponent.view(torch.float64).clamp_(2.0 ** (bits - 1023), 2.0**1023)
    down.mul_(2.0 ** (1 - bits))
    near = down.clamp(2.0**-200, 2.0**200)
    return torch.ones_like(down).div_(down), near, (down / near).add_(top - top)


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


# ------------------------------------------------------------------------------- single operations


def sqrt(x):
    """numpy's on a CPU, since torch's is not correctly rounded there."""
    if x.device.type != "cpu":
        return torch.sqrt(x)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.detach().contiguous().numpy()))).view(x.shape)


def div(x, y):
    """A division of tensors: by a number, CUDA would multiply with its reciprocal."""
    dtype = torch.result_type(x, y)
    dtype = dtype if dtype.is_floating_point else torch.float64
    device = y.device if isinstance(y, torch.Tensor) and not x.ndim else x.device
    y = (y.to(device, dtype) if isinstance(y, torch.Tensor)
         else torch.full((), y, dtype=dtype, device=device))  # a copy from the host would wait
    x, y = torch.broadcast_tensors(x.to(device, dtype), y)
    return x / y


def reciprocal(x):
    return torch.ones_like(x) / x
