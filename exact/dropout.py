"""Dropout, whose masks are a hash of the position."""

import importlib
import math

import torch

from exact.gpu import kernels
from exact.grids import in_slices, rows_of


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
    if kernels(device) and rows * length:
        module = importlib.import_module("exact.attention_kernels")
        return module.kept_mask(seed, rows, length, p, device).view(shape)
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
    return torch.mul(dy, kept).mul_(scale)
