"""What the scripts share, in the order in which it is used:

    determinism · backbone · DEAM and audio · features · model and heads · loss

To try another head or another loss, change `Head` or `emotion_loss` at the end: a kind of layer new
to `Head` also needs a line in `start_from`. Around it: exact.py, the arithmetic of --precision
exact; weights.py finds a backbone's weights; files.py has digests and safe files; cli.py the
command line.
"""

import functools
import math
import os
import platform
import re
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import exact
from cli import UserError
from exact import Exact
from files import (DIGEST, ahead, is_plain, json_digest, load_tensors, read_json, read_tensors,
                   read_table, sha256, shortened, state_digest, tensor_digest)
from weights import find_weights, fold_weight_norm

HERE = Path(__file__).resolve().parent
DIMENSIONS = ("valence", "arousal")
QUADRANTS = ("HV/HA", "LV/HA", "LV/LA", "HV/LA")  # high or low valence, high or low arousal
MOODS = ("excited, happy", "tense, angry", "sad, tired", "calm, content")  # after Russell 1980

# ------------------------------------------------------------------------------------- determinism


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


def say_if_slow(arithmetic, operations):
    """Warn if so many floating point operations would take hours here in exact arithmetic: many
    GPUs compute float64 at 1/32 or 1/64 of float32."""
    if arithmetic.precision != "exact" or operations < 1e14:
        return
    a = torch.ones(1024, 1024, dtype=torch.float64, device=arithmetic.device)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - begin)
    # 1.5: for what is not a matrix product
    hours = 1.5 * operations * min(seconds) / (2 * 1024**3) / 3600
    if hours > 1:
        print(f"about {hours:.0f} hours here in exact arithmetic; --precision float32 is faster, "
              "and gives the same bits on one make of CPU or one GPU model only", flush=True)


def operations(params, layers, convolutions=True, samples=45 * 16000):
    """Floating point operations of a backbone on one clip: its convolutions and `layers` encoder
    layers. A multiplication with its addition counts as two."""
    total, channels, length = 0, 1, samples
    for out, kernel, stride in params["extractor_conv_layer_config"]:
        length = (length - kernel) // stride + 1
        total, channels = total + 2 * length * channels * kernel * out, out
    width, inner = params["encoder_embed_dim"], params["encoder_ff_interm_features"]
    position = width // params["encoder_pos_conv_groups"] * params["encoder_pos_conv_kernel"]
    total += 2 * length * width * (channels + position)
    layer = 2 * length * (4 * width**2 + 2 * width * inner) + 4 * length**2 * width
    return total * convolutions + layers * layer


def sin_pi(x):
    """sin(πx) from + − × ÷ alone: a library's own sine differs between machines in its last bit.
    Taylor's series within half a period, to 1e-15."""
    whole = np.rint(x)
    r = (x - whole) * math.pi
    term = total = r
    for n in range(1, 12):
        term = term * (r * r) / (-2 * n * (2 * n + 1))
        total = total + term
    return total * (1 - 2 * (np.abs(whole) % 2))


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


# ---------------------------------------------------------------------------------------- backbone

# oneDNN's float32 convolutions add up in an order that follows the thread count and the batch: they
# always get this many threads and one clip at a time, so that float32 features repeat themselves.
CONVOLUTION_THREADS = 8
PARAMS = {
    "extractor_mode": ("group_norm", "layer_norm"), "extractor_conv_layer_config": [[int]],
    "extractor_conv_bias": bool, "encoder_embed_dim": int, "encoder_projection_dropout": float,
    "encoder_pos_conv_kernel": int, "encoder_pos_conv_groups": int, "encoder_num_layers": int,
    "encoder_num_heads": int, "encoder_attention_dropout": float,
    "encoder_ff_interm_features": int, "encoder_ff_interm_dropout": float,
    "encoder_dropout": float, "encoder_layer_norm_first": bool, "encoder_layer_drop": float,
    "aux_num_out": None}
TOP_LAYERS = {"params": PARAMS, "layer": int, "state": {str: torch.Tensor}}


def network(params):
    """torchaudio's wav2vec2 network without weights (they are assigned, not copied over random
    ones), its positional weight norm removed. Raises UserError for impossible params."""
    sizes = [size for layer in params["extractor_conv_layer_config"] for size in layer]
    sizes += [value for name, value in params.items() if name.startswith("encoder_")
              and type(value) is int and "drop" not in name]
    rates = [value for name, value in params.items() if "drop" in name]
    try:  # torchaudio takes a billion layers, and no heads, without a word
        if not all(0 < size <= 100_000 for size in sizes) or params["encoder_num_layers"] > 1000:
            raise ValueError("a size is out of range")
        if not all(0 <= rate <= 1 for rate in rates):
            raise ValueError("a dropout rate is not from 0 to 1")
        with torch.device("meta"):
            model = torchaudio.models.wav2vec2_model(**params)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"there is no network of this architecture: {error}") from None
    parametrize.remove_parametrizations(model.encoder.transformer.pos_conv_embed.conv, "weight")
    return model.eval()


def state_above(model, layer):
    """The state of a network's encoder layers above `layer` and of its final norm, in the names of
    an EmotionModel."""
    transformer = model.encoder.transformer
    above = {"layers": transformer.layers[layer:], "norm": transformer.layer_norm}
    return {f"{part}.{name}": value for part, module in above.items()
            for name, value in module.state_dict().items()}


class Backbone:
    """A frozen wav2vec2 or HuBERT encoder: waveforms in, hidden states out.

    weights: the name of a torchaudio bundle; a Hugging Face repository `owner/name[@revision]`; a
    Hugging Face folder; or a file, a state dict of the base architecture in either spelling.
    params: torchaudio's parameters of the architecture. digest: sha256 of the float32 weights,
    whatever file they came from. source: their name, revision and the file's sha256.
    Raises UserError for unreadable or unfitting weights, or without network.
    """

    def __init__(self, weights):
        self.params, state, self.sample_rate, self.epsilon, self.source = find_weights(str(weights))
        if not RATES[0] <= self.sample_rate <= RATES[1]:
            raise UserError(f"{weights}: its sample rate is {self.sample_rate} Hz, not one from "
                            f"{RATES[0]} to {RATES[1]}")
        self.model = network(self.params)
        state = {name: tensor.float() for name, tensor in fold_weight_norm(state).items()
                 if not name.startswith("aux.")}  # a speech recogniser's output layer
        wanted = self.model.state_dict()
        misfits = [name for name in wanted if name not in state
                   or state[name].shape != wanted[name].shape]
        if misfits or len(state) != len(wanted):
            raise UserError(f"{weights}: these weights do not fit the architecture "
                            f"({shortened(misfits or sorted(set(state) - set(wanted)))}); a bare "
                            "file must be of the base size, others need config.json beside them")
        if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise UserError(f"{weights}: NaN or infinity in {shortened(bad)}")
        self.model.load_state_dict(state, assign=True)
        self.digest = state_digest(state)

    def top_layers(self, layer):
        """The layers above `layer` and the final norm: all that train and eval need of it. Raises
        UserError for a layer that is not there."""
        self.require(layer)
        return {"params": self.params, "layer": layer, "state": state_above(self.model, layer)}

    def require(self, layer):
        layers = self.params["encoder_num_layers"]
        if not 0 <= layer <= layers:
            raise UserError(f"layer {layer}: {self.source['name']} has {layers} layers")

    def to(self, arithmetic, layer):
        """Ready to compute the states of `layer`: the layers above it are dropped."""
        self.require(layer)
        transformer = self.model.encoder.transformer
        transformer.layers = transformer.layers[:layer]
        self.arithmetic = arithmetic
        self.model.to(arithmetic.device, arithmetic.dtype).requires_grad_(False)
        return self

    @torch.no_grad()
    def hidden_states(self, waveforms):
        """float64[B, samples] of equal length, on the CPU → [B, T, D] on the device: the states
        after the encoder layers; with no layer the encoder's input. Never pad a waveform: the first
        group norm runs over time, so padding would change every frame."""
        if self.epsilon is not None:
            with Exact():  # also for float32: torch's own sum follows the thread count
                waveforms = waveforms - waveforms.mean(1, keepdim=True)
                power = (waveforms * waveforms).mean(1, keepdim=True)
                waveforms = waveforms / (power + self.epsilon).sqrt()
        transformer, arithmetic = self.model.encoder.transformer, self.arithmetic
        waveforms = waveforms.to(arithmetic.dtype)
        if arithmetic.device.type == "cuda":
            waveforms = waveforms.pin_memory().to(arithmetic.device, non_blocking=True)
        threads, states = torch.get_num_threads(), []
        with arithmetic():
            if arithmetic.precision != "exact":
                torch.set_num_threads(CONVOLUTION_THREADS)
            for waveform in waveforms.split(1):
                features, _ = self.model.feature_extractor(waveform, None)
                features = self.model.encoder.feature_projection(features)
                states.append(transformer._preprocess(features))
            torch.set_num_threads(threads)
            states = torch.cat(states)
            for layer in transformer.layers:  # one by one: forward() may skip layers at random
                states, _ = layer(states)
        return states


# ----------------------------------------------------------------------------------- DEAM and audio

# version 1: a bare handle asks for the latest
KAGGLE = "imsparsh/deam-mediaeval-dataset-emotional-analysis-in-music/versions/1"
STATIC = "static_annotations_averaged_songs_1_2000.csv"
COLUMNS = ["song_id", "valence_mean", "valence_std", "arousal_mean", "arousal_std"]
SHORTEST = 400  # samples at the backbone's rate: what one frame of the base architecture sees
RATES = 4000, 384_000  # Hz: the lowest and highest sample rate accepted
SPLITS = {"train": [int], "val": [int], "test": [int]}


class BadClip(Exception):
    """One audio file that cannot be used; the others can."""


def read_annotations(path):
    """Static annotations: {song id: (valence, its standard deviation, arousal, its standard
    deviation)}, floats on DEAM's 1–9 scale. Other columns, stray spaces and CRLF are fine; missing
    columns, gaps, NaN, labels outside 1–9 and double ids raise UserError."""
    rows = [[cell.strip() for cell in row] for row in read_table(path, "a table of labels")]
    header, songs = rows[0] if rows else [], {}
    if missing := [name for name in COLUMNS if name not in header]:
        raise UserError(f"{path}: no column {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
    places = [header.index(name) for name in COLUMNS]
    fresh = "take the file from a fresh copy of DEAM"
    for line, row in enumerate(rows[1:], 2):
        if not any(row):
            continue
        try:
            song, *values = [row[place] for place in places]
            values = tuple(map(float, values))
            fine = (re.fullmatch("[0-9]{1,9}", song) and all(map(math.isfinite, values))
                    and all(1 <= values[n] <= 9 for n in (0, 2)) and min(values) >= 0)
        except (ValueError, IndexError):
            fine = False
        if not fine:
            raise UserError(f"{path}, line {line}: not a song id, two labels from 1 to 9 and their "
                            f"standard deviations; {fresh}")
        if int(song) in songs:
            raise UserError(f"{path}, line {line}: song {song} appears twice; {fresh}")
        songs[int(song)] = values
    if not songs:
        raise UserError(f"{path}: no songs in it")
    return songs


def read_splits(path):
    """{"source": where they come from, "train": [ids], "val": [ids], "test": [ids]}, disjoint,
    their order kept. Raises UserError."""
    splits = read_json(path, "a file of splits", SPLITS)
    splits = {"source": str(splits.get("source", Path(path).name)),
              **{name: splits[name] for name in SPLITS}}
    everything = songs_of(splits)
    if len(set(everything)) != len(everything):
        raise UserError(f"{path}: a song appears twice in it; splits must be disjoint")
    if not splits["train"] or not all(0 < song < 10**9 for song in everything):
        raise UserError(f"{path}: no training songs, or invalid ids")
    return splits


def own_splits(folder):
    """The splits of a features folder or a run: its own, or the kit's. extract.py copies those it
    used into the features folder, train.py into the run."""
    own = Path(folder) / "splits.json"
    return read_splits(own if own.exists() else HERE / "splits.json")


def fold_splits(fold, own):
    """Splits of folds.json, no artist in two of them: test is fold `fold` of ten, val the next one,
    train the others; of the songs of `own`, the splits of a features folder. Raises UserError."""
    content = read_json(HERE / "folds.json", "a file of folds", {"source": str, "folds": [[int]]})
    folds, songs, source = content["folds"], set(songs_of(own)), content["source"]
    if not songs >= set(sum(folds, [])):
        folds = [[song for song in each if song in songs] for each in folds]
        source = f"{own['source']}; {source}"
    val = (fold + 1) % len(folds)
    if not folds[fold] or not folds[val]:
        raise UserError(f"--fold {fold}: none of these songs is in fold {fold} or in fold {val}")
    train = [song for n, each in enumerate(folds) if n not in (fold, val) for song in each]
    return {"source": source, "train": train, "val": folds[val], "test": folds[fold]}


@functools.cache
def read_artists():
    """{song id: number of its artist}, facts about DEAM."""
    content = read_json(HERE / "artists.json", "a file of artists", {"artist": {int: int}})
    return {int(song): artist for song, artist in content["artist"].items()}


def songs_of(splits):
    return splits["train"] + splits["val"] + splits["test"]


def splits_digest(splits):
    return json_digest({name: splits[name] for name in SPLITS})


class DEAMHandler:
    """DEAM in a folder: `annotations` (of read_annotations), `dynamic` {"valence": path, "arousal":
    path} of the annotations over time where they are there, `metadata` its tables of songs; `audio`
    {song id: path}; `get_waveform`.

    root: the folder, in any layout (Kaggle's, the original zip files', spaces or underscores): it
    is searched for the static annotations and for files named <song id>.mp3 (.wav, .flac, .ogg).
    "kaggle" downloads version 1. Raises UserError where there is no DEAM.
    """

    def __init__(self, root):
        root = Path(download_deam() if str(root) == "kaggle" else root)
        if not root.is_dir():
            raise UserError(f"no folder {root}: give DEAM's with --deam PATH, or kaggle to "
                            "download it")
        files = files_below(root)
        tables = [path for path in files if path.name.replace(" ", "_") == STATIC]
        if not tables:
            raise UserError(f"no DEAM in {root}: {STATIC} is nowhere in it; unpack "
                            "DEAM_Annotations there")
        self.root, self.annotations, self.audio = root, read_annotations(min(tables)), {}
        self.dynamic = {path.stem: path for path in files if "dynamic" in path.parent.name
                        and path.name in ("valence.csv", "arousal.csv")}
        self.metadata = sorted(path for path in files
                               if re.fullmatch(r"metadata_\d{4}\.csv", path.name))
        for path in sorted(files):
            if path.suffix.lower() in (".mp3", ".wav", ".flac", ".ogg") and re.fullmatch(
                    "[0-9]{1,9}", path.stem):
                song = int(path.stem)
                if song in self.audio:
                    raise UserError(f"two files for song {song}: {self.audio[song]} and {path}; "
                                    "keep one")
                self.audio[song] = path

    def get_waveform(self, song_id, sample_rate=16000):
        """(waveform float64[samples] at `sample_rate`, mono; sha256 of the decoded float32 PCM).
        Raises BadClip."""
        return read_waveform(self.audio[song_id], sample_rate)


def download_deam():
    import kagglehub  # here, because only this needs it and it is slow to load

    try:
        return kagglehub.dataset_download(KAGGLE)
    except Exception as error:  # requests', kagglehub's own and the system's, in many versions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot download DEAM from Kaggle ({reason[:150]}): check the network, or "
                        f"fetch kaggle.com/datasets/{KAGGLE.split('/versions')[0]} elsewhere, "
                        "unpack it and pass the folder with --deam") from None


def files_below(root, most=100_000):
    """All files below a folder, links followed, each folder entered once."""
    files, entered = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(real)
        files += [Path(folder) / name for name in names]
        if len(files) + len(entered) > most:
            raise UserError(f"more than {most} files below {root}: give a smaller folder; DEAM's "
                            "own has some 4000")
    return files


def read_waveform(path, sample_rate):
    """A whole file as (float64 waveform[samples], digest of its decoded PCM). Raises BadClip."""
    [(_, waveform, pcm)] = read_windows(path, sample_rate)
    return waveform, tensor_digest(pcm)


def read_windows(path, sample_rate, window=None, hop=None):
    """Decode a file, average its channels, resample. Yields (start in seconds, float64
    waveform[samples], float32 PCM [samples, channels]): the whole file; or, where it is longer than
    one and a half `window` seconds, windows of that length every `hop` seconds, the last one
    aligned with the end. Reads no further than the window at hand, and what is there, whatever
    length the header claims.
    Raises BadClip for a file that is empty, truncated (as far as its header tells), not audio, not
    finite, of an unusual sample rate, or shorter than one frame of the encoder."""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # its name need not be valid text
            rate, announced, notes, first = file.samplerate, file.frames, file.extra_info, 0
            file.seekable = lambda: False  # else soundfile seeks after each read, and fails at ends
            if not RATES[0] <= rate <= RATES[1]:
                raise BadClip(f"its sample rate is {rate} Hz: convert it to 44100 Hz")
            longest = int(1.5 * window * rate) if window else math.inf
            # held: decoded frames from frame `first` on; held[:size] is the window to yield
            held = read_frames(file, longest + 1)
            size = len(held) if len(held) <= longest else round(window * rate)
            while size * sample_rate >= SHORTEST * rate:
                if not np.isfinite(held[:size]).all():
                    raise BadClip("holds NaN or infinity")
                yield first / rate, to_waveform(held[:size], rate, sample_rate), held[:size]
                if not window:
                    break  # that was the whole file
                step = max(1, round(hop * rate))
                held = np.concatenate([held, read_frames(file, step + size - len(held))])
                if len(held) == size:
                    break
                step = min(step, len(held) - size)
                held, first = held[step:], first + step
            length = first + len(held)
            check_length(announced, notes, length, rate, sample_rate)
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError, UnicodeError) as error:
        empty = Path(path).is_file() and Path(path).stat().st_size == 0
        raise BadClip("empty file" if empty else f"not readable as audio ({error})") from None


def read_frames(file, count):
    """Up to `count` frames of an open file, fewer at its end: float32[frames, channels]. Block by
    block, because a header may claim any length."""
    blocks = [np.zeros((0, file.channels), np.float32)]
    while count > 0:
        blocks.append(file.read(min(count, 1 << 20), dtype="float32", always_2d=True))
        count = count - len(blocks[-1]) if len(blocks[-1]) else 0
    return np.concatenate(blocks)


def check_length(announced, notes, length, rate, sample_rate):
    """Raise BadClip where fewer frames were read than a file's header or libsndfile's notes say, or
    too few. A stream's header says none, or as many as there can be."""
    sizes = re.findall(r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)", notes)
    if (length < announced - rate // 10 and announced < 2**62 or "ended unexpectedly" in notes
            or any(int(there) < int(said) < 0xFFFFFF00 for said, there in sizes)):
        raise BadClip("truncated: shorter than its own header says")
    if length * sample_rate < SHORTEST * rate:
        raise BadClip(f"too short: {length} samples at {rate} Hz, one frame needs "
                      f"{math.ceil(SHORTEST * rate / sample_rate)}")


def to_waveform(pcm, rate, sample_rate):
    """PCM float32[samples, channels] → float64 waveform[samples] at sample_rate, mono."""
    mono = functools.reduce(np.add, pcm.astype(np.float64).T) / pcm.shape[1]
    return torch.from_numpy(resample(mono, rate, sample_rate))


def resample(waveform, rate, new_rate):
    """Band-limited resampling of float64[samples], both rates in Hz: a sinc in a Hann window over 6
    zero crossings, cut off at 0.99 of the lower Nyquist frequency (torchaudio's defaults; after
    J. O. Smith, Digital Audio Resampling). Element by element in a fixed order: the same bits on
    any machine. The kernel has one row for each phase that occurs, without the zeros around it, so
    that rates without a common factor take no more memory than others."""
    divisor = math.gcd(rate, new_rate)
    step, phases = rate // divisor, new_rate // divisor
    if step == phases:
        return waveform
    cutoff, crossings = 0.99 * min(step, phases), 6
    width = math.ceil(crossings * step / cutoff)
    phase, offset = np.arange(phases), np.arange(-width, width + 1)
    start = phase * step // phases  # the input sample at or before each phase
    ticks = (start[:, None] + offset) * phases - (phase * step)[:, None]
    t = np.clip(ticks / (step * phases) * cutoff, -crossings, crossings)
    hann = sin_pi(0.5 - np.abs(t) / (2 * crossings)) ** 2
    sinc = np.where(t == 0, 1.0, sin_pi(t) / np.where(t == 0, 1.0, t * math.pi))
    kernel = (sinc * hann * (cutoff / step)).T.copy()
    length = -(-len(waveform) * phases // step)
    periods = -(-length // phases)
    padded = np.pad(waveform, (width, max(0, (periods + 1) * step + width - len(waveform))))
    places = np.arange(periods)[:, None] * step + start
    resampled = np.zeros((periods, phases))
    for tap, weights in enumerate(kernel):
        resampled += padded[places + tap] * weights
    return resampled.reshape(-1)[:length]


# ---------------------------------------------------------------------------------------- features

SETTINGS = {"weights": DIGEST, "layer": int, "precision": ("exact", "float32", "bfloat16"),
            "store": ("float32", "float16"), "sample_rate": int,
            "normalize_epsilon": (None, float)}
RUN_SETTINGS = {**SETTINGS, "weights": (None, DIGEST)}  # None: of features without manifest
ENTRY = {"pcm": DIGEST, "features": DIGEST, "frames": int}
MANIFEST = {"settings": SETTINGS, "annotations": DIGEST, "top_layers": DIGEST,
            "swapped_labels": (None, [[int, int]]), "songs": {int: ENTRY}, "digest": DIGEST,
            "source": {"name": str}}
# A folder of the published notebook has no manifest: its features cannot be verified, and are taken
# as those of the backbone that it used.
NOTEBOOK_MANIFEST = {
    "settings": {"weights": None, "layer": 10, "precision": "float32", "store": "float32",
                 "sample_rate": 16000, "normalize_epsilon": 1e-7},
    "swapped_labels": None, "songs": None, "digest": None,
    "source": {"name": "ALM/wav2vec2-base-audioset"}}


def manifest_digest(manifest):
    """One digest over how the features were made, the labels beside them, and every song's PCM and
    features."""
    inside = "settings", "annotations", "top_layers", "swapped_labels", "songs"
    return json_digest({key: manifest[key] for key in inside})


def read_manifest(path):
    """A manifest.json, whose song ids are texts. Raises UserError if it is none or was edited."""
    manifest = read_json(path, "a manifest", MANIFEST)
    if manifest["digest"] != manifest_digest(manifest):
        raise UserError(f"{path} does not match its own digest: it was edited or damaged; restore "
                        "it, or delete the folder and extract again")
    return manifest


def read_features(path, digest=None, dimension=None):
    """features[T, D] of a feature file. Raises UserError where it is not a finite tensor [T, D], or
    not the one that a manifest's digest says."""
    features = load_tensors(path, "a feature file")
    if (not isinstance(features, torch.Tensor) or features.ndim != 2 or not len(features)
            or features.dtype not in (torch.float32, torch.float16)
            or dimension and features.shape[1] != dimension):
        raise UserError(f"{path}: not a tensor [T, {dimension or 'D'}] of float32 or float16; "
                        "extract this song again")
    if not is_plain(features):
        raise UserError(f"{path}: NaN or infinity in it, or not a dense tensor; extract this song "
                        "again")
    if digest and tensor_digest(features) != digest:
        raise UserError(f"{path} is damaged: not the features of the manifest; run extract.py "
                        "again")
    return features


COMPARED = set()  # feature files that this process has compared with their digests


class FeatDataset(Dataset):
    """Yields (features[T, D] as stored, label[2] float64: valence, arousal on 1–9). A file is
    compared with the manifest's digest when it is first read. Raises UserError naming a file that
    is missing, damaged or not [T, D]."""

    def __init__(self, root, ids, annotations, songs, dimension):
        self.root, self.ids, self.songs, self.dimension = Path(root), ids, songs, dimension
        self.labels = labels_of(annotations, ids)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        key = path, _, digest = self.key(index)
        if key in COMPARED:
            features = load_tensors(path, "a feature file")
        else:
            features = read_features(path, digest, self.dimension)
            COMPARED.add(key)
        return features, self.labels[index]

    def key(self, index):
        """What COMPARED holds of a song: (its file, as it was written then, the digest it has to
        have, or None)."""
        song = str(self.ids[index])
        path = self.root / "songs" / f"{song}.pt"
        changed = path.stat().st_mtime_ns if path.exists() else None
        if self.songs is not None and song not in self.songs:
            raise UserError(f"{path}: the manifest has no song {song}; run extract.py again")
        return path, changed, None if self.songs is None else self.songs[song]["features"]

    def __getitems__(self, indices):
        """Many at once, in order, the next files read meanwhile."""
        return ahead(self.__getitem__, indices)


def collate(batch):
    """Clips stay apart, ([features[T, D], …], labels[B, 2]): padding them would change what the
    encoder sees."""
    clips, labels = zip(*batch)
    return list(clips), torch.stack(labels)


class DEAMFeatHandler:
    """A DEAM_feats folder and its frozen splits: `ids` and `datasets` by split, loaders `train`,
    `val`, `test`, the label statistics `mean`, `std` (float64[2], population σ over train and val),
    and `top_layers`, the encoder layers above the features'.

    splits: of read_splits; None takes the folder's own. labels: "corrected" exchanges valence and
    arousal for the ranges of ids that the audit found swapped.
    allow_missing: work on the songs that are there; None takes all, and a missing one is an error
    when it is read.
    Raises UserError for a folder that is not one, songs that are missing or a split that names
    unknown songs. A folder without manifest, as the published notebook made them, is taken as
    layer 10 of the backbone that it used.
    """

    def __init__(self, root, splits=None, batch_size=32, seed=0, allow_missing=False,
                 labels="shipped"):
        self.root, self.labels = root, labels = Path(root), labels
        if not (root / "annotations.csv").is_file():
            raise UserError(f"no features in {root}: run extract.py --features {root} first")
        verified = (root / "manifest.json").exists()
        self.manifest = read_manifest(root / "manifest.json") if verified else NOTEBOOK_MANIFEST
        self.settings, self.digest = self.manifest["settings"], self.manifest["digest"]
        self.annotations = self.read_labels(verified, labels)
        self.splits = splits or own_splits(root)
        self.ids = self.songs_there(allow_missing)
        self.complete = all(len(self.ids[name]) == len(self.splits[name]) for name in self.ids)
        self.summary = ", ".join(f"{len(self.ids[name])} of {len(self.splits[name])} {name}"
                                 for name in self.ids) + " songs"
        dimension = self.top_layers["params"]["encoder_embed_dim"]
        self.datasets = {name: FeatDataset(root, ids, self.annotations, self.manifest["songs"],
                                           dimension) for name, ids in self.ids.items()}
        known = self.ids["train"] + self.ids["val"]
        self.mean, self.std = label_statistics(self.annotations, known)
        self.batch_size, self.shuffle = batch_size, torch.Generator().manual_seed(seed)
        for name in self.ids:
            setattr(self, name, self.loader(name, self.datasets[name]))

    def read_labels(self, verified, labels):
        path = self.root / "annotations.csv"
        annotations = read_annotations(path)
        if verified and sha256(path.read_bytes()) != self.manifest["annotations"]:
            raise UserError(f"{path} is not the file of the manifest; run extract.py again")
        swapped = self.manifest["swapped_labels"]
        if labels == "corrected" and swapped is None:
            raise UserError(f"{self.root} does not say which labels are swapped: extract again "
                            "from a DEAM folder with its dynamic annotations")
        return corrected(annotations, swapped) if labels == "corrected" else annotations

    def songs_there(self, allow_missing):
        """{split: ids whose features are there}."""
        everything, root = songs_of(self.splits), self.root
        if unknown := [song for song in everything if song not in self.annotations]:
            raise UserError(f"{len(unknown)} songs of the splits have no labels in "
                            f"{root / 'annotations.csv'}: {shortened(unknown)}")
        if allow_missing is None:
            return {name: self.splits[name] for name in SPLITS}
        songs = self.manifest["songs"]
        there = {song for song in everything if (songs is None or str(song) in songs)
                 and (root / "songs" / f"{song}.pt").exists()}
        missing = [song for song in everything if song not in there]
        if missing and not allow_missing or not there:
            raise UserError(f"{len(missing)} of {len(everything)} songs have no features in "
                            f"{root}: {shortened(missing)}; extract them, or train with "
                            "--allow-missing on those that are there")
        return {name: [song for song in self.splits[name] if song in there] for name in SPLITS}

    @functools.cached_property
    def top_layers(self):
        if self.manifest is NOTEBOOK_MANIFEST:
            return Backbone(self.manifest["source"]["name"]).top_layers(self.settings["layer"])
        top = read_tensors(self.root / "top_layers.pt", "the backbone's top layers", TOP_LAYERS)
        if (top["layer"] != self.settings["layer"]
                or state_digest(top["state"]) != self.manifest["top_layers"]):
            raise UserError(f"{self.root / 'top_layers.pt'} is not the one of the manifest; run "
                            "extract.py again")
        return top

    def loader(self, split, dataset):
        """A DataLoader over `dataset`: for train shuffled, without the last partial batch."""
        if split == "train" and len(dataset):
            return DataLoader(dataset, self.batch_size, shuffle=True, drop_last=True,
                              collate_fn=collate, generator=self.shuffle)
        return DataLoader(dataset, self.batch_size, collate_fn=collate)

    def notes(self):
        """What a user should know about these features and labels before reading a number."""
        yield f"songs: {self.splits['source']}"
        if self.digest is None:
            yield (f"{self.root} has no manifest: its features cannot be verified; taken as "
                   f"layer {self.settings['layer']} of {self.manifest['source']['name']}")
        swapped = self.manifest["swapped_labels"]
        if swapped and self.labels == "shipped":
            ranges = ", ".join(f"{low}–{high}" for low, high in swapped)
            yield (f"original labels (as shipped): for ids {ranges} valence and arousal are "
                   "swapped (see audit.py; --labels corrected)")
        if not self.complete:
            yield f"working on {self.summary}"


def corrected(annotations, swapped):
    """Annotations with valence and arousal exchanged for the [[lowest id, highest id], …]."""
    return {song: values[2:] + values[:2] if any(low <= song <= high for low, high in swapped)
            else values for song, values in annotations.items()}


def labels_of(annotations, songs):
    """float64[N, 2]: valence and arousal of the songs, on the 1–9 scale."""
    labels = [annotations[song][::2] for song in songs]
    return torch.tensor(labels, dtype=torch.float64).reshape(-1, 2)


def label_statistics(annotations, songs):
    """(mean, population σ) of valence and arousal, float64[2] each, over the songs."""
    labels = labels_of(annotations, songs)
    with Exact():
        mean, std = labels.mean(0), labels.std(0, correction=0)
    if not (std > 0).all():
        raise UserError("the labels of train and val are all the same: nothing can be learned")
    return mean, std


# ---------------------------------------------------------------------------------- model and heads


class Head(nn.Sequential):
    """pooled[B, D] → one z-scored value [B, 1]."""

    def __init__(self, dimension):
        super().__init__(nn.Linear(dimension, 512), nn.LeakyReLU(0.01), nn.Dropout(0.3),
                         nn.Linear(512, 128), nn.LeakyReLU(0.01), nn.Dropout(0.3),
                         nn.Linear(128, 1))


def layers_to_train(finetune, available, layer):
    """How many of the `available` layers above `layer` --finetune trains. Raises UserError."""
    if finetune in ("all", "lastN"):
        return available
    if finetune == "frozen":
        return 0
    match = re.fullmatch(r"last([1-9]\d{0,3})", finetune)
    if not match:
        raise UserError(f"--finetune {finetune}: choose frozen, last1, last2, …, lastN or all")
    trained, layers = int(match[1]), layer + available
    if trained > layers:
        raise UserError(f"--finetune {finetune}: the backbone has {layers} layers")
    if trained > available:
        wanted = layers - trained
        raise UserError(f"--finetune {finetune} needs features of layer {wanted} or below, these "
                        f"are of layer {layer}: extract with --layer {wanted}")
    return trained


class EmotionModel(nn.Module):
    """The layers above the cached one → LayerNorm → mean over time → valence and arousal heads.

    params, layer: of the backbone and the features. finetune names what trains: `frozen` the heads
    alone; `last<n>` the top n layers, the norm and the heads. The layers between the cached one and
    those, layer 11 for `last1` and features of layer 10, stay frozen and in eval mode.
    Weights come from `start_from` or load_state_dict(assign=True).
    attention_dropout: of the layers that train; None leaves the backbone's.
    """

    def __init__(self, params, layer, finetune, attention_dropout=None):
        super().__init__()
        top = params["encoder_num_layers"] - layer
        if layer < 0 or top < 0:
            raise UserError(f"layer {layer} of a backbone with {layer + top} layers")
        cut = top - layers_to_train(finetune, top, layer)
        transformer, dimension = network(params).encoder.transformer, params["encoder_embed_dim"]
        self.layers, self.norm = transformer.layers[layer:], transformer.layer_norm
        with torch.device("meta"):
            self.valence, self.arousal = Head(dimension), Head(dimension)
        self.frozen_layers, self.trained_layers = list(self.layers[:cut]), list(self.layers[cut:])
        self.params, self.recompute = params, True
        if attention_dropout is not None:
            for encoder_layer in self.trained_layers:
                encoder_layer.attention.dropout = attention_dropout
        for module in self.frozen_modules():
            module.requires_grad_(False)
        self.train()

    def frozen_modules(self):
        return self.frozen_layers if self.trained_layers else [*self.frozen_layers, self.norm]

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def start_from(self, top_layers, seed):
        """Take the layers and the norm from a backbone's top layers; draw the heads' weights as
        nn.Linear does (uniform within 1/√fan-in), from a CPU generator of their own. Raises
        UserError if the top layers do not fit."""
        state, generator = dict(top_layers["state"]), torch.Generator().manual_seed(seed)
        wanted = {name: value.shape for name, value in self.state_dict().items()
                  if not name.startswith(DIMENSIONS)}
        if wanted != {name: value.shape for name, value in state.items()}:
            raise UserError("the top layers of these features are not those of their architecture; "
                            "run extract.py again")
        for name, parameter in self.named_parameters():
            if name in state:
                continue
            place, _, part = name.rpartition(".")
            module = self.get_submodule(place)
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                # not uniform_, which some builds of torch round once, not twice
                state[name] = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
            elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                state[name] = torch.full(parameter.shape, {"weight": 1.0, "bias": 0.0}[part])
            else:
                raise NotImplementedError(f"{name}: say here how a {type(module).__name__} starts")
        self.load_state_dict(state, assign=True)

    # What trains decides where the norm and the mean over time come:
    #                  run_frozen                                run_trained
    #   all layers     –                                         layers, norm, mean
    #   the top ones   the layers below                          layers, norm, mean
    #   the heads      layers, norm, mean: kept is one row       the mean of one row

    @torch.no_grad()
    def run_frozen(self, features):
        """One clip's features[T, D] through the layers that do not train → states[T, D] on the
        model's device, the features as they are if all train; where none trains, on through norm
        and mean: pooled[1, D]. Clip by clip, so that it can be kept or computed again, whichever
        memory allows, without changing a bit."""
        if self.trained_layers and not self.frozen_layers:
            return features.to(self.norm.weight.device)
        states = features.to(self.norm.weight)[None]
        for layer in self.frozen_layers:
            states, _ = layer(states)
        return states[0] if self.trained_layers else self.pool(states)

    def run_trained(self, states):
        """states[B, T, D] of `run_frozen` → pooled[B, D]."""
        for layer in self.trained_layers:
            states, _ = layer(states)
        return self.pool(states) if self.trained_layers else states.mean(1)

    def pool(self, states):
        """states[B, T, D] → pooled[B, D]: the final norm, then the mean over time."""
        return self.norm(states).mean(1)

    def forward(self, clips, micro_batch=1):
        """[states of `run_frozen`, …], of any lengths → z-scored [B, 2]: valence, arousal."""
        pooled = self.pool_clips(clips, micro_batch)
        return torch.cat([self.valence(pooled), self.arousal(pooled)], 1)

    def pool_clips(self, clips, micro_batch):
        """[states of `run_frozen`, …] → pooled[B, D]; a clip's row does not depend on the others.

        Clips of equal length go through the layers together, up to `micro_batch` at a time. In
        training, unless there is room for the whole batch's, a group's activations are dropped and
        recomputed in the backward pass: the gradient is that of the whole batch, to the same bits.
        """
        places, pooled, weight = {}, [None] * len(clips), self.norm.weight
        for place, clip in enumerate(clips):
            places.setdefault(len(clip), []).append(place)
        for same in places.values():
            for start in range(0, len(same), micro_batch):
                group = same[start:start + micro_batch]
                states = torch.stack([clips[place].to(weight.device, non_blocking=True)
                                      for place in group]).to(weight)
                if self.training and self.trained_layers and self.recompute:
                    rows = checkpoint(self.run_trained, states, use_reentrant=False)
                else:
                    rows = self.run_trained(states)
                for place, row in zip(group, rows):
                    pooled[place] = row
        return torch.stack(pooled)

    @torch.no_grad()
    def predict(self, loader, arithmetic, micro_batch=1):
        """z-scored predictions float64[N, 2] on the CPU for all clips of a loader, in its order, in
        eval mode."""
        self.eval()
        with arithmetic():
            return torch.cat([self(clips, micro_batch).double() for clips, _ in loader]).cpu()


class FrozenOutputs(Dataset):
    """A FeatDataset seen through a model's frozen layers: yields (states, label[2]). Each clip's
    states are computed once and kept on the device `keep`, or computed at each use where that is
    None."""

    def __init__(self, dataset, model, arithmetic, keep=None):
        self.dataset, self.model, self.arithmetic = dataset, model, arithmetic
        self.keep, self.kept = keep, {}

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        new = set(indices) - self.kept.keys()
        read = self.dataset.__getitems__([index for index in indices if index in new])
        for index in indices:
            states = self.kept.get(index)
            if index in new:
                features, _ = next(read)
                with self.arithmetic():
                    states = self.model.run_frozen(features)
                if self.keep:
                    # to pinned memory of the host, without waiting: only the GPU reads it again
                    states = self.kept[index] = states.to(self.keep, non_blocking=True)
            yield states, self.dataset.labels[index]


def where_to_keep(count, frames, model, stored, device):
    """The device with room for the frozen outputs of `count` clips of `frames` frames: the model's
    own, the host, or None. stored: dtype of the features, which are kept as they are where no layer
    is frozen."""
    parameter = model.norm.weight
    dtype = parameter.dtype if model.frozen_layers or not model.trained_layers else stored
    needed = count * (frames if model.trained_layers else 1) * len(parameter) * dtype.itemsize
    return next((place for place in (device, torch.device("cpu")) if has_room(place, needed)), None)


def room_for_activations(clips, frames, model, device):
    """Whether there is room for the activations of a whole batch: some 12 values a channel and 4 a
    feed-forward unit, for every frame and layer that trains."""
    width, inner = model.params["encoder_embed_dim"], model.params["encoder_ff_interm_features"]
    values = clips * frames * len(model.trained_layers) * (12 * width + 4 * inner)
    return has_room(device, values * model.norm.weight.element_size())


def has_room(device, size):
    """Whether `size` bytes fit into half of the memory that a device has free now; if a system does
    not say how much, a quarter of all memory counts as free."""
    if device.type == "cuda":
        return size < torch.cuda.mem_get_info(device)[0] / 2
    known = "SC_AVPHYS_PAGES" in os.sysconf_names
    pages = os.sysconf("SC_AVPHYS_PAGES") if known else os.sysconf("SC_PHYS_PAGES") / 4
    return size < pages * os.sysconf("SC_PAGE_SIZE") / 2


# --------------------------------------------------------------------------------------------- loss


def pearson(values):
    """Correlation between the two columns of values[B, 2]; 0 where a column is constant."""
    a, b = (values - values.mean(0)).unbind(1)
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)


def quadrant(values, threshold=0.0):
    """Quadrant of values[..., 2] (numpy or torch): 0 HV/HA, 1 LV/HA, 2 LV/LA, 3 HV/LA, high from
    `threshold` on. z-scored labels are split at 0, those on the 1–9 scale at 5."""
    valence, arousal = values[..., 0] >= threshold, values[..., 1] >= threshold
    return 2 * (1 - 1 * arousal) + (valence ^ arousal)


def quadrant_weights(labels):
    """float64[4]: a weight for each quadrant, inverse to how many of labels[N, 2] it holds
    (z-scored), scaled so that the mean over the N songs is 1."""
    counts = torch.bincount(quadrant(labels), minlength=4)
    return len(labels) / (counts > 0).sum() / counts.clamp_min(1).double()


def emotion_loss(pred, true, lambda_corr=0.05, lambda_var=0.05, corr_target="true", weights=None):
    """Loss over one batch of z-scored values, pred and true [B, 2]; a scalar.

    MSE + lambda_corr·(r_pred − r_true)² + lambda_var·Σ_dim(var_pred − 1)², with r the Pearson
    correlation between valence and arousal and var the population variance. corr_target "zero"
    penalises r_pred² instead. With `weights` (of quadrant_weights): the weighted MSE + the
    correlation term, without the variance term.
    """
    squared = (pred - true).square().mean(1)
    target = pearson(true) if corr_target == "true" else 0.0
    correlation = lambda_corr * (pearson(pred) - target).square()
    if weights is not None:
        return (weights.to(squared)[quadrant(true)] * squared).mean() + correlation
    variance = lambda_var * (pred.var(0, correction=0) - 1).square().sum()
    return squared.mean() + correlation + variance
