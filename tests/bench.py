"""How fast is the kit on this machine, beside plain torch? Prints tables in Markdown.

  python tests/bench.py                  # on a GPU where there is one, else on the CPU: minutes
  python tests/bench.py --device cpu

WAV2VEC2_BASE with random weights, clips of 45 s. Every row is measured in a process of its own.
- extract: clips up to layer 10, one or eight together, decoding and writing left out. Plain:
  torchaudio's whole model with torch's defaults.
- train: a step is forward, loss, backward, clipping and AdamW on states already read. Plain: the
  top two layers and dropout in every step, all clips at once; layer 12 is trained.
- share: useful floating point operations a second, as a part of what a large matrix product reaches
  here in plain torch in the same type. Useful is what must be computed: 10 layers; 3 times the
  forward pass of the trained ones.
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
SECONDS, FRAMES, WIDTH = 45, 2249, 768


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


def work(layers):
    """Floating point operations of wav2vec2-base on one clip: convolutions and `layers` layers."""
    import torchaudio

    return operations(torchaudio.pipelines.WAV2VEC2_BASE._params, layers, samples=SECONDS * 16000)


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


# ----------------------------------- rows: each in a process of its own, plain ones without the kit

DTYPE = {"exact": torch.float64, "float64": torch.float64, "float32": torch.float32,
         "bfloat16": torch.bfloat16}


def machine_name(device):
    from kit import machine

    here = machine.environment(torch.device(device))
    cpu = f"{os.cpu_count()} cores of {here['cpu']}"
    return {"name": ", ".join(([] if device == "cpu" else [here["device"]])
                              + [cpu, f"Python {here['python']}", f"torch {here['torch']}"])}


def product_rate(device, precision):
    """Floating point operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(DTYPE[precision]) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, device, 5, 2)


def extract_kit(device, precision, clips, repeat):
    import torchaudio

    import common
    from kit import machine

    arithmetic = machine.Arithmetic(precision, device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pt"
        torch.save(torchaudio.models.wav2vec2_base().state_dict(), file)
        backbone = common.Backbone(file).to(arithmetic, 10)
    waveform = torch.randn(clips, SECONDS * 16000, dtype=torch.float64)
    seconds = timed(lambda: backbone.hidden_states(waveform), arithmetic.device, repeat, 1)
    return {"seconds": seconds / clips, "memory": memory(arithmetic.device)}


def extract_plain(device, precision, clips, repeat):
    import torchaudio

    device, dtype = torch.device(device), DTYPE[precision]
    rate = product_rate(device, precision)
    with torch.device(device):
        model = torchaudio.models.wav2vec2_base().eval().to(dtype)
    waveform = torch.randn(clips, SECONDS * 16000, dtype=dtype, device=device)

    def one():
        with torch.inference_mode():
            model.extract_features(waveform, num_layers=10)

    return {"seconds": timed(one, device, repeat, 1) / clips, "memory": memory(device),
            "rate": rate}


def step_kit(device, precision, finetune, batch, micro_batch, repeat):
    import torchaudio

    import common
    from kit import machine, network

    arithmetic = machine.Arithmetic(precision, device, 8 if precision != "exact" else None)
    params = {**torchaudio.pipelines.WAV2VEC2_BASE._params, "aux_num_out": None}
    model = common.EmotionModel(params, 10, finetune)
    reference = torchaudio.models.wav2vec2_model(**params)
    network.start_from(model, {"state": network.state_above(reference, 10)})
    model.to(arithmetic.device, arithmetic.dtype)
    model.recompute = not machine.room_for_activations(batch, FRAMES, model, arithmetic.device)
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(batch, 2, generator=generator).to(arithmetic.device, arithmetic.dtype)
    with arithmetic():
        clips = [model.run_frozen(torch.randn(1, FRAMES, WIDTH, generator=generator))[0]
                 for _ in range(batch)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = machine.flat_parameter(trainable)
    optimizer = torch.optim.AdamW([flat], lr=1e-4, weight_decay=1e-4, foreach=False)
    model.train()

    def step():
        with arithmetic():
            loss = common.emotion_loss(model(clips, micro_batch).to(arithmetic.dtype), true)
            model.zero_grad()
            loss.backward()
            flat.grad = torch.cat([parameter.grad.flatten() for parameter in trainable])
            torch.nn.utils.clip_grad_norm_(flat, 1.0, foreach=False)
            optimizer.step()

    seconds = timed(step, arithmetic.device, repeat, 1)
    return {"seconds": seconds, "memory": memory(arithmetic.device)}


def step_plain(device, precision, batch, repeat):
    import torchaudio

    device, dtype = torch.device(device), DTYPE[precision]
    transformer = torchaudio.models.wav2vec2_base().encoder.transformer
    head = torch.nn.Sequential(torch.nn.Linear(WIDTH, 512), torch.nn.LeakyReLU(),
                               torch.nn.Linear(512, 2))
    model = torch.nn.ModuleList([*transformer.layers[10:], transformer.layer_norm, head])
    model = model.to(device, dtype).train()
    model[0].requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    features = torch.randn(batch, FRAMES, WIDTH, dtype=dtype, device=device)
    true = torch.randn(batch, 2, dtype=dtype, device=device)

    def step():
        pred = model[3](model[2](model[1](model[0](features)[0])[0]).mean(1))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(pred, true).backward()
        optimizer.step()

    return {"seconds": timed(step, device, repeat, 1), "memory": memory(device)}


# ------------------------------------------------------------------------------------------- tables


def row(function, **arguments):
    """What `function` measures, in a new process."""
    command = [sys.executable, __file__, "--row", json.dumps([function.__name__, arguments])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"],
                   default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--repeat", type=int, default=3, metavar="N", help="measurements a row")
    p.add_argument("--row", help=argparse.SUPPRESS)
    args = p.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.row:
        name, arguments = json.loads(args.row)
        print(json.dumps(globals()[name](**arguments)))
        return
    device, repeat = args.device, args.repeat
    print(row(machine_name, device=device)["name"] + "\n")
    line("a clip to layer 10", "ms", "share", "GiB")
    line(*["---"] * 4)
    rates = {}
    for clips in (1,) if device == "cpu" else (1, 8):
        together = ", eight together" * (clips > 1)
        for precision in ("float32", "float64"):
            plain = row(extract_plain, device=device, precision=precision, clips=clips,
                        repeat=repeat)
            rates[precision] = plain["rate"]
            show(f"plain torch, {precision}{together}", plain, work(10), plain["rate"])
        rates["exact"] = rates["float64"]
        for precision in ("float32", "exact"):
            kit = row(extract_kit, device=device, precision=precision, clips=clips, repeat=repeat)
            show(f"extract.py --precision {precision}{together}", kit, work(10), rates[precision])
    print()
    batch = 2 if device == "cpu" else 32
    line(f"one step of {batch} clips", "ms", "share", "GiB")
    line(*["---"] * 4)
    useful = 3 * (work(1) - work(0)) * batch
    for precision in ("float32", "float64"):
        plain = row(step_plain, device=device, precision=precision, batch=batch, repeat=repeat)
        show(f"plain torch, {precision}", plain, useful, rates[precision])
    for precision in ("float32", "exact"):
        for micro_batch in (1, 4) if device == "cpu" else (4, 32):
            kit = row(step_kit, device=device, precision=precision, finetune="last1", batch=batch,
                      micro_batch=micro_batch, repeat=repeat)
            show(f"train.py --finetune last1 --micro-batch {micro_batch} --precision {precision}",
                 kit, useful, rates[precision])


def show(name, found, useful, rate):
    line(name, f"{found['seconds'] * 1e3:.4g}", f"{useful / found['seconds'] / rate:.0%}",
         f"{found['memory']:.1f}")


if __name__ == "__main__":
    main()
