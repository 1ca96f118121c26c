"""The machine: devices, arithmetic, memory, environment."""

import os
import platform
import re
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

import exact
from exact import Exact
from kit.cli import UserError


class Arithmetic:
    """What --precision and --device mean: `device`, `dtype` of parameters and inputs, and a context
    to compute in, `with arithmetic():`.

    exact: float64 under Exact, the same bits on any machine; checked here against known answers.
    float32, bfloat16: torch's own arithmetic made to repeat itself (deterministic kernels, an error
    where there is none); the same bits on one make of CPU or one GPU model.
    Raises UserError where there is no such device, or where it fails the check.
    """

    def __init__(self, precision, device="auto", threads=None):
        self.precision, self.device = precision, pick_device(device)
        self.dtype = torch.float64 if precision == "exact" else torch.float32
        if threads:
            torch.set_num_threads(threads)
        if precision == "exact":
            try:
                exact.check(self.device)
            except ArithmeticError as error:
                raise UserError(f"{error}: this machine cannot give the kit's digests; use another "
                                "--device, or --precision float32, which claims less") from None
            return
        torch.set_deterministic_debug_mode("error")
        # filling uninitialised memory takes a fifth of the time, and nothing here reads any
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.backends.cudnn.enabled = precision == "float32"  # its other convolutions are slower
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def __call__(self):
        """A new context each time: one autocast entered twice, nested, would stay on for good."""
        if self.precision == "exact":
            return Exact()
        bfloat16 = self.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)


def pick_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no NVIDIA GPU here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's number of a process on its machine
    if place >= torch.cuda.device_count():
        raise UserError(f"process {place + 1} has no GPU: torch sees {torch.cuda.device_count()} "
                        "here; lower torchrun's --nproc-per-node")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def environment(device):
    """What a result was computed with. Recorded beside every digest, never inside one."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "python": platform.python_version(), "torch": torch.__version__,
        "torchaudio": torchaudio.__version__, "numpy": np.__version__,
        "soundfile": soundfile.__version__, "libsndfile": soundfile.__libsndfile_version__,
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def has_room(device, size):
    """Whether `size` bytes fit into half of the memory that a device has free now; if a system does
    not say how much, a quarter of all memory counts as free."""
    if device.type == "cuda":
        return size < torch.cuda.mem_get_info(device)[0] / 2
    known = "SC_AVPHYS_PAGES" in os.sysconf_names
    pages = os.sysconf("SC_AVPHYS_PAGES") if known else os.sysconf("SC_PHYS_PAGES") / 4
    return size < pages * os.sysconf("SC_PAGE_SIZE") / 2
