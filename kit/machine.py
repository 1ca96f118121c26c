"""The machine: devices, arithmetic, memory, environment."""

import contextlib
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch.utils.data import Dataset

import exact
from exact import Exact, gpu
from kit.cli import UserError, torchrun


class Arithmetic:
    """What --precision and --device mean: `device`, `dtype` of parameters and inputs, and a context
    to compute in, `with arithmetic():`.

    exact: float64 under Exact, the same bits on any machine; checked here against known answers.
    float32: torch's own arithmetic made to repeat itself (deterministic kernels, an error where
    there is none); the same bits on one make of CPU or one GPU model.
    Raises UserError where there is no such device, or where it fails the check.
    """

    def __init__(self, precision, device="auto", threads=None):
        self.precision, self.device = precision, pick_device(device)
        self.dtype = torch.float64 if precision == "exact" else torch.float32
        # how many clips to compute together, and how many shapes as Graphs: some on a GPU, where
        # that decides no bit
        exact_on_gpu = self.device.type == "cuda" and precision == "exact"
        self.clips_together, self.most_graphs = (8, 4) if exact_on_gpu else (1, 0)
        if self.device.type == "cuda":
            sys.setswitchinterval(1e-4)  # seconds: the thread that feeds it waits less for others
        if threads:
            torch.set_num_threads(threads)
        if precision == "exact":
            say_of_kernels(self.device)
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
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def __call__(self):
        return Exact() if self.precision == "exact" else contextlib.nullcontext()


class Graphs:
    """Runs a function of one tensor as CUDA graphs: the first tensor of a shape is computed as
    usual, the second is captured, and later ones replay the capture, the same kernels without
    waiting for Python. What Python computes or decides it does once a shape, and weights must not
    change. At most `most` shapes have a graph, which keeps its memory; all tensors of others are
    computed as usual. For one thread."""

    def __init__(self, most):
        self.most, self.seen, self.captured, self.pool = most, set(), {}, None

    def run(self, function, x):
        if x.shape not in self.captured:
            if x.shape not in self.seen or len(self.captured) == self.most:
                y = function(x)
                self.seen.add(x.shape)
                return y
            graph, x_static = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                y_static = function(x_static)
            self.captured[x.shape], self.pool = (graph, x_static, y_static), graph.pool()
        graph, x_static, y_static = self.captured[x.shape]
        x_static.copy_(x)
        graph.replay()
        return y_static.clone()


def on_host(computed):
    """Yield (what, tensor) of each (what, tensor) once it is on the host. A GPU's is yielded after
    the next one has been started, which the GPU computes meanwhile. To wait for an event leaves the
    core to other threads, as .cpu() would not."""
    on_its_way = []
    for what, tensor in computed:
        copied = torch.cuda.Event(blocking=True) if tensor.is_cuda else None
        on_its_way.append((what, tensor.to("cpu", non_blocking=True), copied))
        if copied:
            copied.record()
        if not copied or len(on_its_way) > 1:
            yield arrived(*on_its_way.pop(0))
    for each in on_its_way:
        yield arrived(*each)


def arrived(what, tensor, copied):
    if copied:
        copied.synchronize()
    return what, tensor


def say_of_kernels(device):
    """One line on stderr if exact arithmetic's GPU kernels are compiled first, or cannot run."""
    if gpu.first_use(device):
        print("Compiling kernels for this GPU, once, in about a minute.", file=sys.stderr)
    if lack := gpu.missing(device):
        print(f"This GPU could be several times faster in exact arithmetic: it lacks {lack}. The "
              "bits are the same without.", file=sys.stderr)


def cores():
    """CPU cores for each of torchrun's processes on this machine."""
    return max(1, (os.cpu_count() or 1) // torchrun().local_count)


def pick_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no NVIDIA GPU here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = torchrun().local_rank
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


def one_machine(first, second):
    """Whether two environments name one kind of machine, on which float32 gives the same bits."""
    known = isinstance(first, dict) and isinstance(second, dict)
    return first == second or known and all(first.get(key) == second.get(key)
                                            for key in ("cpu", "device", "torch"))


# ------------------------------------------------------------------------------------------ memory


def has_room(device, size):
    """Whether `size` bytes fit into half of the memory that a device has free now; if a system does
    not say how much, a quarter of all memory counts as free."""
    if device.type == "cuda":
        return size < torch.cuda.mem_get_info(device)[0] / 2
    known = "SC_AVPHYS_PAGES" in os.sysconf_names
    pages = os.sysconf("SC_AVPHYS_PAGES") if known else os.sysconf("SC_PHYS_PAGES") / 4
    return size < pages * os.sysconf("SC_PAGE_SIZE") / 2


def room_for_activations(clips, frames, model, device):
    """Whether there is room for the activations of a whole batch: some 12 values a channel and 4 a
    feed-forward unit, for every frame and stage that trains."""
    width, inner = model.params["encoder_embed_dim"], model.params["encoder_ff_interm_features"]
    values = clips * frames * len(model.trained_stages) * (12 * width + 4 * inner)
    return has_room(device, values * model.norm.weight.element_size())


class FrozenOutputs(Dataset):
    """A FeatDataset seen through a model's frozen stages: yields (states, label[2]). Each clip's
    states are computed once and kept on the device `keep`, or computed at each use where that is
    None."""

    def __init__(self, dataset, model, arithmetic, keep=None):
        self.dataset, self.model, self.arithmetic = dataset, model, arithmetic
        self.keep, self.kept = keep, {}
        # with dropout the seeds of masks are drawn clip by clip
        self.together = 1 if model.frozen_dropout else arithmetic.clips_together

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        new = [index for index in dict.fromkeys(indices) if index not in self.kept]
        clips, found = [features for features, _ in self.dataset.__getitems__(new)], {}
        for group in groups_of_equal_length(clips, self.together):
            with self.arithmetic():
                outputs = self.model.run_frozen(torch.stack([
                    clips[place].to(self.arithmetic.device) for place in group]))
            # to pinned memory of the host, without waiting: only the GPU reads it again
            outputs = outputs.to(self.keep, non_blocking=True) if self.keep else outputs
            found |= {new[place]: states for place, states in zip(group, outputs)}
        if self.keep:
            self.kept |= found
        for index in indices:
            yield found[index] if index in found else self.kept[index], self.dataset.labels[index]


def groups_of_equal_length(clips, size):
    """Places of clips[T, …] that have one length, up to `size` in a list."""
    places = {}
    for place, clip in enumerate(clips):
        places.setdefault(len(clip), []).append(place)
    return [same[start:start + size] for same in places.values()
            for start in range(0, len(same), size)]


def flat_parameter(parameters):
    """One parameter with the numbers of `parameters`, which become views of it: clipping and AdamW
    take as many operations for all of them as for one, and on a GPU that is what they cost."""
    flat = torch.nn.Parameter(torch.cat([each.detach().flatten() for each in parameters]))
    for each, view in zip(parameters, flat.detach().split([each.numel() for each in parameters])):
        each.data = view.view_as(each)
    return flat


def frozen_outputs(data, model, arithmetic, options):
    """{"train": …, "val": …}: the FrozenOutputs of a DEAMFeatHandler's songs, kept on the model's
    device or the host, where there is room; features that no stage is frozen for, as stored. Also
    settles whether the model recomputes activations, for want of room."""
    device, weight = arithmetic.device, model.norm.weight
    frames = max((entry["frames"] for entry in (data.manifest["songs"] or {}).values()),
                 default=2250)
    model.recompute = not room_for_activations(options.batch_size, frames, model, device)
    dtype = weight.dtype if model.frozen_stages else getattr(torch, data.settings["store"])
    values = (frames if model.trained_stages else 1) * len(weight)
    size = len(data.ids["train"] + data.ids["val"]) * values * dtype.itemsize
    keep = next((each for each in (device, torch.device("cpu")) if has_room(each, size)), None)
    # with dropout in them, the frozen stages give another output in each step
    keep = {"train": None if options.frozen_dropout else keep, "val": keep}
    return {split: FrozenOutputs(data.datasets[split], model, arithmetic, keep[split])
            for split in keep}
