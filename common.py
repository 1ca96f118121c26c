"""What extract.py, train.py and eval.py share, in the order in which it is used:

    determinism · command line · digests and safe files · backbone · DEAM and the demo corpus · features ·
    model and heads · loss

To try another head or another loss, change `Head` or `emotion_loss` at the end; nothing else depends on them.
"""

import os

# Read once, when torch loads its libraries: this has to stand before the import. Without these the arithmetic
# follows the CPU it runs on (AVX2 here, AVX-512 there) and the number of threads.
PINS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2,STRICT",
}
os.environ.update(PINS)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # no bits, but time: large tensors on large pages of memory

import argparse
import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import math
import platform
import re
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# ------------------------------------------------------------------------------------------- determinism


def set_determinism(threads, precision="float32"):
    """Make torch repeat itself: deterministic kernels (an error where there is none), `threads` CPU threads,
    TF32 only when `precision` asks for it."""
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("error")  # as use_deterministic_algorithms, without importing a compiler
    torch.utils.deterministic.fill_uninitialized_memory = False  # a fifth of the time, and nothing here reads any
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.enabled = precision in ("float32", "tf32")  # its other convolutions are slower
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def arithmetic(precision, device):
    """The dtype of parameters and inputs, and a function that makes the autocast context to compute in, for a
    --precision. A new one each time: one context entered twice, nested, would stay on for good."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 needs an NVIDIA GPU: use float32 on a CPU")
    dtype = torch.float64 if precision == "float64" else torch.float32
    return dtype, lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def environment(device):
    """What a result was computed with. Recorded beside every digest, never inside one."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchaudio": torchaudio.__version__,
        "numpy": np.__version__, "soundfile": soundfile.__version__, "libsndfile": soundfile.__libsndfile_version__,
        "cpu": cpu[1] if cpu else platform.processor(), "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


# ------------------------------------------------------------------------------------------ command line


class UserError(Exception):
    """Something the user can put right: one line that says what is wrong and what to do."""


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, a default in every help line, and the flags that all scripts take."""

    def __init__(self, description, threads):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)
        self.add_argument("--splits", type=Path, default=Path(__file__).parent / "splits.json", metavar="FILE",
                          help="JSON with the song ids of train, val and test")
        self.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
        self.add_argument("--threads", type=number(int, 1), default=threads, metavar="N",
                          help="CPU threads (extract.py beside a GPU: one)")

    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def number(kind, low, above=False):
    """An argparse type: a finite int or float that is at least `low`, or above it."""

    def parse(text):
        value = kind(text)
        if not (value > low if above else value >= low) or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {low}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def run_script(run, parser, go_on):
    """Run a script: exit with its code; expected failures as one line and exit code 2, Ctrl-C as one line and 130."""
    try:
        code = run(parser.parse_args())
    except UserError as error:
        code = f"error: {error}"
    except torch.OutOfMemoryError:
        code = "error: too little free GPU memory: lower --batch-size (train: --micro-batch), or use --device cpu"
    except KeyboardInterrupt:
        print(f"\ninterrupted: {go_on}", file=sys.stderr, flush=True)
        os._exit(130)  # at once: decoding threads may be in the middle of a song
    except BrokenPipeError:  # `… | head` has read enough
        os._exit(141)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 2
    sys.exit(code)


def pick_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no NVIDIA GPU here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's number of a process on its machine
    if place >= torch.cuda.device_count():
        raise UserError(f"process {place + 1} has no GPU: torch sees {torch.cuda.device_count()} here; lower "
                        "torchrun's --nproc-per-node")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


@functools.cache
def pool(threads):
    """`threads` threads for the whole process, each with one CPU thread inside torch."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def ahead(function, items, threads=8):
    """Yield function(item) for each of items, in their order, computed a few items ahead by `threads` threads, which
    use one CPU thread each inside torch. The function must not use ahead itself."""
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool(threads).submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class Progress(tqdm):
    """tqdm's bar on a terminal; elsewhere a plain line every half minute."""

    def __init__(self, *args, **settings):
        if not sys.stderr.isatty():
            settings.update(mininterval=30, delay=30, leave=False)
        super().__init__(*args, **settings)

    @staticmethod
    def status_printer(file):
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda line: line.strip() and print(line.strip(), file=file, flush=True)

    def say(self, line):
        """Print a line to stdout, above the bar where there is one."""
        self.write(line) if sys.stderr.isatty() else print(line, flush=True)


# -------------------------------------------------------------------------------- digests and safe files


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def tensor_digest(tensor):
    """sha256 over dtype, shape and little-endian bytes: never over a file format, which may change."""
    array = np.ascontiguousarray(tensor.detach().cpu().numpy() if isinstance(tensor, torch.Tensor) else tensor)
    digest = hashlib.sha256(f"{array.dtype.name} {list(array.shape)}\n".encode())
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    digest.update(little.reshape(-1).data.cast("B"))  # the bytes without a copy: 45 s of PCM are 16 MB
    return digest.hexdigest()


def state_digest(state):
    """sha256 over the sorted names and the digests of a state dict's tensors, buffers included."""
    names = sorted(state)
    digests = ahead(tensor_digest, [state[name] for name in names])
    return sha256("".join(f"{name} {digest}\n" for name, digest in zip(names, digests)).encode())


def json_digest(value):
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def write_file(path, data):
    """Write bytes or text so that the file is there whole or not at all, whatever happens meanwhile.
    Raises UserError where the disk is full or the folder may not be written."""
    path, data = Path(path), data.encode() if isinstance(data, str) else data
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left in {path.parent}: {path.name} needs {len(data) / 1e6:.1f} MB more; "
                            "free some, then run the same command again") from None
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that you may write to") from None


def write_json(path, value):
    write_file(path, json.dumps(value, indent=1) + "\n")


def write_tensors(path, value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_file(path, buffer.getbuffer())


def write_csv(path, header, rows):
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    write_file(path, table.getvalue())


def read_json(path, what):
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not {what}: not valid JSON ({error})") from None


def read_tensors(path, what):
    """torch.load that can only make tensors and plain values, never run code. Raises UserError."""
    try:
        open(path, "rb").close()  # apart: torch.load raises OSError for damaged files too
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler raises nearly anything on a file that is not its own
        raise UserError(f"{path} is not {what}: damaged, or it holds more than tensors and plain values") from None


# ---------------------------------------------------------------------------------------------- backbone

# The demo's backbone: wav2vec2-base in small. Same strides, so the same 50 frames a second, and 12 layers.
DEMO = {
    **torchaudio.pipelines.WAV2VEC2_BASE._params,
    "extractor_conv_layer_config": [(32, kernel, stride) for _, kernel, stride
                                    in torchaudio.pipelines.WAV2VEC2_BASE._params["extractor_conv_layer_config"]],
    "extractor_mode": "layer_norm", "extractor_conv_bias": True,
    "encoder_embed_dim": 64, "encoder_num_heads": 4, "encoder_ff_interm_features": 128,
    "encoder_pos_conv_kernel": 32, "encoder_pos_conv_groups": 4,
}
# oneDNN's float32 convolutions add up in an order that follows the thread count and the batch: they always get this
# many threads, however many --threads asks for elsewhere, and one clip at a time, so that features are the same bits.
CONVOLUTION_THREADS = 8
CHUNK = 64  # frames that a thread takes through the float64 convolutions: what fits its cache
POSITION = "encoder.transformer.pos_conv_embed.conv."


def architecture(bundle):
    """(settings for torchaudio.models.wav2vec2_model, sample rate in Hz, whether waveforms are z-scored)."""
    if bundle == "DEMO":
        return DEMO, 16000, False
    known = {name: value for name, value in vars(torchaudio.pipelines).items()
             if isinstance(value, torchaudio.pipelines.Wav2Vec2Bundle)}
    if bundle not in known:
        raise UserError(f"there is no bundle {bundle}: choose DEMO, {', '.join(sorted(known))}")
    if known[bundle]._model_type == "WavLM":
        raise UserError(f"{bundle} is a WavLM: its layers share one position bias, so the top layers cannot be run "
                        "on cached states; choose a WAV2VEC2_… or HUBERT_… bundle")
    params = {**known[bundle]._params, "aux_num_out": None}
    return params, int(known[bundle].sample_rate), known[bundle]._normalize_waveform


def empty_backbone(bundle):
    """The bundle's network with weights yet to be loaded, its positional weight norm removed."""
    model = torchaudio.models.wav2vec2_model(**architecture(bundle)[0])
    parametrize.remove_parametrizations(model.encoder.transformer.pos_conv_embed.conv, "weight")
    return model.eval()


class Backbone:
    """A frozen wav2vec2 encoder: waveforms in, hidden states out.

    weights: None downloads the bundle's own (torch hub's cache is used); a path loads a Hugging Face wav2vec2
    `pytorch_model.bin` or a torchaudio state dict into the bundle's architecture.
    normalize: "auto" z-scores each waveform where the bundle or the Hugging Face processor does; "on"; "off".
    digest: of the float32 weights, whatever file they came from. file: its name and sha256, None for DEMO.
    Raises UserError for an unknown bundle, unreadable or unfitting weights, or no network.
    """

    def __init__(self, bundle, weights=None, normalize="auto"):
        _, self.sample_rate, z_scored = architecture(bundle)
        epsilon, self.file = 1e-5, None
        if weights is not None:
            state = read_tensors(weights, "a file of weights")
            if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
                raise UserError(f"{weights} is not a state dict: give a Hugging Face pytorch_model.bin or a "
                                "torchaudio state dict")
            if not any(name.startswith("encoder.transformer.") for name in state):
                state, z_scored, epsilon = from_hugging_face(state), True, 1e-7
            with open(weights, "rb") as file:
                self.file = {"name": Path(weights).name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        elif bundle == "DEMO":
            state = demo_weights()
        else:
            state = downloaded_weights(bundle)
        self.model = empty_backbone(bundle)
        state = {name: tensor.float() for name, tensor in fold_weight_norm(state).items()}
        extra = [name for name in state if name.startswith("aux.")]  # a speech recogniser's output layer
        try:
            self.model.load_state_dict({name: value for name, value in state.items() if name not in extra})
        except RuntimeError:
            raise UserError(f"{weights or bundle}: these weights do not fit the architecture of {bundle}; "
                            "name theirs with --bundle") from None
        self.digest = state_digest(self.model.state_dict())
        if normalize != "auto":
            z_scored = normalize == "on"
        # torchaudio's bundles use layer_norm's epsilon, the Hugging Face processor 1e-7
        self.epsilon = epsilon if z_scored else None

    @torch.inference_mode()
    def hidden_states(self, waveforms, layer):
        """float[B, samples] of equal length, on the CPU → float[B, T, D] on the model's device: the states after
        `layer` encoder layers; layer 0 is the encoder's input. Never pad a waveform: the first group norm runs over
        time, so padding would change every frame."""
        if self.epsilon is not None:  # with numpy: torch's sum of one long row follows the thread count too
            rows = [row - row.mean() for row in waveforms.double().numpy()]
            rows = [row / np.sqrt((row * row).mean() + self.epsilon) for row in rows]
            waveforms = torch.from_numpy(np.stack(rows)).to(waveforms.dtype)
        transformer, threads = self.model.encoder.transformer, torch.get_num_threads()
        device = transformer.layer_norm.weight.device
        if device.type == "cuda":
            waveforms = waveforms.pin_memory().to(device, non_blocking=True)
        extractor, states = self.model.feature_extractor, []
        torch.set_num_threads(CONVOLUTION_THREADS)
        for waveform in waveforms.split(1):
            if waveform.dtype == torch.float64 and device.type == "cpu":
                features = convolve_in_chunks(extractor.conv_layers, waveform, threads)
            else:
                features, _ = extractor(waveform, None)
            states.append(transformer._preprocess(self.model.encoder.feature_projection(features)))
        torch.set_num_threads(threads)
        states = torch.cat(states)
        for encoder_layer in transformer.layers[:layer]:  # one by one: forward() may skip layers at random
            states, _ = encoder_layer(states)
        return states


def convolve_in_chunks(blocks, waveform, threads):
    """A feature extractor's blocks on float64[1, samples], on a CPU → [1, T, channels]: what its forward gives, up to
    float64's rounding, in half the time and with little memory.

    oneDNN has no float64 convolutions; torch's own write out whole layers and wait for memory. Here each thread takes
    CHUNK frames at a time through all layers. Only the first layer's group norm looks beyond them: its mean and
    variance over time are put together beforehand (Chan, Golub & LeVeque 1983, The American Statistician 37).
    """
    hop, field = 1, 1  # samples from frame to frame, and those that one frame sees
    for block in blocks:
        field, hop = field + (block.kernel_size - 1) * hop, hop * block.stride
    first, norm, source = blocks[0], blocks[0].layer_norm, waveform[None]
    whole_clip = isinstance(norm, nn.GroupNorm)

    @torch.inference_mode()
    def moments(start):
        """Count, means and sums of squared deviations of outputs `start`, … of the first convolution."""
        stop = (start + step - 1) * first.stride + first.kernel_size
        outputs = first.conv(source[:, :, start * first.stride:stop])
        mean = outputs.mean(2, keepdim=True)
        return outputs.shape[2], mean, outputs.sub_(mean).square_().sum(2, keepdim=True)

    if whole_clip:
        step, count, mean, squares = CHUNK * hop // first.stride, 0, 0, 0
        for n, part, deviations in ahead(moments, range(0, (source.shape[2] - first.kernel_size) // first.stride + 1,
                                                        step), threads):
            squares = squares + deviations + (part - mean) ** 2 * (count * n / (count + n))
            mean, count = mean + (part - mean) * (n / (count + n)), count + n
        scale = norm.weight[:, None] / (squares / count + norm.eps).sqrt()
        shift = norm.bias[:, None] - mean * scale

    @torch.inference_mode()
    def features(start):
        x = source[:, :, start * hop:(start + CHUNK - 1) * hop + field]
        if whole_clip:
            x = F.gelu(first.conv(x).mul_(scale).add_(shift))
        for block in blocks[1 if whole_clip else 0:]:
            x, _ = block(x, None)
        return x

    frames = (source.shape[2] - field) // hop + 1
    return torch.cat(list(ahead(features, range(0, frames, CHUNK), threads)), 2).transpose(1, 2)


def backbone_of(settings, weights, whose, file=None):
    """The Backbone that made features with these manifest `settings`, from `weights` (None: the bundle's own).
    Raises UserError, speaking of `whose` features and of their weights' `file`, where these are other weights."""
    backbone = Backbone(settings["bundle"], weights)
    backbone.epsilon = settings.get("normalize_epsilon")
    wanted = settings.get("weights_sha256", backbone.digest)
    if backbone.digest != wanted:
        raise UserError(f"the features of {whose} were made by other weights ({wanted[:16]}…) than these "
                        f"({backbone.digest[:16]}…): pass {file or 'the file that extract.py was given'} with "
                        "--weights, or leave that out if it was given none")
    return backbone


def downloaded_weights(bundle):
    path = getattr(torchaudio.pipelines, bundle)._path
    try:
        return dict(torchaudio.pipelines._wav2vec2.utils._get_state_dict(path, {"progress": sys.stderr.isatty()}))
    except OSError as error:  # urllib's errors are OSErrors
        url = path if path.startswith("https") else f"https://download.pytorch.org/torchaudio/models/{path}"
        raise UserError(f"cannot download the weights of {bundle} ({error}): fetch {url} elsewhere and pass it with "
                        f"--weights, or place it in {Path(torch.hub.get_dir()) / 'checkpoints'}") from None


def from_hugging_face(state):
    """Rename a Hugging Face wav2vec2 or HuBERT state dict to torchaudio's names; pretraining-only parts are dropped."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^(wav2vec2|hubert)\.", "", name)
        if name.startswith("feature_extractor."):
            renamed[name] = value
        elif name.startswith("feature_projection."):
            renamed["encoder." + name] = value
        elif name.startswith("encoder."):
            renamed["encoder.transformer." + name.removeprefix("encoder.")] = value
    return renamed


def fold_weight_norm(state):
    """Replace the positional convolution's direction and length by their product, in either spelling of weight norm.
    torch's own bits of it depend on the thread count, so it is done once, in float64, with numpy."""
    state = dict(state)
    spellings = ("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")
    for length, direction in spellings:
        if POSITION + length in state and POSITION + direction in state:
            g, v = (state.pop(POSITION + part).double().numpy() for part in (length, direction))
            state[POSITION + "weight"] = torch.from_numpy(v * (g / np.sqrt((v * v).sum((0, 1), keepdims=True))))
    return state


def demo_weights():
    """Random weights for DEMO. Uniform draws are exact arithmetic, so they are the same on every machine.
    The gains are such that loudness and timbre survive ten random layers."""
    generator, state = np.random.default_rng(1744), {}
    for name, value in empty_backbone("DEMO").state_dict().items():
        if "norm" in name:
            state[name] = torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value)
            continue
        gain = 3 if "conv_layers" in name else 1 if "projection" in name else 0.5
        bound = gain * math.sqrt(3 / value[0].numel()) if value.ndim > 1 else 0.05
        state[name] = torch.from_numpy(((2 * generator.random(tuple(value.shape)) - 1) * bound).astype(np.float32))
    return state


# -------------------------------------------------------------------------- DEAM, and the demo corpus

KAGGLE = "imsparsh/deam-mediaeval-dataset-emotional-analysis-in-music/versions/1"  # a bare handle means "latest"
STATIC = "static_annotations_averaged_songs_1_2000.csv"
COLUMNS = ["song_id", "valence_mean", "valence_std", "arousal_mean", "arousal_std"]
SHORTEST = 400  # samples at 16 kHz: the receptive field of one frame of the encoder


class BadClip(Exception):
    """One audio file that cannot be used; the others can."""


def read_annotations(path):
    """Static annotations: {song id: the four numbers after song_id in COLUMNS, as they are written}.
    Other columns, stray spaces and CRLF are fine; missing columns, gaps, NaN and double ids raise UserError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the annotations {path}: {error}") from None
    header, songs = rows[0] if rows else [], {}
    if missing := [name for name in COLUMNS if name not in header]:
        raise UserError(f"{path}: no column {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
    places = [header.index(name) for name in COLUMNS]
    for line, row in enumerate(rows[1:], 2):
        if not any(row):
            continue
        try:
            song, values = int(row[places[0]]), [row[place] for place in places[1:]]
            if not all(math.isfinite(float(value)) for value in values):
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(f"{path}, line {line}: not five finite numbers; take the file from a fresh copy of "
                            "DEAM") from None
        if song in songs:
            raise UserError(f"{path}, line {line}: song {song} stands there twice; take the file from a fresh copy of "
                            "DEAM")
        songs[song] = values
    if not songs:
        raise UserError(f"{path}: no songs in it")
    return songs


def read_splits(path):
    """{"train": [ids], "val": [ids], "test": [ids]}, disjoint, their order kept. Raises UserError."""
    splits = read_json(path, "a file of splits")
    lists = [splits.get(name) for name in ("train", "val", "test")] if isinstance(splits, dict) else [None]
    if not all(isinstance(ids, list) and ids and all(type(song) is int for song in ids) for ids in lists):
        raise UserError(f'{path} is not a file of splits: it needs lists of song ids named "train", "val" and "test"')
    if len(set(sum(lists, []))) != len(sum(lists, [])):
        raise UserError(f"{path}: a song stands in it twice; splits must be disjoint")
    return dict(zip(("train", "val", "test"), lists))


class DEAMHandler:
    """DEAM in a folder: `annotations` {song id: label strings}, `dynamic` {"valence": path, "arousal": path} of the
    annotations over time, where they are there; `audio` {song id: path}; `get_waveform`.

    root: the folder, in any layout (Kaggle's, the two original zip files', spaces or underscores): it is searched
    for the static annotations and for files named <song id>.mp3 (.wav, .flac, .ogg). "kaggle" downloads version 1.
    demo: whether this is the synthetic corpus. Raises UserError where there is no DEAM.
    """

    def __init__(self, root):
        if str(root) == "kaggle":
            import kagglehub  # here, because only this needs it and it is slow to load

            try:
                root = kagglehub.dataset_download(KAGGLE)
            except Exception as error:  # requests', kagglehub's own and the operating system's, in many versions
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"cannot download DEAM from Kaggle ({reason[:150]}): check the network, or fetch "
                                "kaggle.com/datasets/" + KAGGLE.split("/versions")[0] + " elsewhere, unpack it and "
                                "pass the folder with --deam") from None
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"no folder {root}: give DEAM's with --deam PATH, or --deam demo to try the kit without it")
        files = [Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names]
        tables = [path for path in files if path.name.replace(" ", "_") == STATIC]
        if not tables:
            raise UserError(f"no DEAM in {root}: {STATIC} is nowhere in it; unpack DEAM_Annotations there")
        self.annotations, self.audio, self.demo = read_annotations(min(tables)), {}, (root / DEMO_NOTE).exists()
        self.dynamic = {path.stem: path for path in files
                        if path.name in ("valence.csv", "arousal.csv") and "dynamic" in path.parent.name}
        for path in sorted(files):
            if path.suffix.lower() in (".mp3", ".wav", ".flac", ".ogg") and path.stem.isdecimal():
                song = int(path.stem)
                if song in self.audio:
                    raise UserError(f"two files for song {song}: {self.audio[song]} and {path}; keep one")
                self.audio[song] = path

    def get_waveform(self, song_id, sample_rate=16000, dtype=torch.float32):
        """(waveform[samples] at `sample_rate`, mono; sha256 of the decoded float32 PCM). Raises BadClip."""
        return read_waveform(self.audio[song_id], sample_rate, dtype)


def read_waveform(path, sample_rate, dtype=torch.float32):
    """A whole file as (waveform[samples], digest of its decoded PCM). Raises BadClip."""
    [(waveform, pcm)] = read_windows(path, sample_rate, dtype)
    return waveform, tensor_digest(pcm)


def read_windows(path, sample_rate, dtype=torch.float32, seconds=None):
    """Decode a file, average its channels, resample. Yields (waveform[samples], float32 PCM [samples, channels]): the
    whole file, or one after the other equal windows of about `seconds`, as many as fit its length best.
    Raises BadClip for a file that is empty, truncated (where its header says how long it was), not audio, not
    finite, or shorter than one frame of the encoder."""
    try:
        with soundfile.SoundFile(path) as file:
            announced, rate, notes = file.frames, file.samplerate, file.extra_info
            windows = max(1, round(announced / rate / seconds)) if seconds else 1
            size, length = -1 if windows == 1 else -(-announced // windows), 0
            while size > 0 or not length:
                pcm = file.read(size, dtype="float32", always_2d=True)
                length += len(pcm)
                if not np.isfinite(pcm).all():
                    raise BadClip("holds NaN or infinity")
                if len(pcm) * sample_rate >= SHORTEST * rate:
                    mono = torch.from_numpy(pcm).to(dtype).mean(1)
                    yield torchaudio.functional.resample(mono, rate, sample_rate), pcm
                elif length * sample_rate < SHORTEST * rate:
                    raise BadClip(f"too short: {length / rate:.3f} s, one frame needs {SHORTEST / sample_rate:.3f} s")
                else:  # a rest shorter than a frame
                    break
    except (soundfile.LibsndfileError, OSError) as error:
        empty = Path(path).is_file() and Path(path).stat().st_size == 0
        raise BadClip("empty file" if empty else f"not readable as audio ({error})") from None
    # libsndfile shortens a truncated WAV silently, but notes it. Programs that stream a WAV write 0xFFFFFFFF.
    note = re.search(r"data : (\d+) \(should be (\d+)\)", notes)
    if length < announced - rate // 10 or note and int(note[2]) < int(note[1]) < 0xFFFFFF00:
        raise BadClip("truncated: shorter than its own header says")


DEMO_NOTE = "SYNTHETIC.txt"
DEMO_SECONDS, DEMO_RATE = 6, 44100
DEMO_SONGS = {"train": 40, "val": 10, "test": 10}


def demo_song(song_id):
    """Synthesise one song: (int16[samples, 2], its labels as strings, dynamic labels {dimension: values in -1..1}).

    Arousal follows tempo and loudness, valence follows mode and brightness, as the literature on musical emotion has
    it (Gabrielsson & Lindström 2010, in Handbook of Music and Emotion), plus what ten annotators would disagree.
    Only table look-ups, sums, products and rounding: the same samples on every machine.
    """
    draw = np.random.default_rng([1744, song_id])
    tempo, loudness, brightness, key = draw.random(4)  # each from low (0) to high (1)
    major, register = draw.random() < 0.5, draw.integers(-1, 2)
    samples = DEMO_SECONDS * DEMO_RATE
    sine = np.rint(np.sin(2 * np.pi * np.arange(4096) / 4096) * 1e6) / 1e6
    pitch = 57 + int(12 * key) + 12 * register  # MIDI note of the tonic
    third, chords = (4, (0, 7, 9, 5)) if major else (3, (0, 8, 3, 10))
    beat = int(DEMO_RATE * 60 / (60 + 120 * tempo))
    partials = [round(float((0.1 + 0.85 * brightness) ** n), 6) for n in range(12)]
    song = np.zeros((samples, 2))
    for count, start in enumerate(range(0, samples, beat // 2)):  # an arpeggio in quavers over a chord a bar
        root = pitch + chords[count // 8 % 4]
        length = min(DEMO_RATE // 3, samples - start)  # plucked: slow songs have gaps
        clock = np.arange(length, dtype=np.uint64)
        fade = np.minimum(clock / 400, 1) * (1 - clock / (DEMO_RATE // 3)) ** 2
        bass, upper = (root - 12, 0.8, 0.5), (root + (0, third, 7, 12)[count % 4], 1.0, 0.3 + 0.4 * (count % 2))
        for note, weight, pan in (bass, upper):
            step = int(round(2**32 * 440 * 2 ** ((int(note) - 69) / 12) / DEMO_RATE))  # of a 32-bit phase
            tone = np.zeros(length)
            for n, partial in enumerate(partials, 1):
                if n * step < 2**31:  # below the Nyquist frequency
                    tone += partial * sine[(clock * np.uint64(n * step) & np.uint64(2**32 - 1)) >> np.uint64(20)]
            song[start:start + length] += (weight * fade * tone)[:, None] * np.array([1 - pan, pan])
    song *= (0.05 + 0.45 * loudness) / np.abs(song).max()
    song += 0.01 * (2 * draw.random((samples, 2)) - 1)  # the room: a quiet song has more of it
    song = np.rint(32767 * np.clip(song, -1, 1)).astype("<i2")

    truth = {"valence": 5 + (0.7 if major else -0.7) + 4.0 * (brightness - 0.5),
             "arousal": 5 + 3.2 * (tempo - 0.5) + 3.2 * (loudness - 0.5)}
    labels, dynamic = [], {}
    for name, value in truth.items():
        spread = 1.5 + 1.3 * (draw.random() - 0.5)  # over songs as in DEAM: mean 1.5, standard deviation 0.4
        noise = spread / math.sqrt(10) * math.sqrt(3) * (2 * draw.random() - 1)
        mean = min(max(value + noise, 1), 9)
        labels += [f"{mean:.1f}", f"{spread:.2f}"]
        dynamic[name] = [round((mean - 5) / 4 + 0.1 * (draw.random() - 0.5), 6) for _ in range(2 * DEMO_SECONDS - 2)]
    return song, labels, dynamic


def make_demo(root, splits):
    """Write the demo corpus under `root` as DEAM's Kaggle layout, quirks of its CSV files included; the ids are the
    first 40, 10 and 10 of train, val and test. A corpus that is there already is left alone."""
    root, averaged = Path(root), "DEAM_Annotations/annotations/annotations averaged per song"
    if (root / DEMO_NOTE).exists():
        return
    songs = sorted(song for name, count in DEMO_SONGS.items() for song in splits[name][:count])
    static, dynamic = [", ".join(COLUMNS)], {"valence": [], "arousal": []}
    for song_id in Progress(songs, desc="demo corpus", unit="song"):
        song, labels, moving = demo_song(song_id)
        buffer = io.BytesIO()
        soundfile.write(buffer, song, DEMO_RATE, format="WAV")
        write_file(root / f"DEAM_audio/MEMD_audio/{song_id}.wav", buffer.getvalue())
        static.append(",".join([str(song_id), *labels]))
        for name, values in moving.items():
            dynamic[name].append(",".join([str(song_id), *map(str, values), ""]))  # rows end in an empty cell
    write_file(root / averaged / "song_level" / STATIC, "\r\n".join(static) + "\r\n")
    times = ",".join(f"sample_{1000 + 500 * n}ms" for n in range(2 * DEMO_SECONDS - 2))
    for name, rows in dynamic.items():
        write_file(root / averaged / "dynamic (per second annotations)" / f"{name}.csv",
                   "\r\n".join([f"song_id,{times},", *rows]) + "\r\n")
    write_file(root / DEMO_NOTE, "These songs and labels are synthetic. Results on them say nothing about DEAM.\n")


# ---------------------------------------------------------------------------------------------- features


def manifest_digest(manifest):
    """One digest over how the features were made, the labels beside them, and every song's PCM and features."""
    return json_digest({key: manifest[key] for key in ("corpus", "settings", "annotations", "swapped_labels", "songs")})


def read_manifest(root):
    """DEAM_feats/manifest.json, or None where there is none. Raises UserError where it was edited or is no manifest."""
    path = Path(root) / "manifest.json"
    if not path.exists():
        return None
    manifest = read_json(path, "a manifest")
    try:
        if manifest["digest"] == manifest_digest(manifest):
            return manifest
    except (TypeError, KeyError):
        pass
    raise UserError(f"{path} does not match its own digest: it was edited or damaged; delete {root} and extract again")


class FeatDataset(Dataset):
    """Yields (features[T, D] as stored, label[2] float64: valence, arousal on 1–9). A file's digest is checked against
    the manifest when it is first read. Raises UserError naming a file that is missing, damaged or not [T, D]."""

    def __init__(self, root, ids, annotations, manifest, dimension):
        self.root, self.ids, self.manifest, self.dimension, self.verified = Path(root), ids, manifest, dimension, set()
        self.labels = torch.tensor([[float(annotations[song][0]), float(annotations[song][2])] for song in ids],
                                   dtype=torch.float64).reshape(-1, 2)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        song = self.ids[index]
        path = self.root / "songs" / f"{song}.pt"
        features = read_tensors(path, "a feature file")
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or features.shape[1] != self.dimension:
            raise UserError(f"{path}: not a tensor [T, {self.dimension}]; extract this song again")
        if self.manifest and song not in self.verified:
            if tensor_digest(features) != self.manifest["songs"][str(song)]["features"]:
                raise UserError(f"{path} is damaged: not the features that the manifest vouches for; run extract.py "
                                "again")
            self.verified.add(song)
        return features, self.labels[index]

    def __getitems__(self, indices):
        """Many at once, in order, the next files read meanwhile."""
        return ahead(self.__getitem__, indices)


def collate(batch):
    """Clips stay apart, ([features[T, D], …], labels[B, 2]): padding them would change what the encoder sees."""
    clips, labels = zip(*batch)
    return list(clips), torch.stack(labels)


class DEAMFeatHandler:
    """A DEAM_feats folder and a frozen split: `ids`, `datasets`, `train`, `val`, `test` (DataLoaders), and the label
    statistics `mean`, `std` (float64[2], population σ over train and val).

    labels: "corrected" exchanges valence and arousal for the ranges of ids in `swapped`, where extract.py's audit found
    them exchanged (None: it had no dynamic annotations to compare with).
    Raises UserError for a folder that is not one, songs that are missing (unless allow_missing) or a split that
    names unknown songs. A folder without manifest, as the published notebook made them, is taken as
    WAV2VEC2_BASE layer 10.
    """

    def __init__(self, root, splits, batch_size=32, seed=0, allow_missing=False, labels="shipped"):
        root = Path(root)
        if not (root / "annotations.csv").is_file():
            raise UserError(f"no features in {root}: run extract.py --features {root} first")
        self.root, self.manifest, annotations = root, read_manifest(root), read_annotations(root / "annotations.csv")
        if self.manifest is None:
            self.corpus, self.settings, self.swapped = "DEAM", {"bundle": "WAV2VEC2_BASE", "layer": 10}, None
        else:
            keys = "corpus", "settings", "swapped_labels"
            self.corpus, self.settings, self.swapped = (self.manifest[key] for key in keys)
            if sha256((root / "annotations.csv").read_bytes()) != self.manifest["annotations"]:
                raise UserError(f"{root / 'annotations.csv'} is not the file that the manifest vouches for; run "
                                "extract.py again")
        if labels == "corrected":
            if self.swapped is None:
                raise UserError(f"{root} does not say which labels are exchanged: extract again from a DEAM folder "
                                "with its dynamic annotations")
            for song, (valence, valence_std, arousal, arousal_std) in annotations.items():
                if any(low <= song <= high for low, high in self.swapped):
                    annotations[song] = [arousal, arousal_std, valence, valence_std]
        self.annotations, self.labels = annotations, labels
        splits = read_splits(splits)
        if self.corpus == "demo":  # its songs are the front of each list
            splits = {name: [song for song in ids if song in annotations] for name, ids in splits.items()}
        self.splits_digest, everything = json_digest(splits), sum(splits.values(), [])
        if unknown := [song for song in everything if song not in annotations]:
            raise UserError(f"{len(unknown)} songs of the split have no labels in {root / 'annotations.csv'}: "
                            f"{shortened(unknown)}")
        there = {song for song in everything if (root / "songs" / f"{song}.pt").exists()
                 and (self.manifest is None or str(song) in self.manifest["songs"])}
        missing = [song for song in everything if song not in there]
        if missing and not allow_missing or not there:
            raise UserError(f"{len(missing)} of {len(everything)} songs have no features in {root}: "
                            f"{shortened(missing)}; extract them, or add --allow-missing for those that are there")
        self.complete = not missing
        self.ids = {name: [song for song in ids if song in there] for name, ids in splits.items()}
        self.summary = ", ".join(f"{len(self.ids[name])} of {len(splits[name])} {name}" for name in splits) + " songs"
        self.dimension = architecture(self.settings["bundle"])[0]["encoder_embed_dim"]
        self.datasets = {name: FeatDataset(root, ids, annotations, self.manifest, self.dimension)
                         for name, ids in self.ids.items()}
        labels = torch.cat([self.datasets["train"].labels, self.datasets["val"].labels])
        self.mean, self.std = labels.mean(0), labels.std(0, correction=0)
        self.batch_size, self.shuffle = batch_size, torch.Generator().manual_seed(seed)
        for name in splits:
            setattr(self, name, self.loader(name, self.datasets[name]))

    def loader(self, split, dataset):
        """A DataLoader over `dataset`: for train shuffled, without the last partial batch; else in order."""
        if split == "train" and len(dataset):
            return DataLoader(dataset, self.batch_size, shuffle=True, drop_last=True, collate_fn=collate,
                              generator=self.shuffle)
        return DataLoader(dataset, self.batch_size, collate_fn=collate)

    def notes(self):
        """What a user should know about these features and labels before reading a number, a line each."""
        if not self.manifest:
            yield f"{self.root} has no manifest: nothing vouches for these features; taken as WAV2VEC2_BASE layer 10."
        if self.swapped and self.labels == "shipped":
            ranges = ", ".join(f"{low}–{high}" for low, high in self.swapped)
            yield (f"labels as shipped: for ids {ranges} valence and arousal are exchanged "
                   "(see extract.py --audit-labels; --labels corrected).")
        if not self.complete:
            yield f"working on {self.summary}"

    @property
    def digest(self):
        return self.manifest["digest"] if self.manifest else None

    def check(self, split):
        """Read the feature files of a split that were not yet read against the manifest. Raises UserError naming a
        damaged one."""
        dataset = self.datasets[split]
        unread = [index for index, song in enumerate(dataset.ids) if song not in dataset.verified]
        for _ in Progress(dataset.__getitems__(unread), total=len(unread), desc=f"check {split}", unit="song",
                          disable=not self.manifest or not unread):
            pass


def differences(then, now):
    """"key a there, b now; …" for the settings in which two dicts differ; empty where they do not."""
    return "; ".join(f"{key} {then.get(key)} there, {now.get(key)} now"
                     for key in {**then, **now} if then.get(key) != now.get(key))


def shortened(ids):
    return ", ".join(map(str, ids[:5])) + (", …" if len(ids) > 5 else "")


# --------------------------------------------------------------------------------------- model and heads


class Head(nn.Sequential):
    """pooled[B, D] → one z-scored value [B, 1]."""

    def __init__(self, dimension):
        super().__init__(nn.Linear(dimension, 512), nn.LeakyReLU(0.01), nn.Dropout(0.3),
                         nn.Linear(512, 128), nn.LeakyReLU(0.01), nn.Dropout(0.3), nn.Linear(128, 1))


def layers_to_train(finetune, available):
    """How many of the `available` top layers --finetune trains. Raises UserError."""
    if finetune in ("all", "lastN"):
        return available
    if finetune == "frozen":
        return 0
    match = re.fullmatch(r"last([1-9]\d*)", finetune)
    if not match:
        raise UserError(f"--finetune {finetune}: choose frozen, last1, last2, …, lastN or all")
    return int(match[1])


class EmotionModel(nn.Module):
    """The layers above the cached one → LayerNorm → mean over time → a valence and an arousal head.

    `finetune` names what trains: `frozen` the heads alone; `last<n>` the top n layers, the norm and the heads. The
    layers below stay in eval mode. Initial weights of layers and norm: `start_from`; of the heads: `seed`.
    attention_dropout: of the layers that train; None leaves the bundle's.
    """

    def __init__(self, bundle, layer, finetune, attention_dropout=None):
        super().__init__()
        params = architecture(bundle)[0]
        top = params["encoder_num_layers"] - layer
        trained = layers_to_train(finetune, top)
        if trained > top:
            raise UserError(f"--finetune {finetune} needs features of layer {params['encoder_num_layers'] - trained} "
                            f"or below, these are of layer {layer}: "
                            f"extract with --layer {params['encoder_num_layers'] - trained}")
        transformer = torchaudio.models.wav2vec2_model(**params).encoder.transformer
        self.layers, self.norm = transformer.layers[layer:], transformer.layer_norm
        self.valence, self.arousal = Head(params["encoder_embed_dim"]), Head(params["encoder_embed_dim"])
        self.first_trained, self.trains_layers, self.all_train = top - trained, trained > 0, 0 < trained == top
        if attention_dropout is not None:
            for encoder_layer in self.layers:
                encoder_layer.attention.dropout = attention_dropout
        for module in self.frozen_modules():
            module.requires_grad_(False)
        self.train()

    def frozen_modules(self):
        return [*self.layers[:self.first_trained], *([] if self.trains_layers else [self.norm])]

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def start_from(self, backbone, seed):
        """Copy the top layers and the norm from a Backbone; draw the heads as nn.Linear does (uniform within
        1/√fan-in), from a CPU generator of their own."""
        transformer, generator = backbone.model.encoder.transformer, torch.Generator().manual_seed(seed)
        self.layers.load_state_dict(transformer.layers[len(transformer.layers) - len(self.layers):].state_dict())
        self.norm.load_state_dict(transformer.layer_norm.state_dict())
        for head in (self.valence, self.arousal):
            for linear in head:
                if isinstance(linear, nn.Linear):
                    bound = 1 / math.sqrt(linear.in_features)
                    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
                    nn.init.uniform_(linear.bias, -bound, bound, generator=generator)

    @torch.no_grad()
    def frozen(self, features):
        """One clip's features[T, D] through the layers that do not train → states[T, D] on the model's device, the
        features as they are if all train; where none trains, on through norm and mean: pooled[1, D]. Clip by clip, so
        that it can be kept or computed again, whichever memory allows, without changing a bit."""
        weight = self.valence[0].weight
        if self.all_train:
            return features.to(weight.device)
        states = features.to(weight)[None]
        for layer in self.layers[:self.first_trained]:
            states, _ = layer(states)
        return (states if self.trains_layers else self.norm(states).mean(1, keepdim=True))[0]

    def pool(self, states):
        """states[B, T, D] of `frozen` → pooled[B, D]."""
        for layer in self.layers[self.first_trained:]:
            states, _ = layer(states)
        return (self.norm(states) if self.trains_layers else states).mean(1)

    def forward(self, clips, micro_batch=1):
        """[states of `frozen`, …], of any lengths → z-scored predictions [B, 2]: valence, arousal."""
        pooled = self.pool_clips(clips, micro_batch)
        return torch.cat([self.valence(pooled), self.arousal(pooled)], 1)

    def pool_clips(self, clips, micro_batch):
        """[states of `frozen`, …] → pooled[B, D]; a clip's row does not depend on the others.

        Clips of equal length go through the layers together, up to `micro_batch` at a time. In training, where that is
        less than the batch, a group's activations are dropped and recomputed in the backward pass: memory holds one
        group, and the gradient is still that of the whole batch.
        """
        places, pooled, weight = {}, [None] * len(clips), self.valence[0].weight
        for place, clip in enumerate(clips):
            places.setdefault(len(clip), []).append(place)
        for same in places.values():
            for start in range(0, len(same), micro_batch):
                group = same[start:start + micro_batch]
                states = torch.stack([clips[place].to(weight.device, non_blocking=True) for place in group]).to(weight)
                recompute = self.training and micro_batch < len(clips)
                rows = checkpoint(self.pool, states, use_reentrant=False) if recompute else self.pool(states)
                for place, row in zip(group, rows):
                    pooled[place] = row
        return torch.stack(pooled)

    @torch.no_grad()
    def predict(self, loader, autocast, micro_batch=1):
        """z-scored predictions float64[N, 2] on the CPU for all clips of a loader, in its order, in eval mode."""
        self.eval()
        with autocast():
            return torch.cat([self(clips, micro_batch).double() for clips, _ in loader]).cpu()


class FrozenOutputs(Dataset):
    """A FeatDataset seen through a model's frozen layers: yields (states, label[2]). Each clip's states are computed
    once and kept on the device `keep`, or computed at each use where that is None."""

    def __init__(self, dataset, model, autocast, keep=None):
        self.dataset, self.model, self.autocast, self.keep, self.kept = dataset, model, autocast, keep, {}

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        new = [index for index in indices if index not in self.kept]
        read = self.dataset.__getitems__(new)
        for index in indices:
            states = self.kept.get(index)
            if states is None:
                features, _ = next(read)
                with self.autocast():
                    states = self.model.frozen(features)
                if self.keep:
                    # from a GPU to pinned memory of the host, without waiting: only the GPU reads it again
                    states = self.kept[index] = states.to(self.keep, non_blocking=True)
            yield states, self.dataset.labels[index]


def where_to_keep(count, frames, model, features_dtype, device):
    """The device with room for the frozen outputs of `count` clips of `frames` frames: the model's own, the host, or
    None. Half of what is free stays free. features_dtype: what is kept where no layer is frozen."""
    parameter = model.valence[0].weight
    size = features_dtype.itemsize if model.all_train else parameter.element_size()
    needed = count * (frames if model.trains_layers else 1) * parameter.shape[1] * size
    if device.type == "cuda" and needed < torch.cuda.mem_get_info(device)[0] / 2:
        return device
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.device("cpu") if needed < free / 2 else None


# -------------------------------------------------------------------------------------------------- loss


def pearson(values):
    """Correlation between the two columns of values[B, 2]; 0 where a column is constant."""
    a, b = (values - values.mean(0)).unbind(1)
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)


def quadrant(labels):
    """Quadrant of z-scored labels[N, 2] around the label means: 2·(high valence) + (high arousal), long[N]."""
    return 2 * (labels[:, 0] >= 0).long() + (labels[:, 1] >= 0).long()


def quadrant_weights(labels):
    """float64[4]: a weight for each quadrant, inverse to how many of labels[N, 2] it holds (z-scored), scaled so that
    the mean over the N songs is 1."""
    counts = torch.bincount(quadrant(labels), minlength=4)
    return len(labels) / (counts > 0).sum() / counts.clamp_min(1).double()


def emotion_loss(pred, true, lambda_corr=0.05, lambda_var=0.05, corr_target="true", weights=None):
    """Loss over one batch of z-scored values, pred and true [B, 2]; a scalar.

    MSE + lambda_corr·(r_pred − r_true)² + lambda_var·Σ_dim(var_pred − 1)², with r the Pearson correlation between
    valence and arousal and var the population variance. corr_target "zero" penalises r_pred² instead. With
    `weights` (of quadrant_weights): the weighted MSE + the correlation term, without the variance term.
    """
    squared = (pred - true).square().mean(1)
    target = pearson(true) if corr_target == "true" else 0.0
    correlation = lambda_corr * (pearson(pred) - target) ** 2
    if weights is not None:
        return (weights.to(squared)[quadrant(true)] * squared).mean() + correlation
    variance = lambda_var * (pred.var(0, correction=0) - 1).square().sum()
    return squared.mean() + correlation + variance
