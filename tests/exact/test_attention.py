"""Tests of attention: close to plain float64, visibly wrong where an operand is, and by kernels the
same bits."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import test_kernels
from exact import Exact, attention
from exact.dropout import dropped, kept_mask


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operands(heads, queries, keys, size, size_v=None, size_of_scores=1.0):
    """q, k, v and the gradient of the output."""
    size_v = size_v or size
    return (draw(heads, queries, size) * size_of_scores, draw(heads, keys, size, seed=1),
            draw(heads, keys, size_v, seed=2), draw(heads, queries, size_v, seed=3))


def both_ways(q, k, v, dout, p=0.0, seed=None):
    """The output, rows' largest scores and sums of weights, and the gradients of q, k and v."""
    scale = q.shape[2] ** -0.5
    out = attention.attention_forward(q, k, v, None, False, p, scale, seed)
    gradients = attention.attention_backward(dout, q, k, v, None, *out, False, p, scale, seed)
    return *out, *gradients


def plain(q, k, v, dout, p=0.0, seed=None):
    """The output and the gradients of q, k and v in torch's float64, of the same dropout."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    weights = (q @ k.mT * q.shape[2] ** -0.5).softmax(-1)
    if seed is not None:
        rows, keys = q.shape[0] * q.shape[1], k.shape[1]
        lost = dropped(seed, 0, rows, keys, p, q.device).view(weights.shape)
        weights = weights * ~lost / (1 - p)
    out = weights @ v
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad


def error(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("size_of_scores", [0.01, 1.0, 5.0])
def test_close_to_float64(p, size_of_scores, compared):
    for shape in ((2, 70, 90, 64), (3, 130, 40, 16, 48), (1, 600, 500, 32)):
        tensors = operands(*shape, size_of_scores=size_of_scores)
        seed = 5 if p else None
        out, _, _, *gradients = both_ways(*tensors, p, seed)
        errors = [error(*pair) for pair in zip((out, *gradients), plain(*tensors, p, seed))]
        assert errors[0] < 2e-5 and max(errors) < 5e-5, (shape, errors)
    compared(12, "tensors")


def test_weights(compared):
    """2^-x to half a unit and the series' error; no product of the tables lies halfway between two
    integers; what is far below the largest is 0."""
    high, low = attention.exponentials(torch.device("cpu"))
    for part in high.split(256):
        products = part[:, None] * low
        assert not ((products * 2).round() == products * 2)[products % 1 != 0].any()
    x = torch.arange(0, len(high) * len(low), 997)
    weights = (high[x >> 11] * low[x & 2047]).round()
    assert (weights - torch.exp2(x / -2.0**18) * 2.0**20).abs().max() < 0.7
    assert high[0] * low[0] > 2.0**20 - 0.5 and high[-1] * low[-1] < 0.5
    compared(len(x), "weights")


def test_what_is_not_finite_stays_visible_and_where_it_is(compared):
    """NaN, infinity and what is beyond 2^400: in q in its row, in k in its head, in v in its head's
    column; and in all gradients of that head."""
    places = {"q": (0, (0, 3)), "k": (1, (0,)), "v": (2, (0, slice(None), 5)), "dout": (3, None)}
    for name, (which, hit) in places.items():
        for bad in (math.nan, math.inf, -math.inf, 1e200):
            tensors = operands(2, 20, 30, 16)
            tensors[which][0, 3, 5] = bad
            out, _, _, *gradients = both_ways(*tensors)
            expected = torch.zeros_like(out, dtype=torch.bool)
            if hit and (name, bad) != ("v", 1e200):  # that unit is bounded for gradients only
                expected[hit] = True
            assert torch.equal(out.isnan(), expected), name
            for gradient in gradients:
                assert gradient[0].isnan().all() and gradient[1].isfinite().all(), name
    compared(16, "operands with one bad number")


def test_zeros_and_small_numbers(compared):
    q, k, v, dout = operands(2, 20, 30, 16)
    mean = v.mean(1, keepdim=True)
    for factor in (0.0, 1e-200, 5e-324):
        out, _, _, *gradients = both_ways(q * factor, k, v, dout)
        assert error(out, mean.expand_as(out)) < 5e-6
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not any(each.any() for each in both_ways(q, k, v, dout * 0)[3:])
    out, *_ = both_ways(q * 1e60, k * 1e50, v, dout)  # the largest score takes all
    assert error(out, v.gather(1, (q @ k.mT).argmax(2, keepdim=True).expand_as(out))) < 5e-6
    compared(4, "outputs")


def test_heads_and_threads_do_not_matter(monkeypatch, compared):
    tensors, threads = operands(3, 50, 60, 16), torch.get_num_threads()
    expected, found = both_ways(*tensors, 0.1, 7), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(both_ways(*tensors, 0.1, 7))
    torch.set_num_threads(threads)
    monkeypatch.setattr(attention, "LARGE", 1000)  # rows of a head in several parts
    found.append(both_ways(*tensors, 0.1, 7))
    monkeypatch.setattr(attention, "parts_of", lambda length, *_: (3, [slice(0, length)]))
    found.append(both_ways(*tensors, 0.1, 7))
    for other in found:
        assert all(torch.equal(a, b) for a, b in zip(expected, other))
    assert not torch.equal(expected[0], both_ways(*tensors, 0.1, 8)[0])
    compared(len(found), "ways to compute it")


def test_masks_scales_and_groups_of_heads(compared):
    """As torch's own scaled_dot_product_attention has them."""
    q, k, v, _ = operands(4, 20, 30, 16)
    kept = draw(20, 30, seed=4) > 0
    kept[0], kept[1:, 0] = False, True
    calls = ({"attn_mask": kept[1:]}, {"attn_mask": draw(19, 30, seed=5)}, {"is_causal": True},
             {"scale": 0.7}, {"attn_mask": torch.where(kept[1:], 0.0, -math.inf).double()})
    for options in calls:
        expected = F.scaled_dot_product_attention(q[:, 1:], k, v, **options)
        with Exact():
            assert error(F.scaled_dot_product_attention(q[:, 1:], k, v, **options), expected) < 5e-6
    with Exact():
        alone = F.scaled_dot_product_attention(q[None], k[None, :2], v[None, :2], enable_gqa=True)
        out = F.scaled_dot_product_attention(q, k, v, kept)
    assert not out[:, 0].any()  # a row without keys
    expected = F.scaled_dot_product_attention(q, k[[0, 0, 1, 1]], v[[0, 0, 1, 1]])
    assert error(alone[0], expected) < 5e-6
    compared(len(calls) + 2, "calls")


# ----------------------------------------------------------------- kernels, by test_kernels' means


def edges():
    q, k, v, dout = operands(2, 7, 5, 64)
    q[0, 1], k[1, 2], v[1, :, 3], dout[0, 4] = 0.0, 0.0, 0.0, 0.0
    q[0, 2] *= 1e6
    v[0, 0] *= 1e9
    return q, k, v, dout


def not_finite():
    tensors = operands(6, 3, 4, 16)
    bad = (0, math.nan), (1, math.inf), (2, -math.inf), (3, math.nan), (1, 1e200), (2, 5e-324)
    for head, (which, number) in enumerate(bad):
        tensors[which][head, 2, 1] = number
    return tensors


def mask(*shape):
    torch.manual_seed(1)
    return kept_mask(shape, 0.3, torch.device("cpu")).double()


CASES = {
    "one number": lambda: both_ways(*operands(1, 1, 1, 1)),
    "several blocks": lambda: both_ways(*operands(1, 70, 66, 20, 40), 0.1, 1 << 60),
    "edges": lambda: both_ways(*edges(), 0.5, 3), "not finite": lambda: both_ways(*not_finite()),
    "all lost": lambda: both_ways(*operands(1, 3, 6, 128, 8), 1.0, 11),
    "masks": lambda: (mask(3, 7), mask(5, 2, 8), mask(2, 2000), mask(9)),
    "too long": lambda: both_ways(*operands(1, 2, 129, 16)),
}


def in_interpreter():
    return test_kernels.in_interpreter(CASES)


def compiled():
    return test_kernels.compiled({"": lambda: both_ways(*operands(1, 5, 5, 32), 0.1, 1 << 60)})


def test_the_interpreter_gives_the_bits_of_float64(tmp_path, compared):
    found = test_kernels.run("in_interpreter", tmp_path, __file__, TRITON_INTERPRET="1")
    assert found == list(CASES)
    compared(len(CASES), "operations")


def test_kernels_compile(tmp_path, compared):
    found = test_kernels.run("compiled", tmp_path, __file__)
    for capability, name, shared, unsafe in found:
        assert shared <= test_kernels.TARGETS[capability] and not unsafe, (capability, name)
    assert {name for capability, name, *_ in found if capability == 90} >= {
        "forward_kernel", "gradient_kernel", "rows_kernel"}
    compared(len(found), "compiled kernels")


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
