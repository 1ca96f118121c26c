"""Tests of exact/: close to plain float64, and the same bits however it is computed."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import library, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from exact import Exact, check, dropout, gpu, grids, mode, norms, products, sums
from exact.check import CASES, IN_FLOAT64, LARGE, answers


def draw(*shape, seed=0):
    """Inside Exact, since torch's own numbers follow the CPU's vectors."""
    generator = torch.Generator().manual_seed(seed)
    with Exact():
        return torch.randn(*shape, generator=generator, dtype=torch.float64)


def digest(*tensors):
    arrays = [t.detach().contiguous().numpy() for t in tensors]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def error(ours, plain):
    return ((ours - plain).abs().max() / plain.abs().max().clamp_min(1e-300)).item()


X, W, V = draw(3, 50, 64), draw(90, 64, seed=1), draw(64, seed=2)
Q, K, KERNEL = draw(2, 4, 70, 16, seed=3), draw(2, 4, 70, 16, seed=4), draw(20, 10, 4, seed=5)
DIRECTION = draw(50000, seed=9)
TARGET = torch.arange(150) % 64


def batch_norm(x, w):
    """The output and the running statistics."""
    norm = nn.BatchNorm1d(50).double()
    y = torch.func.functional_call(norm, {"weight": w, "bias": w}, x)
    return torch.cat([y.flatten(), norm.running_mean, norm.running_var])


RULES = {  # function, arguments, bound of the relative error of results and gradients
    "linear": (F.linear, (X, W, W[:, 0]), 2e-6),
    "matmul": (lambda a, b: a @ b.mT, (Q, K), 2e-6),
    "mv": (lambda a, b: a @ b, (W, V), 2e-6),
    "conv1d": (lambda x, w: F.conv1d(x, w, stride=2, padding=3, dilation=2, groups=5),
               (X, KERNEL), 2e-6),
    "conv1d, mostly padding": (lambda x, w: F.conv1d(x[..., :3], w, padding=150, groups=5),
                               (X, KERNEL), 2e-6),
    "conv1d, one channel": (lambda x, w: F.conv1d(x, w, stride=5),
                            (draw(2, 1, 900), draw(9, 1, 10)), 2e-6),
    "sum": (lambda x: x.sum((0, 2)), (X,), 1e-11), "mean": (lambda x: x.mean(1), (X,), 1e-11),
    "var": (lambda x: x.var(1), (X,), 1e-11), "std": (lambda x: x.std(), (X,), 1e-11),
    "norm": (lambda x: x.norm(dim=1), (X,), 1e-11),
    "logsumexp": (lambda x: x.logsumexp(1), (X,), 1e-11),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (64,), w, b), (X, V, W[0]), 1e-11),
    "layer norm of all": (lambda x, w: F.layer_norm(x, (50, 64), w, w), (X[0], W[:50]), 1e-11),
    "group norm": (lambda x, w: F.group_norm(x, 10, w, w), (X, V[:50]), 1e-11),
    "gelu": (F.gelu, (X * 2,), 1e-8), "exp": (torch.exp, (X * 9,), 1e-14),
    "log": (torch.log, (X.abs(),), 1e-14), "sqrt": (torch.sqrt, (X.abs(),), 1e-15),
    "sigmoid": (torch.sigmoid, (X * 5,), 1e-14), "tanh": (torch.tanh, (X * 2,), 1e-14),
    "silu": (F.silu, (X * 5,), 1e-14), "leaky relu": (F.leaky_relu, (X,), 0),
    "softmax": (lambda x: x.softmax(2), (X,), 1e-11),
    "log softmax": (lambda x: x.log_softmax(1), (X,), 1e-11),
    "cross entropy": (lambda x: F.cross_entropy(x.view(150, 64), TARGET, label_smoothing=0.1),
                      (X,), 1e-11),
    "mse": (lambda x: F.mse_loss(x, X.flip(1)), (X * 2,), 1e-11),
    "embedding": (lambda w: F.embedding(TARGET % 7, w), (W,), 1e-11),
    "cross entropy, 3-D": (
        lambda x: F.cross_entropy(x, TARGET[:64].expand(3, 64) % 50, V.abs()[:50], ignore_index=2),
        (X,), 1e-11),
    "indexing": (lambda w: w[TARGET % 7], (W,), 1e-11),
    "indexing of columns": (lambda x: x[:, TARGET % 7] * x[..., 1:2, :], (X,), 1e-11),
    "attention": (F.scaled_dot_product_attention, (Q, K, K * 2), 2e-5),
    "causal attention": (lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True),
                         (Q, K), 2e-5),
    "masked attention": (lambda q, k: F.scaled_dot_product_attention(
        q, k, k, Q[0, 0] @ K[0, 0].T > 0), (Q, K), 2e-5),
    "attention by hand": (lambda q, k: (q @ k.mT).softmax(-1) @ k, (Q, K), 2e-5),
    "division": (lambda x: x / 3.0 + 1.0 / (x.abs() + 1), (X,), 1e-15),
    # taken apart as torch's table says
    "batch norm": (batch_norm, (X, V[:50]), 1e-11),
    "batch norm, evaluation": (lambda x, w: F.batch_norm(x, V[:50], V[:50]**2, w, w),
                               (X, V[:50]), 1e-11),
    "group norm off centre": (lambda x, w: F.group_norm(x + 1000.0, 10, w, w), (X, V[:50]), 1e-9),
    "gelu by tanh": (lambda x: F.gelu(x * 2, approximate="tanh"), (X,), 1e-13),
    "elu": (F.elu, (X,), 1e-14), "softplus": (F.softplus, (X * 9,), 1e-14),
    "glu": (F.glu, (X,), 1e-14), "mish": (F.mish, (X,), 1e-14),
    "hardswish": (F.hardswish, (X * 3,), 1e-14), "log sigmoid": (F.logsigmoid, (X * 9,), 1e-14),
    "huber": (lambda x: F.huber_loss(x, X.flip(1)), (X * 2,), 1e-11),
    "smooth L1": (lambda x: F.smooth_l1_loss(x, X.flip(1)), (X * 2,), 1e-11),
    "binary cross entropy": (lambda x: F.binary_cross_entropy_with_logits(x, X.sigmoid()),
                             (X * 2,), 1e-11),
    "dot": (lambda x: x @ V, (V * 2,), 1e-11),
    "cross entropy of each": (lambda x: F.cross_entropy(
        x.view(150, 64), TARGET, V.abs(), ignore_index=3, reduction="none"), (X,), 1e-11),
    "embedding with padding": (lambda w: F.embedding(
        TARGET % 7, w, padding_idx=2, scale_grad_by_freq=True), (W,), 1e-11),
}


def run(function, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    y.backward(DIRECTION[:y.numel()].view(y.shape))
    return [y.detach(), *(t.grad for t in tensors)]


def digests():
    """{what: digest} of the RULES' results and of trained models."""
    with Exact():
        found = {name: digest(*run(*case[:2])) for name, case in RULES.items()}
    return {**found, "adamw": trained("adamw"), "sgd": trained("sgd")}


@pytest.fixture(scope="module")
def elsewhere():
    """The same of a process that takes another kind of CPU, as far as torch can be told."""
    code = ("import json, sys; sys.path.insert(0, '../..'); import test_exact; "
            "print(json.dumps(test_exact.digests()))")
    child = subprocess.run(
        [sys.executable, "-c", code], text=True, check=True, capture_output=True,
        cwd=os.path.dirname(os.path.abspath(__file__)), env={
            **os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"})
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_close_to_float64_and_the_same_anywhere(name, elsewhere, compared):
    function, tensors, bound = RULES[name]
    plain, results, threads = run(function, tensors), [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with Exact():
            results.append(run(function, tensors))
    torch.set_num_threads(threads)
    assert all(error(a, b) <= bound for a, b in zip(results[0], plain)), [
        error(a, b) for a, b in zip(results[0], plain)]
    assert {digest(*result) for result in results} == {elsewhere[name]}
    compared(len(plain), "results and gradients")


class Executed(TorchDispatchMode):
    """The names of the operations that reach torch with floating-point tensors."""
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if any(True for _ in mode.floats_in(args)):
            self.names.add(func._schema.name.removeprefix("aten::").removesuffix("_"))
        return func(*args, **(kwargs or {}))


def test_what_reaches_torch_is_exact(monkeypatch, compared):
    """Whatever is taken apart: no transcendental function, and no sum but of integers on a grid."""
    for module in (dropout, grids, norms, products, sums):
        monkeypatch.setattr(module, "in_slices", lambda work, count, *_: work(slice(0, count)))
    arithmetic = {"add", "sub", "rsub", "div", "sum", "matmul", "mm", "bmm", "scatter_add",
                  "scatter_reduce"}
    moving = {"broadcast_tensors", "repeat_interleave", "result_type", "to", "pad", "mT",
              "resolve_conj", "resolve_neg"}
    for name, (function, tensors, _) in RULES.items():
        with Executed() as executed, Exact():
            run(function, tensors)
        assert executed.names <= mode.EXACT | arithmetic | moving, name
    compared(len(RULES), "functions")


def test_order_and_layout_do_not_matter(compared):
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    a, b = draw(300, 512), draw(512, 200, seed=1)
    with Exact():
        expected = a @ b
        others = [a[:, order] @ b[order], a.T.contiguous().T @ b, a @ b.T.contiguous().T,
                  (b.T @ a.T).T,
                  torch.cat([part @ b for part in a.split(7)]), torch.stack([a, a]).matmul(b)[1]]
        sums = [a.sum(0), a[torch.randperm(300)].sum(0), a.T.contiguous().sum(1),
                a.T.contiguous().T.sum(0)]
        norms = [F.layer_norm(a, (512,)), torch.cat([F.layer_norm(p, (512,)) for p in a.split(11)])]
    assert all(torch.equal(expected, other) for other in others)
    assert all(torch.equal(sums[0], other) for other in sums) and torch.equal(*norms)
    compared(len(others) + len(sums) - 1 + 1, "other orders")


def test_an_element_does_not_depend_on_its_batch(compared):
    layer = nn.TransformerEncoderLayer(64, 4, 96, activation="gelu", batch_first=True)
    layer = layer.double().eval()
    conv = nn.Conv1d(50, 30, 3, groups=2, padding=1).double()
    norm = nn.GroupNorm(5, 50).double()
    with Exact(), torch.no_grad():
        for module in (layer, conv, norm):
            x = torch.stack([X[0], X[1] * 1e5, X[2] * 1e-5])
            together, alone = module(x), [module(clip[None]) for clip in x]
            assert torch.equal(together, torch.cat(alone))
    compared(9, "elements of batches")


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_magnitudes(scale, compared):
    a, b = draw(40, 30) * scale, draw(30, 20, seed=1)
    with Exact():
        assert error(a @ b, a @ b) < 1e-5
        product = (a @ (b / scale))
        assert error((a.sum(0) / scale), (a / scale).sum(0)) < 1e-7  # 27 bits at 1e-300
        size = a.norm() / scale
    assert error(product, (a / scale) @ b) < 1e-5 and abs(size / (a / scale).norm() - 1) < 1e-7
    compared(4, "results at this magnitude")


def test_zeros_outliers_and_denormals(compared):
    a, b = draw(6, 30), draw(30, 5, seed=1)
    a[0], a[1] = 0, 5e-324
    a[2] *= 1e12
    with Exact():
        y, attended = a @ b, F.scaled_dot_product_attention(a * 0, a, a)
        assert torch.equal((a * 2.0**-1030 != 0)[3:].all(), torch.tensor(True))
        gelu = F.gelu(torch.tensor([-1e300, 1e300, 0.0, 5e-324], dtype=torch.float64))
    assert not y[0].any() and error(y[2], a[2] @ b) < 1e-5 and error(y[3:], a[3:] @ b) < 1e-5
    assert error(attended[0], a.mean(0)) < 1e-5 and gelu.tolist()[:3] == [0, 1e300, 0]
    compared(6, "edge cases")


def test_zeros_have_one_sign(compared):
    """A sum of -0s, and the larger of 0 and -0, are 0, wherever a vector or an addition begins."""
    zeros = torch.zeros(21, dtype=torch.float64)
    mixed = zeros.clone()
    mixed[::2] *= -1.0
    largest = (torch.maximum, torch.minimum, torch.fmax, torch.fmin)
    alone = (F.relu, lambda x: x.clamp(min=0.0), lambda x: x.clamp(max=0.0), lambda x: x.amax(),
             lambda x: x.view(3, 7).amin(0), lambda x: x.view(3, 7).max(1)[0], torch.sum,
             lambda x: x[:1, None] @ x[None], lambda x: x[:, None] @ x[None, :1],
             lambda x: torch.mm(x.view(3, 7), -torch.ones(7, 4).double()),
             lambda x: torch.bmm(x.view(1, 3, 7), x.view(1, 7, 3)),
             lambda x: F.conv1d(x.view(1, 1, -1), -torch.ones(2, 1, 3).double(), -zeros[:2]),
             lambda x: F.scaled_dot_product_attention(*[x.view(1, 3, 7)] * 3))
    with Exact():
        found = [function(*pair) for function in largest for pair in (
            (mixed, -zeros), (-zeros, mixed), (zeros, -zeros))]
        found += [function(x) for function in alone for x in (mixed, -zeros, -mixed)]
    for each in found:
        assert not each.any() and not each.signbit().any()
    compared(len(found), "results")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_visible(bad, compared):
    x = draw(1, 12, 8)
    x[0, 3, 2] = bad
    finite_of_infinity = [torch.tanh, torch.sigmoid, torch.exp, F.gelu, lambda x: x.softmax(-1)]
    others = [lambda x: x @ W[:8, :8], torch.sum, torch.norm, torch.var, torch.abs,
              lambda x: F.layer_norm(x, (8,)), lambda x: F.conv1d(x, draw(4, 12, 3)),
              lambda x: F.scaled_dot_product_attention(x, x, x), lambda x: torch.log(x.abs())]
    with Exact():
        for function in others + (finite_of_infinity if math.isnan(bad) else []):
            assert not function(x).isfinite().all(), function
        for function in (others[0], others[5], *finite_of_infinity):
            assert function(x)[0, :3].isfinite().all()  # the rows before it
    compared(len(others), "functions")


@library.custom_op("kit::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@library.custom_op("kit::rand", mutates_args=())
def named_as_another(x: torch.Tensor) -> torch.Tensor:
    return x.exp()


def test_what_has_no_rule_raises_by_name(monkeypatch, compared):
    with Exact():
        with pytest.raises(NotImplementedError, match="aten.sort.*RULES"):
            X.sort()
        with pytest.raises(NotImplementedError, match="aten.erf.*RULES"):  # of prims.erf
            X.erf()
        with monkeypatch.context() as patch:
            patch.setitem(mode.decomposition_table, torch.ops.aten.cumsum.default, torch.cumsum)
            with pytest.raises(NotImplementedError, match="aten.cumsum.*RULES"):  # of itself
                X.cumsum(0)
        with pytest.raises(NotImplementedError, match="aten.exponential_"):  # it draws
            X.clone().exponential_()
        with pytest.raises(NotImplementedError, match="float64.*float32"):  # a part of it
            F.silu(X.float())
        with pytest.raises(NotImplementedError, match="foreach=False"):
            torch._foreach_add([X], [X])
        with pytest.raises(NotImplementedError, match="norm of order 0"):
            torch.linalg.vector_norm(X[0, 0, 0], 0)
        with pytest.raises(NotImplementedError, match="complex"):
            X.to(torch.complex128) * 2
        with pytest.raises(NotImplementedError, match="power"):
            X**1.7
        with pytest.raises(NotImplementedError, match="integers.*double"):
            TARGET.exp()
        with pytest.raises(NotImplementedError, match="integers"):
            torch.linspace(0, 1, 9, dtype=torch.float64)
        with pytest.raises(NotImplementedError, match="scatter"):
            X.scatter(0, TARGET.view(3, 50, 1) % 3, X, reduce="add")
        for function in (twice, named_as_another):
            with pytest.raises(NotImplementedError, match="kit.(twice|rand)"):
                function(X)
        with pytest.raises(NotImplementedError, match="prims.sin"):
            torch.ops.prims.sin(X)
        with pytest.raises(NotImplementedError, match="aten.div.Tensor_mode. To add"):
            X // 0.3
        with pytest.raises(NotImplementedError, match="addmm_activation"):  # another on a GPU
            torch.ops.aten._addmm_activation(V[:5], W[:5, :7], W[:7, :5], use_gelu=True)
        with pytest.raises(NotImplementedError, match="norms in float64"):
            torch.linalg.vector_norm(X, dtype=torch.float32)
        assert torch.equal(torch.div(X, 3.0, rounding_mode=None), X / 3.0)
        assert torch.randn_like(X, dtype=torch.float32).dtype == torch.float32
        with pytest.raises(NotImplementedError, match="float64.*float32"):
            X.float() @ W.T.float()
        with pytest.raises(NotImplementedError, match="Conv1d"):
            F.conv2d(X[None], X[:, None, :3, :3])
        assert (torch.arange(9).view(3, 3).sum(0) // 2).tolist() == [4, 6, 7]
        assert X.float().double().shape == X.shape
    compared(24, "operations")


def test_what_torch_refuses_is_refused(compared):
    calls = (lambda: F.layer_norm(X, (8,)), lambda: torch.bmm(X, X[:1].mT),
             lambda: F.conv1d(X[:, :, :3], KERNEL), lambda: TARGET.clone().div_(2),
             lambda: TARGET.clone().add_(0.5), lambda: W @ W, lambda: TARGET.mean(),
             lambda: F.scaled_dot_product_attention(X, X, X, attn_mask=X @ X.mT, is_causal=True))
    for call in calls:
        for context in (contextlib.nullcontext(), Exact()):
            with pytest.raises(RuntimeError), context:
                call()
    compared(len(calls), "calls")


def test_empty_and_small(compared):
    """Empty operands, ranges, statistics under inference_mode, targets that are all ignored: as in
    float64."""
    nobody = torch.full((150,), -100)
    calls = (lambda: X[:0].mean(0), lambda: X[:0].mean(), lambda: F.mse_loss(X[:0], X[:0]),
             lambda: F.layer_norm(X[:0], (64,)), lambda: X[:, :0].softmax(1),
             lambda: F.conv1d(X[:0], KERNEL, groups=5), lambda: X[:0] @ W.T,
             lambda: torch.arange(0.0, 3, 0.1, dtype=torch.float64),
             lambda: torch.arange(7, dtype=torch.float64), lambda: torch.arange(9, 2, -3),
             lambda: X.var(0, unbiased=False), lambda: torch.var(X, False), lambda: X.std(),
             lambda: X.var([0, 2], correction=0, keepdim=True), lambda: (X > 0).mean(dtype=X.dtype),
             lambda: X**0, lambda: X**-3, lambda: X.abs()**1.5,
             lambda: F.cross_entropy(X.view(150, 64), nobody))
    for call in calls:
        plain = call()
        with Exact():
            ours = call()
        with Exact(), torch.inference_mode():
            assert torch.equal(ours.nan_to_num(7), call().nan_to_num(7))
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-14, equal_nan=True)
    x = X.view(150, 64).clone().requires_grad_()
    with Exact():
        F.cross_entropy(x, nobody).backward()
    assert not x.grad.any()
    compared(2 * len(calls) + 1, "results")


def test_what_is_added_at_a_place_stays_there(compared):
    """A sum at one place neither takes another's bits nor its NaN."""
    source = torch.tensor([1e20, 2.0**-10, math.nan, 2.0, 3.0], dtype=torch.float64)
    index, zeros = torch.tensor([0, 1, 2, 3, 3]), torch.zeros(5, dtype=torch.float64)
    expected = torch.tensor([1e20, 2.0**-10, math.nan, 5.0, 0.0], dtype=torch.float64)
    with Exact():
        sums = (zeros.index_add(0, index, source), zeros.scatter_add(0, index, source),
                zeros.index_put((index,), source, accumulate=True))
    for found in sums:
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    compared(len(sums), "sums")


def test_threads_enter_and_leave_at_different_times(compared):
    """torch's switches are put back when the last one leaves, not before."""
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).double().eval()
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    first, second = Exact(), Exact()
    first.__enter__()
    entered, left = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        def work():
            with second, torch.no_grad():
                entered.set()
                left.wait()
                return layer(X)
        found = pool.submit(work)
        entered.wait()
        expected = layer(X)
        first.__exit__(None, None, None)
        left.set()
        assert torch.equal(found.result(), expected)
    assert before == (torch.backends.mha.get_fastpath_enabled(),
                      torch.backends.cuda.flash_sdp_enabled())
    compared(2, "threads")


def test_in_place_out_and_views(compared):
    with Exact():
        x = X.clone()
        x[1].add_(X[0], alpha=0.3).div_(3.0).sqrt_()
        x[:, 0].lerp_(X[:, 1], 0.25)
        out = torch.empty(0, dtype=torch.float64)
        torch.exp(X, out=out)
        expected = ((X[1] + X[0] * 0.3) / 3.0).sqrt()
        expected[0] = expected[0] + (X[1, 1] - expected[0]) * 0.25
        assert torch.equal(x[1].nan_to_num(7), expected.nan_to_num(7)) and torch.equal(out, X.exp())
    compared(2, "targets")


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p, compared):
    x = torch.ones(500, 1001, dtype=torch.float64)
    with Exact():
        torch.manual_seed(1)
        first = F.dropout(x, p)
        torch.manual_seed(1)
        second = torch.native_dropout(x, p, True)[0]  # what torch takes on a GPU
        third = F.dropout(x, p)
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert abs((first == 0).double().mean() - p) < 5 * (p * (1 - p) / x.numel())**0.5
    assert first.max() == 1 / (1 - p)
    compared(x.numel(), "places of a mask")


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(30, 32), nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, 0.1, "gelu", batch_first=True) for _ in range(2))
        self.attention = nn.MultiheadAttention(32, 2, 0.1, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head, self.recompute = nn.Linear(32, 5), False

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return self.head(self.norm(x + self.attention(x, x, x)[0]).mean(1))


def trained(optimizer="adamw", recompute=False, steps=3):
    torch.manual_seed(0)
    with Exact():
        model = Transformer().double()
        model.recompute = recompute
        make = {"adamw": lambda p: torch.optim.AdamW(p, 1e-3, foreach=False),
                "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False)}[optimizer]
        stepper, tokens = make(model.parameters()), torch.randint(30, (4, 25))
        for _ in range(steps):
            stepper.zero_grad()
            F.cross_entropy(model(tokens), torch.arange(4)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            stepper.step()
    return digest(*model.state_dict().values())


def test_training_gives_one_digest(elsewhere, compared):
    """With one thread and two, activations kept and recomputed, and elsewhere."""
    threads = torch.get_num_threads()
    for optimizer in ("adamw", "sgd"):
        found = {elsewhere[optimizer]}
        for count in (1, 2):
            torch.set_num_threads(count)
            found |= {trained(optimizer), trained(optimizer, recompute=True)}
        torch.set_num_threads(threads)
        assert len(found) == 1
    compared(10, "trained models")


def test_nesting_inference_and_eval(compared):
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).double().eval()
    results, outer = [], Exact()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with outer, Exact(), outer, context():
            results.append(layer(X).clone())
    assert len({digest(result) for result in results}) == 1
    outside = F.scaled_dot_product_attention(Q, K, K)
    assert torch.equal(outside, mode.torch_attention(Q, K, K))
    compared(len(results), "contexts")


def test_accuracy_of_a_network(compared):
    """Of features, also with one channel far larger than the others, and of gradients: the relative
    error against plain float64."""
    from accuracy import table

    errors = table("demo")
    for what, (found, _) in errors.items():
        assert found < (5e-6 if what == "features" else 2e-5), what
    compared(len(errors), "errors")


def test_known_answers(monkeypatch, compared):
    check()
    for name, case in (("gelu", "gelu"), ("_softmax", "softmax"), ("convolution", "convolution")):
        with monkeypatch.context() as patch:
            rule = mode.RULES[name]
            patch.setitem(mode.RULES, name, lambda *a, **k: rule(*a, **k) * (1 + 2.0**-52))
            with pytest.raises(ArithmeticError, match=f"^{case} on cpu"):
                check()
    known = CASES | LARGE | IN_FLOAT64  # also those for GPUs
    assert answers("cpu", large=True) == {name: digest for name, (digest, _) in known.items()}
    compared(len(known), "known answers")


def test_it_works_without_the_kit(tmp_path, compared):
    """exact/ copied into another project trains there, and nothing of the kit is imported."""
    root = Path(__file__).resolve().parent.parent.parent
    shutil.copytree(root / "exact", tmp_path / "exact",
                    ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "program.py").write_text("""
import sys
import torch
from exact import Exact, check

check()
torch.manual_seed(0)
with Exact():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.double().parameters(), foreach=False)
    x = torch.randn(20, 8, dtype=torch.float64)
    for _ in range(50):
        optimizer.zero_grad()
        loss = (model(x)[:, 0] - x[:, 0]).square().mean()
        loss.backward()
        optimizer.step()
print(loss.item(), {"kit", "common", "torchaudio"} & set(sys.modules))
""")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, text=True,
                          stdout=subprocess.PIPE, check=True).stdout.split(maxsplit=1)
    assert 0 < float(done[0]) < 1 and done[1].strip() == "set()"
    compared(50, "steps")


def test_emulated_float64_is_noticed(monkeypatch, compared):
    """cuBLAS may replace float64 products by approximations: off, unless CUDA began before."""
    assert os.environ["CUBLAS_EMULATE_DOUBLE_PRECISION"] == "0" and not gpu.emulation()
    monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "1")
    with pytest.raises(ArithmeticError, match="CUBLAS_EMULATE_DOUBLE_PRECISION.*unset it"):
        check("cuda")  # which asks before it computes
    compared(1, "settings")


def test_what_a_gpu_lacks_has_a_name(monkeypatch, compared):
    """Without a compiler, Triton or the units for it, float64 goes on."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(gpu, "load", gpu.load.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "7.5" in gpu.missing(device) and gpu.kernels(device) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for module, what in (("triton", "Triton"), ("ziglang", "C compiler")):
        if not gpu.importlib.util.find_spec("triton"):
            continue
        with monkeypatch.context() as patch:
            find = gpu.importlib.util.find_spec
            patch.setattr(gpu.importlib.util, "find_spec",
                          lambda name: None if name == module else find(name))
            patch.setattr(gpu.shutil, "which", lambda name: None)
            patch.delenv("CC", raising=False)
            assert what in gpu.missing(device) and gpu.kernels(device) is None
    monkeypatch.setenv("EXACT_KERNELS", "0")
    assert gpu.missing(device) is None and gpu.kernels(device) is None
    compared(4, "machines")
