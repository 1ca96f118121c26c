"""Exact arithmetic for torch: the same bits on any CPU, with any number of threads, on any GPU.

    from exact import Exact, check
    check("cuda")              # milliseconds: does this machine compute what is relied on here?
    with Exact():              # around the whole program: forward, backward and optimizer
        loss = loss_function(model(x), y)
        loss.backward()
        optimizer.step()       # SGD, Adam or AdamW, with foreach=False

Floating-point results differ between machines for two reasons, and both are removed.

1. Sums are taken in different orders. Here the terms of every sum are first rounded to integers
   times a power of two, with so few bits that no partial sum exceeds 2^53. float64 adds such
   numbers without rounding, so that no order, blocking or fused multiply-add can change the result.
2. exp, log and their like come from different libraries. Here they are tables and short polynomials
   in + - * / and square root, which IEEE 754 defines to the last bit; one operation at a time,
   since compilers may fuse two. The tables are themselves computed so.

The integers of a product have at most 23 bits, so that three signed bytes hold them. On an NVIDIA
GPU kernels (kernels.py, attention_kernels.py, in Triton) multiply these bytes on its int8 units and
add up in int32 and int64, which rounds nothing either: so the same integers, in less time than
float32 takes for most products. The rules in float64 are the definition. They go on where no kernel
runs: on CPUs, without Triton or a C compiler (gpu.py names what is missing), with EXACT_KERNELS=0
in the environment, and for shapes and masks that a kernel does not take.

A torch dispatch mode puts these rules in the place of torch's operations, below autograd: models,
losses and optimizers stay as they are. Rare operations, which have no rule, are taken apart as
torch's own table of decompositions says: their bits may change with torch's version, though not
with the machine; those of RULES do not. An operation with a part that has no rule raises, naming
itself.

It is for float64, and errors are those of fixed-point numbers: for a product some 2^-21 of the
largest value in its row times the largest in its column, for the features of a transformer with ten
layers 2e-6, for exp, log and tanh 2^-53 of 1 or of the result, whichever is larger. So features of
very unlike scale lose the small ones. In attention, weights below 2^-21 of a row's largest count as
0, and keys that are masked still share the values' grid. Grids belong to single rows, heads or
stretches of a clip: what is computed for an element of a batch does not depend on the others,
except for gradients of weights, which sum over them. Of several values that are written (not added)
to one place, torch says which one stays. NaN and infinity stay visible: all that shares a grid with
one is NaN (which of a NaN's bit patterns is not defined). Denormal numbers count as IEEE 754 says,
flush-to-zero is switched off.

Every thread of Python enters an Exact of its own. Out of scope: torch.compile, random numbers drawn
on a GPU, what Python computes itself (check() tests the powers that Adam takes), and what is
written through .data of a parameter that does not train, whose digits a GPU keeps.
"""

from exact.check import check
from exact.mode import Exact, in_exact
