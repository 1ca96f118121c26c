"""How fast is the kit on this machine, beside the plain way? Prints tables in Markdown.

  python tests/bench.py                  # on a GPU where there is one, else on the CPU: some minutes
  python tests/bench.py --device cpu

WAV2VEC2_BASE with random weights, synthetic 45 s stereo MP3s. Every row is measured in a process of its own.
- extract: from files to files, without the start (the time of one call less that of the next, which finds all songs
  done); bfloat16 and float64 are stored as float16. Plain: torch's defaults, the whole model, one song after the other,
  each decoded when its turn comes.
- train: a step is forward, loss, backward, clipping and AdamW on states already read. Plain: layers 11 and 12 and
  dropout in every step, all clips of the batch at once; layer 12 is trained.
- share: useful floating point operations a second, as a part of what a large matrix product reaches here in the same
  precision under the kit's settings. Useful is what must be computed: 10 layers; 3 times the forward pass of the
  trained ones.
- GiB: the peak of the process on a CPU; what torch has allocated at most on a GPU.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SECONDS, FRAMES, WIDTH, INNER = 45, 2249, 768, 3072


def work(layers):
    """Floating point operations of the wav2vec2-base encoder on one clip: convolutions and `layers` layers. A
    multiplication with its addition counts as two."""
    layer = 2 * FRAMES * (4 * WIDTH**2 + 2 * WIDTH * INNER) + 4 * FRAMES**2 * WIDTH
    total, channels, length = 0, 1, SECONDS * 16000
    for kernel, stride in [(10, 5)] + [(3, 2)] * 4 + [(2, 2)] * 2:
        length = (length - kernel) // stride + 1
        total, channels = total + 2 * length * channels * kernel * 512, 512
    return total + 2 * FRAMES * (512 * WIDTH + WIDTH * WIDTH // 16 * 128) + layers * layer


def timed(function, device, repeat, warm_up):
    """Median seconds of a call."""
    times = []
    for _ in range(warm_up + repeat):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[warm_up:]))


def memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------- rows: each in a process of its own, the plain ones without the kit


def machine(device):
    import common

    here = common.environment(torch.device(device))
    cpu = f"{os.cpu_count()} cores of {here['cpu']}"
    return {"name": ", ".join(([] if device == "cpu" else [here["device"]])
                              + [cpu, f"Python {here['python']}", f"torch {here['torch']}"])}


def make_songs(folder, count):
    """`count` songs of DEAM's ids, labels for them, and weights."""
    import common
    import soundfile
    import torchaudio

    folder = Path(folder)
    generator = np.random.default_rng(0)
    ids = sorted(common.read_splits(ROOT / "splits.json")["train"])[:count]
    noise = generator.normal(0, 0.1, (SECONDS * 44100, 2)).cumsum(0)
    soundfile.write(folder / "song.mp3", 0.5 * noise / np.abs(noise).max(), 44100)
    for song in ids:
        os.symlink(folder / "song.mp3", folder / f"{song}.mp3")
    common.write_csv(folder / common.STATIC, common.COLUMNS, [[song, 5, 1, 5, 1] for song in ids])
    torch.manual_seed(0)
    torch.save(torchaudio.models.wav2vec2_base().state_dict(), folder / "weights.pt")
    return {"songs": ids}


def extract_kit(device, precision, folder, songs):
    import extract

    device, folder = torch.device(device), Path(folder)
    store = "float16" if precision in ("bfloat16", "float64") else "float32"
    seconds = []
    warm_up = songs[:8 if device.type == "cuda" else 1]
    for some, features in ((warm_up, "warm-up"), (songs, "features"), (songs, "features")):
        start = time.perf_counter()
        assert extract.run(extract.parser().parse_args(
            ["--deam", str(folder), "--weights", str(folder / "weights.pt"), "--normalize", "off", "--features",
             str(folder / precision / features), "--precision", precision, "--store", store, "--device", device.type,
             "--songs", *map(str, some)])) == 0
        seconds.append(time.perf_counter() - start)
    peak = memory(device)
    size, dtype = (8192 if device.type == "cuda" else 2048), getattr(torch, precision.replace("tf32", "float32"))
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return {"seconds": (seconds[1] - seconds[2]) / len(songs), "memory": peak,
            "rate": 2 * size**3 / timed(lambda: a @ b, device, 9, 3)}


def extract_plain(device, precision, folder, songs):
    import soundfile
    import torchaudio

    device = torch.device(device)
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = torchaudio.models.wav2vec2_base().eval().to(device, dtype)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"

    def one():
        pcm, rate = soundfile.read(Path(folder) / f"{songs[0]}.mp3", dtype="float32", always_2d=True)
        mono = torch.from_numpy(pcm).to(dtype).mean(1)
        waveform = torchaudio.functional.resample(mono, rate, 16000).to(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            states = model.extract_features(waveform[None])[0][9][0]
        torch.save(states.float().cpu(), Path(folder) / "plain.pt")

    return {"seconds": timed(one, device, min(len(songs), 20), 1), "memory": memory(device)}


def step_kit(device, precision, finetune, batch, micro_batch, attention_dropout=None, repeat=3, warm_up=1):
    import common

    device = torch.device(device)
    common.set_determinism(8, precision)
    dtype, autocast = common.arithmetic(precision, device)
    model = common.EmotionModel("WAV2VEC2_BASE", 10, finetune, attention_dropout).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(batch, 2, generator=generator).to(device, dtype)
    with autocast():
        clips = [model.frozen(torch.randn(FRAMES, WIDTH, generator=generator)) for _ in range(batch)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=1e-4)
    model.train()

    def step():
        with autocast():
            pred = model(clips, micro_batch)
        loss = common.emotion_loss(pred.to(dtype), true)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()

    return {"seconds": timed(step, device, repeat, warm_up), "memory": memory(device)}


def step_plain(device, precision, batch, repeat=3, warm_up=1):
    import torchaudio

    device = torch.device(device)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    transformer = torchaudio.models.wav2vec2_base().encoder.transformer
    head = torch.nn.Sequential(torch.nn.Linear(WIDTH, 512), torch.nn.LeakyReLU(), torch.nn.Linear(512, 2))
    model = torch.nn.ModuleList([*transformer.layers[10:], transformer.layer_norm, head]).to(device).train()
    model[0].requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, FRAMES, WIDTH, generator=generator).to(device)
    true = torch.randn(batch, 2, generator=generator).to(device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            states = model[1](model[0](features)[0])[0]
            pred = model[3](model[2](states).mean(1))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(pred.float(), true).backward()
        optimizer.step()

    return {"seconds": timed(step, device, repeat, warm_up), "memory": memory(device)}


# ------------------------------------------------------------------------------------------------- tables


def row(function, **arguments):
    """What `function` measures, in a new process."""
    command = [sys.executable, __file__, "--row", json.dumps([function.__name__, arguments])]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def line(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--songs", type=int, metavar="N", help="to extract for a row (default: 4 on a CPU, 256 on a GPU)")
    p.add_argument("--row", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.row:
        sys.path.insert(0, str(ROOT))
        name, arguments = json.loads(args.row)
        print(json.dumps(globals()[name](**arguments)))
        return
    device, on_cpu, rates = args.device, args.device == "cpu", {}
    print(row(machine, device=device)["name"] + "\n")

    line("extract.py --precision", "songs/s", "ms a song", "matrix product, TFLOP/s", "share", "GiB", "plain: songs/s",
         "GiB", "times faster")
    line(*["---"] * 9)
    with tempfile.TemporaryDirectory() as folder:
        songs = row(make_songs, folder=folder, count=args.songs or (4 if on_cpu else 256))["songs"]
        for precision in ["float32", "float64"] if on_cpu else ["float32", "tf32", "bfloat16", "float64"]:
            kit, plain = (row(way, device=device, precision=precision, folder=folder, songs=songs)
                          for way in (extract_kit, extract_plain))
            rates[precision] = kit["rate"]
            line(precision, f"{1 / kit['seconds']:.3g}", f"{kit['seconds'] * 1e3:.4g}", f"{kit['rate'] / 1e12:.3g}",
                 f"{work(10) / kit['seconds'] / kit['rate']:.0%}", f"{kit['memory']:.1f}",
                 f"{1 / plain['seconds']:.3g}", f"{plain['memory']:.1f}", f"{plain['seconds'] / kit['seconds']:.2f}")
    print()

    line("train.py, clips of 45 s", "precision", "batch", "ms a step", "share", "GiB", "times faster than plain")
    line(*["---"] * 7)
    batch = 2 if on_cpu else 32
    for precision in ["float32"] if on_cpu else ["float32", "bfloat16"]:
        plain = row(step_plain, device=device, precision=precision, batch=batch)
        rows = [("plain: layers 11 and 12 every step", plain, batch, 1)]
        for finetune, micro_batch, dropout, trained in (
                ("last1", 1, None, 1), ("last1", 1, 0.0, 1), ("last1", batch, None, 1), ("last1", batch, 0.0, 1),
                ("frozen", batch, None, 0)):
            flags = f"--finetune {finetune} --micro-batch {micro_batch}"
            flags += "" if dropout is None else f" --attention-dropout {dropout}"
            rows.append((flags, row(step_kit, device=device, precision=precision, finetune=finetune, batch=batch,
                                    micro_batch=micro_batch, attention_dropout=dropout), batch, trained))
        if on_cpu:  # the published batch: one step, for its memory
            rows.append(("--finetune last1 --micro-batch 1",
                         row(step_kit, device=device, precision=precision, finetune="last1", batch=32, micro_batch=1,
                             repeat=1, warm_up=0), 32, 1))
        for flags, found, songs, trained in rows:
            share = 3 * (work(1) - work(0)) * trained * songs / found["seconds"] / rates[precision]
            line(flags, precision, songs, f"{found['seconds'] * 1e3:.4g}", f"{share:.0%}" if trained else "–",
                 f"{found['memory']:.1f}",
                 f"{plain['seconds'] / found['seconds']:.2f}" if songs == batch else "–")


if __name__ == "__main__":
    main()
