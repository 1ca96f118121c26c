"""The dispatch mode and its table: which operation is computed by which rule."""

import contextlib
import functools
import math
import threading

import torch
import torch.nn.functional as F
from torch._decomp import decomposition_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from exact.attention import attention
from exact.dropout import bernoulli_, dropout, dropout_backward
from exact.functions import exp, gelu, gelu_backward, log, sigmoid, softmax, tanh
from exact.grids import div, reciprocal, sqrt
from exact.norms import group_norm, layer_norm, layer_norm_backward
from exact.products import addmm, convolution, convolution_backward, product
from exact.sums import (
    index_add, index_put, mean, norm, scatter_add, total, var_mean)

aten, torch_attention = torch.ops.aten, F.scaled_dot_product_attention

# ------------------------------------------------------------------------------ table of operations


def add(x, y, *, alpha=1):
    return x + (y if alpha == 1 else y * alpha)


def sub(x, y, *, alpha=1):
    return x - (y if alpha == 1 else y * alpha)


def lerp(x, y, weight):
    return x + (y - x) * weight


def addcmul(x, a, b, *, value=1):
    return x + a * b * value


def addcdiv(x, a, b, *, value=1):
    return x + div(a, b) * value


def power(x, n):
    """x^n by products, a square root and a reciprocal."""
    if isinstance(n, torch.Tensor) or n not in [half / 2 for half in range(-8, 9)]:
        raise NotImplementedError("exact arithmetic has powers from -4 to 4 in steps of a half, "
                                  "given as a number")
    factors = [x] * int(abs(n)) + [sqrt(x)] * (n % 1 != 0)
    out = functools.reduce(torch.mul, factors, torch.ones_like(x))
    return out if n >= 0 else reciprocal(out)


def arange(*bounds, dtype=None, **options):
    """Its numbers in float64: start plus a whole number of steps."""
    if not any(isinstance(bound, float) for bound in bounds) and not (
            dtype and dtype.is_floating_point):
        return torch.arange(*bounds, dtype=dtype, **options)
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    count = torch.arange(math.ceil((end - start) / step), **options)
    return count.double().mul_(step).add_(start).to(dtype or torch.get_default_dtype())


def drawn_on_cpu(x):
    if x.device.type != "cpu":
        raise NotImplementedError("random numbers of a GPU are others: draw on the CPU, then .to()")


def uniform_(x, low=0.0, high=1.0, *, generator=None):
    drawn_on_cpu(x)
    return x.uniform_(0, 1, generator=generator).mul_(high - low).add_(low)


def normal_(x, mean=0.0, std=1.0, *, generator=None):
    """Normally distributed numbers by Box and Muller's formula; torch's own follow the CPU's
    vectors."""
    drawn_on_cpu(x)
    u, turn = torch.rand(2, *x.shape, dtype=torch.float64, generator=generator)
    squared = ((turn - 0.5) * 6.283185307179586)**2
    cosine = functools.reduce(lambda series, n: 1.0 - series * squared * (1 / (n * (n - 1))),
                              range(28, 0, -2), torch.ones_like(turn))
    return x.copy_(sqrt(log(1.0 - u) * -2.0) * cosine * -std + mean)


def randn(size, *, generator=None, **options):
    return normal_(torch.empty(size, **options), generator=generator)


# The rules, by the name of the ATen operation. One serves its in-place and out= variants as well.
RULES = {
    "mm": product, "bmm": product, "addmm": addmm, "baddbmm": addmm,
    "convolution": convolution, "convolution_backward": convolution_backward,
    "sum": total, "mean": mean, "var_mean": var_mean, "linalg_vector_norm": norm,
    "var": lambda *args, **options: var_mean(*args, **options)[0],
    "std": lambda *args, **options: sqrt(var_mean(*args, **options)[0]),
    "index_add": index_add, "scatter_add": scatter_add, "index_put": index_put,
    "_index_put_impl": index_put,
    "add": add, "sub": sub, "rsub": lambda x, y, *, alpha=1: sub(y, x, alpha=alpha), "div": div,
    "reciprocal": reciprocal, "lerp": lerp, "addcmul": addcmul, "addcdiv": addcdiv,
    "sqrt": sqrt, "rsqrt": lambda x: reciprocal(sqrt(x)), "pow": power,
    "exp": exp, "expm1": lambda x: exp(x) - 1.0, "log": log, "log1p": lambda x: log(x + 1.0),
    "sigmoid": sigmoid, "tanh": tanh, "gelu": gelu, "gelu_backward": gelu_backward,
    "_softmax": softmax,
    "native_layer_norm": layer_norm, "native_layer_norm_backward": layer_norm_backward,
    "native_group_norm": group_norm,
    "bernoulli_": bernoulli_, "native_dropout": dropout,
    "native_dropout_backward": dropout_backward,
    "uniform_": uniform_, "normal_": normal_, "arange": arange, "randn": randn,
    "randn_like": lambda x, **options: normal_(torch.empty_like(x, **options)),
}
# rules that take float32 as well
ANY_FLOAT = {"add", "sub", "rsub", "div", "reciprocal", "index_put", "_index_put_impl", "uniform_",
             "normal_", "randn_like"}
# what makes floating-point numbers of integers, or of nothing
FROM_INTEGERS = {"add", "sub", "rsub", "div", "mean", "randn", "arange", "bernoulli_"}
# Exact as they are: they move, compare or select numbers, or are one IEEE operation.
EXACT = set("""
view _unsafe_view _reshape_alias reshape view_as expand expand_as as_strided t transpose permute
movedim squeeze unsqueeze flatten unflatten select slice narrow diagonal split split_with_sizes
unsafe_split unsafe_split_with_sizes chunk unbind unfold flip roll repeat cat stack tril triu
constant_pad_nd clone contiguous copy detach alias lift lift_fresh lift_fresh_copy _to_copy set
resize _pin_memory is_pinned record_stream _local_scalar_dense is_same_size _has_same_storage_numel
select_backward slice_backward diagonal_backward select_scatter slice_scatter as_strided_scatter
index index_select index_fill index_copy gather scatter take embedding masked_fill masked_scatter
masked_select where nonzero empty empty_like empty_strided empty_permuted new_empty
new_empty_strided zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full fill
zero scalar_tensor eye neg abs mul sign sgn signbit copysign relu leaky_relu leaky_relu_backward
threshold threshold_backward hardtanh hardtanh_backward clamp clamp_min clamp_max maximum minimum
fmax fmin amax amin max min aminmax argmax argmin round floor ceil trunc nan_to_num isnan isinf
isfinite eq ne lt le gt ge equal logical_and logical_or logical_not logical_xor all any is_nonzero
""".split())
# those of them that only look at the same memory: called so often that nothing else is asked
VIEWS = set("""
view _unsafe_view _reshape_alias as_strided t transpose permute squeeze unsqueeze expand select
slice split split_with_sizes unbind detach alias
""".split())
# those of them that may give a zero either sign, as the CPU's vectors fall: here it is always +
EITHER_ZERO = {"relu", "threshold", "hardtanh", "clamp", "clamp_min", "clamp_max", "maximum",
               "minimum", "fmax", "fmin", "amax", "amin", "max", "min", "aminmax"}
# exact where they are drawn on a CPU
RANDOM = {"rand", "rand_like", "random", "randint", "randint_like", "randperm"}
# arguments that make another operation of the one that RULES and EXACT name
OTHERWISE = {"approximate", "reduce", "rounding_mode"}
# its composition is another one on a GPU than on a CPU
UNLIKE = {aten._addmm_activation.default, aten._addmm_activation.out}


# --------------------------------------------------------------------------------------------- mode


def floats_in(values):
    """The floating-point tensors in (lists of) values. Raises NotImplementedError for complex ones:
    a compiler may fuse the operations of which their product is made."""
    floats = []
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                floats.append(value)
            elif value.is_complex():
                raise NotImplementedError("exact arithmetic has no complex numbers")
        elif isinstance(value, (list, tuple)):
            floats += floats_in(value)
    return floats


def in_exact():
    """Whether the calling thread is in an Exact context."""
    return any(isinstance(mode, Exact) for mode in _get_current_dispatch_mode_stack())


def scaled_dot_product_attention(*args, **options):
    """Exact if the calling thread is in an Exact context, else torch's."""
    return (attention if in_exact() else torch_attention)(*args, **options)


_lock, _inside, _switches = threading.Lock(), 0, contextlib.ExitStack()


def count_inside(change):
    """Torch's switches between its fused kernels and what these are composed of are the process's:
    they are set from the time that the first thread enters until the last one has left."""
    global _inside
    with _lock:
        _inside += change
        if _inside == 1 and change == 1:
            _switches.enter_context(sdpa_kernel(SDPBackend.MATH))  # for code that holds torch's own
            fused = torch.backends.mha
            _switches.callback(fused.set_fastpath_enabled, fused.get_fastpath_enabled())
            fused.set_fastpath_enabled(False)
        elif _inside == 0:
            _switches.close()


@functools.cache
def name_of(func):
    """(name in the tables above, whether it is an ATen operation, whether it works in place)."""
    space, name = func._schema.name.split("::")
    in_place = name.endswith("_") and name not in RULES
    return name[:-1] if in_place else name, space == "aten", in_place


class Exact(TorchDispatchMode):
    """The context in which float64 torch programs give the same bits on any machine.

    Forward, backward and optimizer step belong inside; so do backward threads, checkpointing,
    no_grad and inference_mode, and it may be entered again inside itself. Raises
    NotImplementedError, naming it, for an operation that has no rule and cannot be taken apart into
    some that have, and for float32 sums."""

    def __init__(self, apart=()):
        """apart: the operations that are being taken apart, the outermost first."""
        super().__init__()
        self.outermost, self.apart = [], apart

    @classmethod
    def _should_skip_dynamo(cls):
        """Else torch sends every operation through its compiler, which it would import first."""
        return False

    def __enter__(self):
        self.outermost.append(not in_exact())
        if not self.outermost[-1]:  # within itself: nothing to add
            return self
        count_inside(1)
        # stays: outside this context it is torch's
        F.scaled_dot_product_attention = scaled_dot_product_attention
        torch.set_flush_denormal(False)
        return super().__enter__()

    def __exit__(self, *error):
        if self.outermost.pop():
            super().__exit__(*error)
            count_inside(-1)

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs, hint, (name, known, in_place) = kwargs or {}, "", name_of(func)
        if known and name in VIEWS:
            return func(*args, **kwargs)
        floats = floats_in((*args, *kwargs.values()))
        if kwargs and known:
            known = all(kwargs.get(each) in (None, "none") for each in OTHERWISE)
            kwargs = {each: value for each, value in kwargs.items()
                      if not known or each not in OTHERWISE}
        if known and name in RULES and (floats or name in FROM_INTEGERS):
            return by_rule(func, name, in_place, floats, args, kwargs)
        if known and name in RANDOM:
            drawn = func(*args, **kwargs)
            if drawn.device.type == "cpu":
                return drawn
            hint = ": draw on the CPU, then move"
        elif known and name in EXACT:
            result = func(*args, **kwargs)
            if name in EITHER_ZERO:
                for values in floats_in([result]):
                    values.add_(0.0)
            return result
        elif not floats:
            result = func(*args, **kwargs)
            if not floats_in([result]):  # integers and booleans
                return result
            hint = " of integers: convert them first, with .double()"
        compositions = [func.decompose]
        # torch's table, but not for what draws random numbers: Python's log makes some of them
        if (not hint and func in decomposition_table and func not in (*self.apart, *UNLIKE)
                and torch.Tag.nondeterministic_seeded not in func.tags):
            compositions.append(decomposition_table[func])
        with Exact((*self.apart, func)):  # the parts come here in turn
            for composition in compositions:
                result = composition(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if "foreach" in name or "fused" in name:
            hint = ": pass foreach=False, fused=False"
        # torch's primitives, which only its table calls, are not what was asked for
        asked = next((each for each in (func, *reversed(self.apart)) if each.namespace != "prims"),
                     func)
        raise NotImplementedError(
            f"no exact arithmetic for {asked}{hint if asked is func else ''}. To add it, write a "
            "function of its arguments with the sums and products of exact/ and enter it in "
            "RULES")


def by_rule(func, name, in_place, floats, args, kwargs):
    """What the rule of an operation gives. Where an operand is empty nothing is added up: torch's
    own result."""
    out = kwargs.get("out")
    if not all(x.numel() for x in floats if x is not out):
        return func(*args, **kwargs)
    if name not in ANY_FLOAT and any(x.dtype != torch.float64 for x in floats):
        raise NotImplementedError(f"exact arithmetic is for float64, but {func} got "
                                  f"{floats[0].dtype}")
    kwargs.pop("out", None)
    result = RULES[name](*args, **kwargs)
    if in_place:
        if not torch.can_cast(result.dtype, args[0].dtype):
            raise RuntimeError(f"{func} would turn {result.dtype} into {args[0].dtype}")
        return args[0].copy_(result)
    return result if out is None else out.resize_(result.shape).copy_(result)
