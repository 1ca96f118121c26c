"""The known-answer check: does this machine compute what exact arithmetic relies on?"""

import hashlib
import math

import torch
import torch.nn.functional as F

from exact.gpu import emulation
from exact.mode import Exact


def sample(device, *shape):
    """Numbers from -1 to 1 that are the same everywhere: a hash of their place."""
    x = torch.arange(1, math.prod(shape) + 1).mul_(-7046029254386353131)
    x = x.bitwise_xor_((x >> 30) & (1 << 34) - 1).mul_(-4658895280553007687)
    x >>= 11
    return (x.to(torch.float64) * 2.0**-52).view(shape).to(device)


def gradients(function, *tensors):
    with torch.enable_grad():
        tensors = [tensor.clone().requires_grad_() for tensor in tensors]
        function(*tensors).square().sum().backward()
    return torch.cat([tensor.grad.flatten() for tensor in tensors])


CASES = {  # of x[60, 500] and y[500, 40]: the digest of the answer, and what to compute
    "product": ("87f6bd66", lambda x, y: x @ y),
    "product and bias": ("ad50c3b4", lambda x, y: F.linear(x, y.T, y[0])),
    "long product": ("cbad890c", lambda x, y: torch.stack([
        x.view(1, -1) @ x.view(-1, 1), y[:200].view(1, -1) @ x.view(-1, 1)[:8000]])),
    "sum": ("d1f90507", lambda x, y: x.repeat(20, 1).sum()),
    "sum of columns": ("d557db2e", lambda x, y: x.repeat(40, 1).sum(0)),
    "norm": ("a7d2e3e2", lambda x, y: torch.cat([x.norm(dim=1), y.norm(dim=0)])),
    "index_add": ("191da637", lambda x, y: torch.zeros_like(x[:7]).index_add(
        0, torch.arange(60, device=x.device) % 7, x)),
    "division": ("1a143734", lambda x, y: x / 3.0),
    "square root": ("b50d9d82", lambda x, y: (x + 2.0).sqrt()),
    "addition": ("271ef2bc", lambda x, y: torch.lerp(x, x * x, 0.3).addcmul(x, x, value=0.7)),
    # so many that all of torch's threads take part
    "denormal numbers": ("c2670832", lambda x, y: x.repeat(20, 1) * 2.0**-1030),
    "exp": ("a58f73ce", lambda x, y: torch.exp(x * 20.0)),
    "log": ("63c8543d", lambda x, y: torch.log(x + 1.5)),
    "gelu": ("e46a2933", lambda x, y: F.gelu(x * 6.0)),
    "softmax": ("296f9a5f", lambda x, y: x.softmax(1)),
    "layer norm": ("21a76f27", lambda x, y: F.layer_norm(x, x.shape[1:], y[:, 0], y[:, 1])),
    "convolution": ("b1391c54", lambda x, y: F.conv1d(
        x[None], y.view(100, 40, 5)[:20, :30], groups=2)),
    "convolution of a wide input": ("2e38331d", lambda x, y: F.conv1d(
        x[None, :32], y.view(-1, 32, 5)[:70], y.view(-1)[:70], stride=2, padding=3)),
    "group norm": ("64f1a1db", lambda x, y: F.group_norm(
        x.view(2, 30, 500), 5, y[:30, 0], y[:30, 1])),
    "gradients": ("a9cac955", lambda x, y: gradients(lambda x, w: F.gelu(
        F.layer_norm(x, x.shape[1:], w[:, 0], w[:, 1]) @ w), x, y)),
    "dropout": ("f599be47", lambda x, y: F.dropout(x, 0.3)
                + torch.native_dropout(x, 0.3, True)[0]),
    "attention": ("175e96f4", lambda x, y: F.scaled_dot_product_attention(
        *x.view(3, 4, 50, 50))),
    "gradients of attention": ("f094f985", lambda x, y: gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
        *x.view(3, 4, 50, 50))),
    "Python's power": ("3808ebb3", lambda x, y: torch.tensor([
        (1 - beta**n)**0.5 for beta in (0.9, 0.99, 0.999) for n in range(1, 300)],
        dtype=torch.float64)),
}
LARGE = {  # of x[2048, 1024], on a GPU: there are other kernels, and libraries' other algorithms
    "large product": ("7b132e72", lambda x: x @ x.T),
    "large product and bias": ("50b87ac6", lambda x: F.linear(x, x, x[:, 0])),
    "large product of columns": ("d9359b53", lambda x: x.T @ x),
    "longest product": ("d2e7cfac", lambda x: x.view(1, -1) @ x.view(-1, 1)),
    "norm of long rows": ("d6665527", lambda x: x.view(4, -1).norm(dim=1)),
    "norm of all": ("ad88143b", lambda x: x.norm()),
    "group norm of long rows": ("9c26f3e2", lambda x: F.group_norm(x[None], 64)),
}
# of integers in x[2048, 1024], outside Exact: what the library itself computes
IN_FLOAT64 = {"large product in float64": ("5f403570", lambda x: x @ x.T)}


def digest(x):
    return hashlib.sha256(x.cpu().numpy().astype("<f8").tobytes()).hexdigest()[:8]


def answers(device, large):
    """{operation: the first eight hexadecimal digits of the sha256 of its result}."""
    x, y = sample(device, 60, 500), sample(device, 500, 40)
    with Exact(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = {name: digest(case(x, y)) for name, (_, case) in CASES.items()}
        if large:
            matrix = sample(device, 2048, 1024)
            found |= {name: digest(case(matrix)) for name, (_, case) in LARGE.items()}
    if large:
        matrix = (matrix * 2.0**20).round()
        found |= {name: digest(case(matrix)) for name, (_, case) in IN_FLOAT64.items()}
    return found


def check(device="cpu"):
    """Compute known answers on a device, in milliseconds once it is warm; on a GPU by its kernels,
    if it runs them, and by float64. Raises ArithmeticError, which names the first operation whose
    bits are others."""
    device = torch.device(device)
    if device.type == "cuda" and emulation():
        raise ArithmeticError(f"{' and '.join(emulation())}: cuBLAS may approximate float64 "
                              "products, and CUDA began before exact could turn that off: unset it")
    known = CASES | LARGE | IN_FLOAT64
    for name, found in answers(device, device.type == "cuda").items():
        expected, _ = known[name]
        if found != expected:
            raise ArithmeticError(f"{name} on {device} gives other bits than it must ({found}, "
                                  f"not {expected}): results there are not those of other machines")
