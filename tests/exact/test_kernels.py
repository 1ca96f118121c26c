"""Tests of exact/kernels.py without a GPU: run by Triton's interpreter, they give the bits of the
rules in float64; and they compile for the GPUs that people have."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exact import functions, gpu, norms, products, sums

ROOT = Path(__file__).resolve().parent.parent.parent
# compute capability: bytes of shared memory that a program may have
TARGETS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def draw(*shape):
    """Numbers of very unlike size, with rows of zeros, denormals, infinity and NaN where there are
    enough of them."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = x.view(-1, shape[-1])
    if min(rows.shape) > 7:
        rows[0], rows[1], rows[2, 1:3] = 0.0, 5e-324, torch.tensor([math.inf, -math.inf])
        rows[3], rows[4], rows[5, 3], rows[6] = rows[3] * 1e300, rows[4] * 1e-300, math.nan, -0.0
        rows[:, 4] *= 1e-200
    return x


A, B, X = draw(9, 70), draw(70, 13), draw(3, 20, 40)
W, HUGE = draw(60), draw(60) * 1e200


def convolution(x, outputs, kernel, stride, padding=0, groups=1, bias=None):
    w = draw(outputs, x.shape[1] // groups, kernel)
    return products.convolution(x, w, bias, [stride], [padding], [1], groups=groups)


def backward(x, w):
    _, mean, reciprocal = norms.layer_norm(x, [x.shape[-1]], w, w, 1e-5)
    return norms.layer_norm_backward(x.flip(0), x, [x.shape[-1]], mean, reciprocal, w, w,
                                     [True] * 3)


CASES = {
    "product": lambda: products.product(A, B),
    "of transposed": lambda: products.product(B.mT, A.mT),
    "of parts": lambda: products.product(A[::2, 1:70:3], B[1:70:3]),
    "one number": lambda: products.product(W[:1, None], W[:1, None]),
    "one operand twice": lambda: products.product(A[:8, :8], A[:8, :8]),
    "small": lambda: products.product(A[:7, 3:], B[3:, :7]),
    "small, of parts": lambda: products.addmm(W[::2][:8], A[::2, 1:70:3], A[1:, 2:70:3].mT),
    "with a bias": lambda: products.addmm(W[7:20], A, B),
    "batch": lambda: products.product(X, X.mT),
    "batch with a bias": lambda: products.addmm(W[:20], X, X.mT),
    "K in several parts": lambda: products.product(draw(3, 300), draw(300, 2)),
    "convolution": lambda: convolution(draw(1, 32, 150), 5, 3, 2),
    "of groups": lambda: convolution(draw(2, 32, 70), 8, 8, 1, 4, 2, W[:8]),
    "of one channel": lambda: convolution(draw(2, 1, 400), 5, 10, 5, 3, bias=W[:5]),
    "gelu": lambda: functions.gelu(X * 3),
    "gelu backward": lambda: functions.gelu_backward(X.flip(1), X * 3),
    "layer norm": lambda: norms.layer_norm(X[0].mT, [20], W[:20], W[20:40], 1e-5)[0],
    "layer norm backward": lambda: backward(X[1:, :9], W[:40]),
    "without weights": lambda: norms.layer_norm(HUGE.view(3, 20), [20], None, None, 1e-5)[0],
    "group norm": lambda: norms.group_norm(X, W[:20], W[20:40], 3, 20, 40, 5, 1e-5)[0],
    "sum": lambda: sums.total(X), "of rows": lambda: sums.total(X, 2, True),
    "of columns": lambda: sums.total(X, 0), "of the middle": lambda: sums.total(X, 1),
    "of many": lambda: sums.total(draw(2, 70000), 1),
    "of many rows": lambda: sums.total(draw(2000, 3), 0),
    "norm": lambda: sums.norm(X[0, 7:]), "norms of rows": lambda: sums.norm(X, 2, [2], True),
    "of columns of equal numbers": lambda: sums.norm(W[7:].expand(3, 53).mT, 2, [0]),
    "of huge numbers": lambda: sums.norm(HUGE.repeat(200)),
}


ON_ALL = ("product_kernel", "gradient_kernel")  # the largest: the others compile where these do


def use(module):
    gpu.load = lambda device: (module, None)


def int_mm(a, b):
    """torch._int_mm as on a GPU: a CPU's may saturate."""
    assert a.dtype == b.dtype == torch.int8 and len(a) > 16 and b.stride(0) == 1
    assert a.shape[1] % 8 == b.shape[1] % 8 == 0 and a.shape[1] < 43690
    return a.int() @ b.int()


def in_interpreter(cases=CASES):
    """The names of those cases whose bits the kernels give, in Triton's interpreter."""
    from triton.runtime import interpreter
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # numpy 2.4 does not take an array of one number for a loop's end
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())
    interpreter._patch_lang_tensor = patched
    from exact import kernels

    kernels.LONGEST, kernels.SMALL, torch._int_mm = 128, 500, int_mm
    same, ways = [], (True, False) if cases is CASES else (True,)
    for name, case in cases.items():
        results = []
        for module, in_triton in ((None, True), *((kernels, each) for each in ways)):
            use(module)
            kernels.has_int8_products = lambda device: in_triton  # else torch._int_mm
            found = case()
            results.append(found if isinstance(found, tuple) else (found,))
        if all(torch.equal(a.nan_to_num(7), b.nan_to_num(7))
               for found in results[1:] for a, b in zip(results[0], found, strict=True)):
            same.append(name)
    return same


def launches(cases):
    """What the last launch of each kernel in some cases would compile; nothing runs."""
    from triton.runtime.jit import JITFunction

    from exact import kernels

    found = {}

    def record(kernel, *args, grid, warmup, **options):
        constants, signature, attributes = {}, {}, {}
        for place, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
            fixed = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or fixed:
                constants[parameter.name], kind = value, "constexpr"
            elif isinstance(value, torch.Tensor):
                kind = {torch.float64: "*fp64", torch.int64: "*i64", torch.int8: "*i8"}[value.dtype]
            else:
                kind = parameter.annotation_type or "i32"
            aligned = kind != "constexpr" and (isinstance(value, torch.Tensor) or value % 16 == 0
                                               and not parameter.do_not_specialize)
            if aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
            signature[parameter.name] = kind
        found[kernel.fn.__name__] = kernel, signature, constants, attributes, options

    JITFunction.run, kernels.SMALL = record, 500
    use(kernels)
    for case in cases.values():
        case()
    return list(found.values())


def compiled(cases=CASES):
    """[(capability, kernel, bytes of shared memory, instructions that round twice)]."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = []
    for capability in TARGETS:
        for kernel, signature, constants, attributes, options in launches(cases):
            name = kernel.fn.__name__
            if name not in ON_ALL and capability not in (80, 90):
                continue
            source = ASTSource(kernel, signature, constants, attributes)
            made = triton.compile(source, GPUTarget("cuda", capability, 32), options)
            unsafe = [each for each in ("fma.rn.f64", "sqrt.approx", "div.approx", "div.full")
                      if each in made.asm["ptx"]]
            found.append((capability, name, made.metadata.shared, unsafe))
    return found


def run(what, folder, file=__file__, **environment):
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", file, what], text=True, check=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT),
                                     "TRITON_CACHE_DIR": str(folder), **environment})
    return json.loads(child.stdout.splitlines()[-1])


def test_the_interpreter_gives_the_bits_of_float64(tmp_path, compared):
    assert run("in_interpreter", tmp_path, TRITON_INTERPRET="1") == list(CASES)
    compared(len(CASES), "operations")


def test_kernels_compile(tmp_path, compared):
    found = run("compiled", tmp_path)
    for capability, name, shared, unsafe in found:
        assert shared <= TARGETS[capability] and not unsafe, (capability, name)
    assert {capability for capability, *_ in found} == set(TARGETS)
    compared(len(found), "compiled kernels")


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
