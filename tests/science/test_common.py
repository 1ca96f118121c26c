"""What a method section would say, by hand: seeds, states, pooling, heads, loss, dataset."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from conftest import QUICK, call, few, made_features
from demo import PARAMS
from torch import nn

import common
import eval as eval_script
import train
from common import (Backbone, DEAMFeatHandler, EmotionModel, Head, emotion_loss, pearson,
                    quadrant_weights, seeds)
from kit import figures
from kit.cli import UserError
from kit.deam import labels_of
from kit.files import load_tensors
from kit.machine import Arithmetic, FrozenOutputs
from kit.network import network, start_from

BASE = {**torchaudio.pipelines.WAV2VEC2_BASE._params, "aux_num_out": None}


def randomised(model):
    """The same model in float64 with other values in every parameter: of a norm too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2
                            + (parameter.ndim == 1))
    return model


@pytest.fixture(scope="module")
def transformer():
    """torchaudio's own small encoder, in float64, with random values."""
    return randomised(network(PARAMS).to_empty(device="cpu")).encoder.transformer


def above(transformer, layer, finetune, **settings):
    """An EmotionModel of its layers above `layer`, in float64."""
    model = EmotionModel(PARAMS, layer, finetune, **settings)
    start_from(model, {"state": {
        f"{part}.{name}": value for part, module in (
            ("layers", transformer.layers[layer:]), ("norm", transformer.layer_norm))
        for name, value in module.state_dict().items()}})
    return model.double()


def clips(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 64, generator=generator, dtype=torch.float64)
            for length in lengths]


# ----------------------------------------------------------------------------------------- seeding


def test_seeds_differ_by_what_they_seed(compared):
    for seed in (0, 7, 2**32 - 3):
        values = seeds(seed)
        assert values.keys() == {"heads", "shuffling", "dropout"}
        assert len(set(values.values())) == 3 and max(values.values()) < 2**32
    compared(3, "seeds")


# ---------------------------------------------------------------------------------------- Wav2Vec2


def test_hidden_states_are_torchaudios(demo, compared):
    """Of each layer, and of the encoder's input; no layer is skipped at random. The waveform is
    z-scored where the backbone asks for it."""
    generator = torch.Generator().manual_seed(2)
    waveforms = torch.randn(2, 4000, generator=generator, dtype=torch.float64) * 0.3 + 0.1
    reference, backbone = Backbone(demo / "backbone"), Backbone(demo / "backbone")
    assert reference.epsilon is None and reference.model.encoder.transformer.layer_drop > 0
    scored = (waveforms - waveforms.mean(1, True)) / (waveforms.var(1, correction=0, keepdim=True)
                                                      + 1e-5).sqrt()
    count = 0
    for epsilon, heard in ((None, waveforms), (1e-5, scored)):
        with torch.no_grad():
            expected, _ = reference.model.extract_features(heard.float())
        for layer in (1, 3, 12):  # of one backbone: none is lost
            backbone.epsilon = epsilon
            found = backbone.to(Arithmetic("float32", "cpu"), layer).hidden_states(waveforms)
            assert torch.allclose(found, expected[layer - 1], atol=2e-5)
            count += found.numel()
    compared(count, "values")


def test_layers_that_there_are_not(demo, compared):
    backbone = Backbone(demo / "backbone")
    for layer in (-1, 13):
        with pytest.raises(UserError, match=f"layer {layer}: .* has 12 layers"):
            backbone.top_layers(layer)
    assert not backbone.top_layers(12)["state"].keys() - {"norm.weight", "norm.bias"}
    compared(3, "layers")


# ----------------------------------------------------------------------------------------- dataset


def test_label_statistics_and_loaders(features, splits, compared):
    data = DEAMFeatHandler(features, batch_size=16)
    assert [len(data.ids[name]) for name in ("train", "val", "test")] == [40, 10, 10]
    assert data.ids["test"] == splits["test"][:10]
    known = labels_of(data.annotations, data.ids["train"] + data.ids["val"]).numpy()
    np.testing.assert_allclose(data.mean, known.mean(0))
    np.testing.assert_allclose(data.std, known.std(0))
    np.testing.assert_allclose(data.z_scored(torch.from_numpy(known)),
                               (known - known.mean(0)) / known.std(0))
    batches = list(data.loader("train", data.datasets["train"]))  # the partial one is dropped
    assert [len(clips) for clips, _ in batches] == [16, 16] and batches[0][1].shape == (16, 2)
    assert not torch.equal(batches[0][1], data.datasets["train"].labels[:16])  # shuffled
    for split in ("val", "test"):  # in order, to the last song
        labels = torch.cat([labels for _, labels in data.loader(split, data.datasets[split])])
        assert torch.equal(labels, data.datasets[split].labels) and len(labels) == 10
    compared(len(known), "labels")


def test_shuffling_follows_the_seed(features, compared):
    """Each epoch has another order, the same one for the same seed."""
    orders = []
    for seed in (3, 3, 4):
        data = DEAMFeatHandler(features, batch_size=20, seed=seed)
        loader = data.loader("train", data.datasets["train"])
        orders.append([torch.cat([labels for _, labels in loader]) for _ in range(2)])
    first, again, other = orders
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
    compared(3, "seeds")


# ------------------------------------------------------------------------------------------- model


def test_parameter_counts(compared):
    expected = {"last1": 8_008_450, "frozen": 919_042, "last2": 15_096_322, "all": 15_096_322}
    for finetune, trainable in expected.items():
        model = EmotionModel(BASE, 10, finetune)
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        assert sum(size for size, trains in sizes if trains) == trainable
        assert sum(size for size, _ in sizes) == 15_096_322
    compared(2 * len(expected), "counts")


@pytest.mark.parametrize("layer, finetune", [(12, "frozen"), (10, "frozen"), (10, "last1"),
                                             (9, "all")])
def test_a_prediction_by_hand(transformer, compared, layer, finetune):
    """Layers, then the norm of every frame, then the mean over time, then two heads: linear, leaky
    ReLU, linear, leaky ReLU, linear. Clips of several lengths, alone and together."""
    model = above(transformer, layer, finetune).eval()
    randomised(model.valence), randomised(model.arousal)
    features, expected = clips(7, 5, 7, 7), []
    with torch.no_grad():
        model.arousal[6].bias += 1
        for states in features:
            for each in transformer.layers[layer:]:
                states, _ = each(states[None] if states.ndim == 2 else states)
            states = states.reshape(-1, 64)
            normed = (states - states.mean(1, True)) / (states.var(1, correction=0, keepdim=True)
                                                        + 1e-5).sqrt()
            pooled = (normed * model.norm.weight + model.norm.bias).mean(0)
            row = []
            for head in (model.valence, model.arousal):
                value = pooled
                for n in (0, 3, 6):
                    value = head[n].weight @ value + head[n].bias
                    value = torch.where(value > 0, value, 0.01 * value) if n < 6 else value
                row.append(value)
            expected.append(torch.cat(row))
        for micro_batch in (1, 2, 4):
            found = model([model.run_frozen(each[None])[0] for each in features], micro_batch)
            assert torch.allclose(found, torch.stack(expected), rtol=1e-9)
    compared(3 * found.numel(), "predictions")


def test_heads_have_dropout_of_a_third_after_each_hidden_layer(compared):
    """0.3 of the values, the others scaled, in training alone."""
    head, ones = Head(64), torch.ones(2000, 64)
    assert [(n, each.p) for n, each in enumerate(head) if isinstance(each, nn.Dropout)] == [
        (2, 0.3), (5, 0.3)]
    torch.manual_seed(0)
    assert head(ones).unique().numel() > 1000
    assert head.eval()(ones).unique().numel() == 1
    compared(2, "modes")


def test_new_heads_are_drawn_from_torchs_interval(compared):
    """Uniform in ±1/√inputs, weights and biases; each by its own draw, by the seed alone."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models = [EmotionModel(BASE, 12, "frozen", seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    values = []
    for head in (models[0].valence, models[0].arousal):
        for n in (0, 3, 6):
            weight, bias = head[n].weight.detach(), head[n].bias.detach()
            bound, size = weight.shape[1] ** -0.5, weight.numel()
            assert max(weight.abs().max(), bias.abs().max()) <= bound
            assert weight.abs().max() > bound * (1 - 10 / size)
            deviation = bound / math.sqrt(3)
            assert abs(weight.mean()) < 4 * deviation / math.sqrt(size)
            assert weight.std() == pytest.approx(deviation, rel=4 / math.sqrt(size))
            if len(bias) > 1:
                assert bias.std() == pytest.approx(deviation, rel=0.35)
            values += [weight, bias]
    first, same, other = (list(model.state_dict().items()) for model in models)
    heads = [n for n, (name, _) in enumerate(first) if "valence" in name or "arousal" in name]
    assert all(torch.equal(first[n][1], same[n][1]) for n in heads)
    assert not any(torch.equal(first[n][1], other[n][1]) for n in heads)
    assert len({value.sum().item() for value in values}) == len(values)
    compared(sum(value.numel() for value in values), "values")


def test_frozen_layers_stay_in_eval_mode(compared):
    for finetune, modes in (("last1", [False, False, False, True]), ("frozen", [False] * 4),
                            ("all", [True] * 4)):
        model = EmotionModel(PARAMS, 8, finetune).train()
        assert [layer.training for layer in model.layers] == modes
        assert model.valence.training and model.norm.training == (finetune != "frozen")
        model = EmotionModel(PARAMS, 8, finetune, frozen_dropout=True).train()
        assert all(layer.training for layer in model.layers)
        assert not any(layer.training for layer in model.eval().layers)
    compared(3, "modes")


@pytest.mark.parametrize("finetune", ["frozen", "last1"])
def test_frozen_outputs_are_kept_but_with_dropout_in_them(made, compared, finetune):
    """--frozen-dropout: the frozen layers' outputs differ from step to step in training, and in val
    they do not. Without it they are computed once."""
    for flag in ([], ["--frozen-dropout"]):
        args = train.parser().parse_args(["--features", str(made), "--finetune", finetune,
                                          *flag, *QUICK])
        arithmetic = Arithmetic("float32", "cpu")
        data = train.open_data(args)
        training = train.Training(train.configuration(args, data, arithmetic), data, arithmetic)
        outputs = {}
        for loader in (training.train_loader, training.val_loader):
            training.model.train(loader is training.train_loader)
            dataset = loader.dataset
            assert isinstance(dataset, FrozenOutputs)
            first, second = (next(dataset.__getitems__([0]))[0] for _ in range(2))
            outputs[loader is training.train_loader] = torch.equal(first, second)
            assert (0 in dataset.kept) == (not flag or loader is training.val_loader)
        assert outputs == {True: not flag, False: True}
    compared(4, "loaders")


def test_finetune_names_layers(compared):
    """How many of two layers above layer 10 train."""
    for name, count in (("frozen", 0), ("last1", 1), ("last2", 2), ("all", 2), ("lastN", 2)):
        assert common.layers_to_train(name, 10, 12) == count
    for name, says in (("last3", "extract with --layer 9"), ("last13", "has 12 layers"),
                       ("last0", "choose frozen"), ("last", "choose frozen"),
                       ("last1x", "choose frozen"), ("", "choose frozen")):
        with pytest.raises(UserError, match=says):
            common.layers_to_train(name, 10, 12)
    compared(11, "names")


# ------------------------------------------------------- changes that README says how to make


def test_another_head_trains_and_predicts(made, tmp_path, monkeypatch, no_histories, compared):
    """As README says: change `Head`, nothing else. Here it begins with a norm and is nested."""
    monkeypatch.setattr(figures, "draw_report", lambda *_: None)

    def head(dimension):
        return nn.Sequential(nn.LayerNorm(dimension), nn.Sequential(nn.Linear(dimension, 8),
                                                                    nn.GELU()), nn.Linear(8, 1))

    monkeypatch.setattr(common, "Head", head)
    for finetune in ("frozen", "last1"):
        run = tmp_path / finetune
        assert call(train, "--features", made, "--finetune", finetune, "--run", run, *QUICK,
                    "--epochs", 1) == 0
    assert load_tensors(run / "model.pt", "")["state"]["valence.1.0.weight"].shape == (8, 64)
    assert call(eval_script, run, "--features", made) == 0
    compared(2, "heads")


class AttentionPooling(nn.Module):
    """The mean over time, weighted by a softmax over frames of a learned score."""

    def __init__(self, dimension):
        super().__init__()
        self.score = nn.Linear(dimension, 1)

    def forward(self, states):
        return (states * self.score(states).softmax(1)).sum(1)


@pytest.mark.parametrize("finetune, precision", [("frozen", "float32"), ("last1", "float32"),
                                                 ("frozen", "exact")])
def test_a_pooling_with_parameters_trains(made, splits, tmp_path, monkeypatch, no_histories,
                                          compared, finetune, precision):
    """As README says: change `Pooling`, nothing else. It starts from the seed and trains, in
    `frozen` too."""
    layer, features = 10, made
    if finetune == "frozen":
        layer, features = 12, made_features(tmp_path / "f", few(splits))
    monkeypatch.setattr(common, "Pooling", AttentionPooling)
    starts = [EmotionModel(PARAMS, layer, finetune, seed).pooling.score.weight
              for seed in (0, 0, 1)]
    assert torch.equal(*starts[:2]) and not torch.equal(*starts[1:])
    assert starts[0].abs().max() <= 1 / 8 and starts[0].requires_grad
    run = tmp_path / "run"
    assert call(train, "--features", features, "--run", run, "--finetune", finetune, *QUICK,
                "--precision", precision, "--epochs", 1) == 0
    content = load_tensors(run / "model.pt", "")
    assert not torch.equal(content["state"]["pooling.score.weight"].float(), starts[0])
    content["digest"] = ""
    model = common.load_model(content, run / "model.pt").double()
    states = clips(9)[0]
    with torch.no_grad():
        pooled = model.pool_clips(model.run_frozen(states[None]), 1)[0]
        for layer in model.layers:
            states, _ = layer(states[None] if states.ndim == 2 else states)
        states = F.layer_norm(states.reshape(-1, 64), (64,), model.norm.weight, model.norm.bias)
        weights = (states @ model.pooling.score.weight.T).softmax(0)  # softmax sees no bias
        assert torch.allclose(pooled, (weights * states).sum(0), rtol=1e-6)
    compared(64, "pooled values")


def test_another_loss_trains(made, tmp_path, monkeypatch, no_histories, compared):
    """As README says: change `emotion_loss`, nothing else."""
    losses = []

    def loss(pred, true, *_):
        losses.append((pred - true).abs().mean())
        return losses[-1]

    monkeypatch.setattr(train, "emotion_loss", loss)
    assert call(train, "--features", made, "--run", tmp_path / "run", *QUICK, "--finetune",
                "frozen", "--epochs", 1) == 0
    rows = [line.split(",") for line in (tmp_path / "run/history.csv").read_text().splitlines()]
    assert rows[0][2] == "train_loss" and len(losses) == 4
    assert float(rows[1][2]) == pytest.approx(float(rows[1][4]), rel=1e-6)  # the MAE
    assert float(rows[1][5]) == pytest.approx(float(rows[1][7]), rel=1e-6)
    compared(len(losses), "losses")


# -------------------------------------------------------------------------------------------- loss


def numpy_loss(pred, true, corr_target, weights, lambda_corr=0.05, lambda_var=0.05):
    """The formula, written a second time."""
    squared = ((pred - true) ** 2).mean(axis=1)
    target = np.corrcoef(true.T)[0, 1] if corr_target == "true" else 0.0
    corr = lambda_corr * (np.corrcoef(pred.T)[0, 1] - target) ** 2
    if weights is not None:
        return float((weights * squared).mean() + corr)
    variances = sum((np.var(pred[:, d]) - 1) ** 2 for d in range(2))
    return float(squared.mean() + corr + lambda_var * variances)


@pytest.mark.parametrize("corr_target", ["true", "zero"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient(compared, corr_target, weighted):
    generator = np.random.default_rng(0)
    pred, true = generator.normal(size=(12, 2)), generator.normal(size=(12, 2)) + 0.2
    per_song = None
    if weighted:
        quadrants = [(v >= 0, a >= 0) for v, a in true]
        inverse = {each: 1 / quadrants.count(each) for each in set(quadrants)}
        assert len(inverse) == 4
        per_song = np.array([inverse[each] for each in quadrants]) / np.mean([*inverse.values()])
    x, y = torch.tensor(pred, requires_grad=True), torch.tensor(true)
    weights = quadrant_weights(y) if weighted else None
    loss = emotion_loss(x, y, corr_target=corr_target, weights=weights)
    loss.backward()
    rest = (true, corr_target, per_song)
    assert loss.item() == pytest.approx(numpy_loss(pred, *rest), rel=1e-12)
    other = emotion_loss(x, y, 0.3, 0.7, corr_target, weights)
    assert other.item() == pytest.approx(numpy_loss(pred, *rest, 0.3, 0.7), rel=1e-12)
    for index in np.ndindex(pred.shape):
        step = np.zeros_like(pred)
        step[index] = 1e-6
        slope = (numpy_loss(pred + step, *rest) - numpy_loss(pred - step, *rest)) / 2e-6
        assert x.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
    compared(2 + pred.size, "values")


def test_quadrant_weights_are_the_published_ones(compared):
    """Of the published training songs, and in a batch each song has its own quadrant's."""
    counts = {(-1, -1): (517, 0.512405), (-1, 1): (193, 1.372609), (1, -1): (165, 1.605536),
              (1, 1): (520, 0.509449)}
    labels = torch.tensor([quadrant for quadrant, (count, _) in counts.items()
                           for _ in range(count)], dtype=torch.float64)
    weights = quadrant_weights(labels)
    assert weights.mean().item() == pytest.approx(1, abs=1e-12) and weights.shape == (4,)
    for quadrant, (_, weight) in counts.items():
        true = torch.tensor([quadrant] * 2, dtype=torch.float64)
        pred = true + 1  # MSE 1, and no correlation of constants
        loss = emotion_loss(pred, true, weights=weights)
        assert loss.item() == pytest.approx(weight, abs=1e-6)
    some = quadrant_weights(labels[labels[:, 0] < 0])  # two quadrants without songs
    assert sorted(some.tolist())[:2] == [0, 0] and some.sum().item() == pytest.approx(2)
    compared(len(counts), "weights")


def test_the_correlation_of_a_batch(compared):
    values = torch.from_numpy(np.random.default_rng(1).normal(size=(30, 2)) @ [[1, 0.4], [0, 1]])
    assert pearson(values).item() == pytest.approx(np.corrcoef(values.T)[0, 1], rel=1e-12)
    assert pearson(torch.ones(3, 2)) == 0
    compared(2, "correlations")


def test_constant_predictions_have_a_finite_gradient(compared):
    x = torch.zeros(4, 2, requires_grad=True)
    emotion_loss(x, torch.randn(4, 2)).backward()
    assert x.grad.isfinite().all()
    compared(x.numel(), "gradients")
