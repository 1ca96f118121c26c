"""Whether a device runs the kernels of exact/kernels.py; where it does not, float64 goes on."""

import functools
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

EMULATION = "CUBLAS_EMULATE_DOUBLE_PRECISION", "CUBLAS_EMULATION_STRATEGY"


def emulation():
    """Those of EMULATION that are on: with them cuBLAS 13 approximates float64 products."""
    return [name for name in EMULATION if os.environ.get(name, "0") != "0"]


if not torch.cuda.is_initialized():  # else it is too late, and the check says so
    os.environ[EMULATION[0]] = "0"
    os.environ.pop(EMULATION[1], None)


def by_zig(name, source, folder, library_dirs, include_dirs, libraries, *_):
    """Builds Triton's launcher by the C compiler of the ziglang wheel, which brings libc's headers;
    Python's must be there."""
    library = Path(folder) / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    headers = [*include_dirs, folder, sysconfig.get_paths()["include"]]
    subprocess.check_call(
        [sys.executable, "-m", "ziglang", "cc", "-target", f"{platform.machine()}-linux-gnu.2.28",
         source, "-O2", "-shared", "-fPIC", "-w", "-o", str(library),
         *(f"-L{each}" for each in library_dirs), *(f"-l:{each}" for each in libraries),
         *(f"-I{each}" for each in headers if each)], stdout=subprocess.DEVNULL)
    return str(library)


@functools.cache
def load(device):
    """(the module of kernels, None), or (None, what is missing)."""
    if os.environ.get("EXACT_KERNELS") == "0":
        return None, None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton on a CPU, for tests
    if device.type != "cuda":
        return (importlib.import_module("exact.kernels") if interpreted else None), None
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        return None, f"a GPU of compute capability 7.5 or more, this one has {capability}"
    if not importlib.util.find_spec("triton"):
        return None, "Triton, which comes with torch on Linux"
    import triton

    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        if not importlib.util.find_spec("ziglang"):
            return None, "a C compiler for Triton: gcc, clang or `pip install ziglang`"
        triton.knobs.build.impl = by_zig
    try:
        module = importlib.import_module("exact.kernels")
        for size in (2, 1024):  # there are other kernels for large matrices
            x = torch.ones(size, size, dtype=torch.float64, device=device)
            module.product(x, x, 21)
    except Exception as error:  # whatever Triton needs and does not find: Python's headers, …
        return None, f"what Triton needs to start ({type(error).__name__}: {str(error)[:200]})"
    return module, None


def kernels(device):
    """exact.kernels where `device` can run it, else None. With EXACT_KERNELS=0 in the environment
    none does: the bits stay."""
    return load(device)[0]


@functools.cache
def has_int8_products(device):
    """Whether Triton compiles products of int8 matrices for a device that runs kernels."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def missing(device):
    """What a GPU lacks to run the kernels, as a noun, else None. Without them exact arithmetic goes
    on in float64, with the same bits, and takes five times as long or more."""
    return load(device)[1]


def first_use(device):
    """Whether a GPU's kernels are to be compiled, in a minute: Triton's cache has none."""
    if (device.type != "cuda" or os.environ.get("EXACT_KERNELS") == "0"
            or not importlib.util.find_spec("triton")):
        return False
    import triton

    return not any(Path(triton.knobs.cache.dir).glob("*/row_digits_kernel.json"))
