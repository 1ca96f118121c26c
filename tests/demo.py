"""Write the demo: a folder laid out as DEAM, a small backbone laid out as a Hugging Face
checkpoint, and splits. The scripts treat them as anybody's data.

  python tests/demo.py demo       # demo/DEAM, demo/backbone, demo/splits.json

60 synthetic songs of 6 s whose labels follow from how they were made, and a network with random
weights: enough to see that the kit works and repeats itself, and nothing else.
"""

import argparse
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import save

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kit.cli import Progress
from kit.deam import COLUMNS, STATIC, read_splits
from kit.files import write_file, write_json
from kit.network import network
from kit.weights import POSITION
from exact import Exact

SOURCE = "synthetic songs, written by tests/demo.py: results on them say nothing about DEAM"
SONGS = {"train": 40, "val": 10, "test": 10}  # the first ids of DEAM's splits
SECONDS, RATE = 6, 44100
# wav2vec2-base in small: the same strides, so the same 50 frames a second, and 12 layers
CONFIG = {
    "model_type": "wav2vec2", "architectures": ["Wav2Vec2Model"], "feat_extract_norm": "layer",
    "conv_dim": [32] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": True, "hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4,
    "intermediate_size": 128, "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 4,
    "do_stable_layer_norm": False, "feat_proj_dropout": 0.1, "attention_dropout": 0.1,
    "activation_dropout": 0.0, "hidden_dropout": 0.1, "layerdrop": 0.05}
PROCESSOR = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000,
             "do_normalize": False}
PARAMS = {  # the same for torchaudio
    "extractor_mode": "layer_norm", "extractor_conv_bias": True,
    "extractor_conv_layer_config": list(zip(CONFIG["conv_dim"], CONFIG["conv_kernel"],
                                            CONFIG["conv_stride"])),
    "encoder_embed_dim": 64, "encoder_projection_dropout": 0.1, "encoder_pos_conv_kernel": 32,
    "encoder_pos_conv_groups": 4, "encoder_num_layers": 12, "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.1, "encoder_ff_interm_features": 128,
    "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.1, "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.05, "aux_num_out": None}


def demo_song(song_id):
    """Synthesise one song: (int16[samples, 2], its labels as strings, dynamic labels {dimension:
    values in -1..1}).

    Arousal follows tempo and loudness, valence follows mode and brightness, as the literature on
    musical emotion has it (Gabrielsson & Lindström 2010, in Handbook of Music and Emotion), plus
    what ten annotators would disagree. Only table look-ups, sums, products and rounding: the same
    samples on every machine.
    """
    draw = np.random.default_rng([1744, song_id])
    tempo, loudness, brightness, key = draw.random(4)  # each from low (0) to high (1)
    major, register = draw.random() < 0.5, draw.integers(-1, 2)
    samples = SECONDS * RATE
    sine = np.rint(np.sin(2 * np.pi * np.arange(4096) / 4096) * 1e6) / 1e6
    pitch = 57 + int(12 * key) + 12 * register  # MIDI note of the tonic
    third, chords = (4, (0, 7, 9, 5)) if major else (3, (0, 8, 3, 10))
    beat = int(RATE * 60 / (60 + 120 * tempo))
    partials = [round(float((0.1 + 0.85 * brightness) ** n), 6) for n in range(12)]
    song = np.zeros((samples, 2))
    for count, start in enumerate(range(0, samples, beat // 2)):  # quavers over a chord a bar
        root = pitch + chords[count // 8 % 4]
        length = min(RATE // 3, samples - start)  # plucked: slow songs have gaps
        clock = np.arange(length, dtype=np.uint64)
        fade = np.minimum(clock / 400, 1) * (1 - clock / (RATE // 3)) ** 2
        upper = root + (0, third, 7, 12)[count % 4]
        for note, weight, pan in ((root - 12, 0.8, 0.5), (upper, 1.0, 0.3 + 0.4 * (count % 2))):
            step = int(round(2**32 * 440 * 2 ** ((int(note) - 69) / 12) / RATE))  # 32-bit phase
            tone = np.zeros(length)
            for n, partial in enumerate(partials, 1):
                if n * step < 2**31:  # below the Nyquist frequency
                    phase = clock * np.uint64(n * step) & np.uint64(2**32 - 1)
                    tone += partial * sine[phase >> np.uint64(20)]
            song[start:start + length] += (weight * fade * tone)[:, None] * [1 - pan, pan]
    song *= (0.05 + 0.45 * loudness) / np.abs(song).max()
    song += 0.01 * (2 * draw.random((samples, 2)) - 1)  # the room: a quiet song has more of it
    song = np.rint(32767 * np.clip(song, -1, 1)).astype("<i2")

    truth = {"valence": 5 + (0.7 if major else -0.7) + 4.0 * (brightness - 0.5),
             "arousal": 5 + 3.2 * (tempo - 0.5) + 3.2 * (loudness - 0.5)}
    labels, dynamic = [], {}
    for name, value in truth.items():
        spread = 1.5 + 1.3 * (draw.random() - 0.5)  # over songs as in DEAM: mean 1.5, σ 0.4
        noise = spread / math.sqrt(10) * math.sqrt(3) * (2 * draw.random() - 1)
        mean = min(max(value + noise, 1), 9)
        labels += [f"{mean:.1f}", f"{spread:.2f}"]
        dynamic[name] = [round((mean - 5) / 4 + 0.1 * (draw.random() - 0.5), 6)
                         for _ in range(2 * SECONDS - 2)]
    return song, labels, dynamic


def write_songs(root, songs):
    """DEAM's Kaggle layout, quirks of its CSV files included."""
    averaged = root / "DEAM_Annotations/annotations/annotations averaged per song"
    static, dynamic = [", ".join(COLUMNS)], {"valence": [], "arousal": []}
    for song_id in Progress(sorted(songs), desc="demo", unit="song"):
        song, labels, moving = demo_song(song_id)
        buffer = io.BytesIO()
        soundfile.write(buffer, song, RATE, format="WAV")
        write_file(root / f"DEAM_audio/MEMD_audio/{song_id}.wav", buffer.getvalue())
        static.append(",".join([str(song_id), *labels]))
        for name, values in moving.items():  # rows end in an empty cell
            dynamic[name].append(",".join([str(song_id), *map(str, values), ""]))
    write_file(averaged / "song_level" / STATIC, "\r\n".join(static) + "\r\n")
    times = ",".join(f"sample_{1000 + 500 * n}ms" for n in range(2 * SECONDS - 2))
    for name, rows in dynamic.items():
        write_file(averaged / "dynamic (per second annotations)" / f"{name}.csv",
                   "\r\n".join([f"song_id,{times},", *rows]) + "\r\n")


def demo_weights():
    """Random weights in torchaudio's names. Uniform draws are exact arithmetic: the same on every
    machine. The gains are such that loudness and timbre survive ten random layers."""
    generator, state, empty = np.random.default_rng(1744), {}, network(PARAMS).state_dict()
    names = list(empty)  # the positional weights are drawn after their bias
    names.remove(POSITION + "weight")
    names.insert(names.index(POSITION + "bias") + 1, POSITION + "weight")
    for name in names:
        value, shape = empty[name], tuple(empty[name].shape)
        if "norm" in name:
            state[name] = (torch.ones if name.endswith("weight") else torch.zeros)(shape)
            continue
        gain = 3 if "conv_layers" in name else 1 if "projection" in name else 0.5
        bound = gain * math.sqrt(3 / value[0].numel()) if value.ndim > 1 else 0.05
        drawn = (2 * generator.random(shape) - 1) * bound
        state[name] = torch.from_numpy(drawn.astype(np.float32))
    return state


def hugging_face(state):
    """The same in Hugging Face's names, with weight norm. The length of the positional weights is
    kept in float64, so that direction times length gives them back to the last bit."""
    state = dict(state)
    direction = state.pop(POSITION + "weight")
    with Exact():
        length = (direction.double() * direction.double()).sum((0, 1), keepdim=True).sqrt()
    state |= {POSITION + "weight_g": length, POSITION + "weight_v": direction}
    return {name.replace("encoder.transformer.", "encoder.").replace("encoder.feature_projection.",
                                                                     "feature_projection."): value
            for name, value in state.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="where the demo goes")
    folder, splits = p.parse_args().folder, read_splits(ROOT / "splits.json")
    splits = {"source": SOURCE, **{name: splits[name][:count] for name, count in SONGS.items()}}
    write_songs(folder / "DEAM", sum((splits[name] for name in SONGS), []))
    write_json(folder / "backbone/config.json", CONFIG)
    write_json(folder / "backbone/preprocessor_config.json", PROCESSOR)
    write_file(folder / "backbone/model.safetensors", save(hugging_face(demo_weights())))
    write_file(folder / "splits.json", json.dumps(splits) + "\n")


if __name__ == "__main__":
    main()
