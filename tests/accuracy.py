"""How far is exact arithmetic from plain float64, beside float32? Prints a table in Markdown.

  python tests/accuracy.py            # the demo's network, in seconds
  python tests/accuracy.py base       # WAV2VEC2_BASE with random weights, in a minute

Relative errors in the 2-norm. Features are those of layer 10, for 3 s of noise. Pretrained encoders
may have a channel far larger than the others: here the norm before each layer makes it so, and the
error is that of the other channels. Gradients are those of `last1` without dropout, for 4 clips:
the median over tensors.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
import torchaudio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo
from common import EmotionModel, emotion_loss
from kit.network import network, start_from, state_above
from kit.weights import fold_weight_norm
from exact import Exact

LAYER, CHANNEL = 10, 5


def backbone(name):
    """(params, network) of the demo or of WAV2VEC2_BASE."""
    if name == "demo":
        params, state = demo.PARAMS, demo.demo_weights()
    else:
        torch.manual_seed(0)
        params = {**torchaudio.pipelines.WAV2VEC2_BASE._params, "aux_num_out": None}
        state = fold_weight_norm(torchaudio.models.wav2vec2_model(**params).state_dict())
    model = network(params)
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return params, model.requires_grad_(False)


def with_outlier(model, factor, compensated):
    """A copy whose CHANNEL is `factor` times larger where each layer reads it; compensated: and
    whose weights for that channel are as much smaller."""
    model = copy.deepcopy(model)
    transformer = model.encoder.transformer
    layers = transformer.layers[:LAYER]
    for norm in (transformer.layer_norm, *(layer.final_layer_norm for layer in layers[:-1])):
        norm.weight[CHANNEL] *= factor
    for layer in layers if compensated else ():
        attention = layer.attention
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj,
                       layer.feed_forward.intermediate_dense):
            linear.weight[:, CHANNEL] /= factor
    return model


def states(model, waveform):
    features, _ = model.feature_extractor(waveform, None)
    states = model.encoder.transformer._preprocess(model.encoder.feature_projection(features))
    for layer in model.encoder.transformer.layers[:LAYER]:
        states, _ = layer(states)
    return states


def in_three(function, model, *tensors):
    """function(model, tensors) in float64, exact and float32 arithmetic, as float64."""
    wide, narrow = (copy.deepcopy(model).to(dtype) for dtype in (torch.float64, torch.float32))
    tensors = [tensor.double() for tensor in tensors]
    plain = function(wide, *tensors)
    with Exact():
        exact = function(wide, *tensors)
    return plain, exact, function(narrow, *(tensor.float() for tensor in tensors))


def error(expected, found):
    return ((found.double() - expected).norm() / expected.norm()).item()


def gradients(model, features, true):
    model.zero_grad()
    emotion_loss(model(list(features)), true).backward()
    return [each.grad for each in model.parameters() if each.requires_grad]


def table(name):
    """{what: (relative error of exact arithmetic, of float32)}."""
    params, model = backbone(name)
    generator = torch.Generator().manual_seed(1)
    waveform = 0.1 * torch.randn(1, 48000, generator=generator, dtype=torch.float64)
    plain, *others = in_three(states, model, waveform)
    errors = {"features": [error(plain, other) for other in others]}
    rest = [channel for channel in range(plain.shape[-1]) if channel != CHANNEL]
    for factor in (30, 300, 3000):
        for compensated in (False, True):
            case, *others = in_three(states, with_outlier(model, factor, compensated), waveform)
            what = f"one channel {factor} times" + ", read as much smaller" * compensated
            errors[what] = [error(case[..., rest], other[..., rest]) for other in others]
    top = EmotionModel(params, LAYER, "last1")
    start_from(top, {"state": state_above(model, LAYER)})
    clips = torch.cat(plain.split(plain.shape[1] // 4, 1)[:4])
    true = torch.randn(4, 2, generator=generator)
    plain, *others = in_three(gradients, top.eval(), clips, true)
    errors["gradients"] = [statistics.median(map(error, plain, other)) for other in others]
    return errors


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("network", choices=["demo", "base"], nargs="?", default="demo")
    print("| relative error | exact | float32 |\n| --- | --- | --- |")
    for what, (exact, float32) in table(p.parse_args().network).items():
        print(f"| {what} | {exact:.1e} | {float32:.1e} |")


if __name__ == "__main__":
    main()
