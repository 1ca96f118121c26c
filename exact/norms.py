"""Layer norm and group norm."""

import math

import torch

from exact.gpu import kernels
from exact.grids import in_slices, reciprocal, rows_of, sqrt
from exact.sums import mean, sum_bits, total


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

    outer, count = x.shape[:x.ndim - len(shape)], math.prod(shape)
    if (fast := kernels(x.device)) and count > 1:
        w, b = (t if t is None else t.contiguous() for t in (w, b))
        out, m, r = fast.norm(x.reshape(-1, count), w, b, eps, sum_bits(count))
    else:
        out, m, r = norm_forward(x, math.prod(outer), eps, affine)
    return out.view(x.shape), *(t.view(*outer, *[1] * len(shape)) for t in (m, r))


def group_norm(x, w, b, batch, channels, length, groups, eps):
    def affine(y, part):
        group = torch.arange(part.start, part.stop, device=y.device) % groups
        y = y.view(len(y), channels // groups, -1)
        y = y if w is None else y.mul_(w.view(groups, -1, 1)[group])
        return y if b is None else y.add_(b.view(groups, -1, 1)[group])

    count = channels // groups * length
    if (fast := kernels(x.device)) and count > 1:
        w, b = (t if t is None else t.contiguous() for t in (w, b))
        out, m, r = fast.norm(x.reshape(-1, count), w, b, eps, sum_bits(count), groups,
                              channels // groups, length)
    else:
        out, m, r = norm_forward(x, batch * groups, eps, affine)
    return out.view(x.shape), m.view(batch, groups), r.view(batch, groups)


def layer_norm_backward(dy, x, shape, m, r, w, b, mask):
    dims, count = list(range(x.ndim - len(shape), x.ndim)), math.prod(shape)
    if (fast := kernels(x.device)) and 1 < count <= 8192:
        dx, terms = fast.norm_backward(
            *(None if t is None else t.contiguous() for t in (dy, x, w, m, r)), count,
            sum_bits(count))
    else:
        h = (x - m).mul_(r)
        g, terms = dy if w is None else dy * w, dy * h if mask[1] else None
        dx = (g - mean(g, dims, True)).sub_(h * mean(g * h, dims, True)).mul_(r)

    def over_rows(terms):
        return total(terms.reshape(-1, count), 0).view(shape)

    return dx, over_rows(terms) if mask[1] else None, over_rows(dy) if mask[2] else None
