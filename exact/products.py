"""Products and convolutions of operands on grids."""

import torch
import torch.nn.functional as F

from exact.gpu import kernels
from exact.grids import bits_for, grid, in_slices, magnitude, scaled, to_grid
from exact.sums import total


def product(a, b, bias=None):
    """a @ b (+ bias[N]) for a[…, M, K] and b[…, K, N]: a grid for each row of a and each column
    of b."""
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise RuntimeError(f"no product of shapes {list(a.shape)} and {list(b.shape)}")
    bits = bits_for(a.shape[-1])
    if (fast := kernels(a.device)) and a.shape[:-2].numel() <= 1024:
        return fast.product(a, b, bits, bias)
    (a, rest_a), (b, rest_b) = to_grid(a, bits, -1), to_grid(b, bits, -2)
    # + 0.0 makes -0 a 0: the sign of a zero sum follows the order of its terms
    return scaled(a @ b, rest_a, rest_b).add_(0.0 if bias is None else bias + 0.0)


def addmm(c, a, b, *, beta=1, alpha=1):
    if c.ndim == 1 and b.ndim == 2 and len(c) == b.shape[-1] and alpha == beta == 1:
        return product(a, b, c)
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
    """How many whole BLOCKs of frames to compute at a time, if one takes up to `terms` values."""
    return BLOCK * max(1, (1 << 21 if x.device.type == "cpu" else 1 << 27) // (BLOCK * terms))


def convolution(x, w, bias, stride, padding, dilation, transposed=False, _output_padding=0,
                groups=1):
    """Conv1d as products of windows: x[B, C, L], w[O, C / groups, kernel], bias[O] → [B, O, T].
    What a BLOCK of frames sees is on one grid."""
    if x.ndim != 3 or transposed:
        raise NotImplementedError("exact arithmetic has one convolution, Conv1d")
    outputs, channels, kernel = w.shape
    stride, dilation, bits = stride[0], dilation[0], bits_for(channels * kernel)
    frames = (x.shape[2] + 2 * padding[0] - dilation * (kernel - 1) - 1) // stride + 1
    if frames < 1:
        raise RuntimeError(f"a kernel of {kernel} is longer than its input of {x.shape[2]}")
    fast = kernels(x.device) if dilation == 1 and channels * kernel <= 1 << 15 else None
    if fast and len(x) * groups <= 1024:
        return fast.convolution(x, w, bias, bits, stride, padding[0], frames, groups, BLOCK)
    w, rest_w = to_grid(w.flatten(1), bits, -1)
    w = w.view(outputs, channels, kernel).transpose(1, 2).reshape(groups, -1, kernel * channels)
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
        step = frames_of(x, max(channels * kernel * groups, outputs))
        in_slices(convolve, frames, step, x.device)
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
