"""What a method section would say, in the order in which it is used:

    seeding · Wav2Vec2 · dataset · heads · loss

To try another pooling, head or loss, change `Pooling`, `Head` or `emotion_loss`; a new parameter of
the loss is also an option of train.py. What supports these five parts is in kit/, the arithmetic in
exact/.
"""

import functools
import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from exact import Exact
from kit.audio import read_waveform
from kit.cli import UserError
from kit.deam import (audio_files, dynamic_annotations, find_deam, label_statistics, labels_of,
                      quadrant, splits_for, static_annotations)
from kit.features import (NOTEBOOK_MANIFEST, FeatureReader, notes_on, read_labels, read_manifest,
                          songs_by_split)
from kit.files import prefetch, state_digest
from kit.machine import Graphs, groups_of_equal_length
from kit.network import load_network, network, read_top_layers, state_above

# ----------------------------------------------------------------------------------------- seeding


def seeds(seed):
    """Every seed of a run, by what it seeds: the first values of the heads, the order of the
    training songs, and dropout. Nothing else in a run is random; intervals are resampled with fixed
    seeds, in kit/metrics.py."""
    return {"heads": seed, "shuffling": seed + 1, "dropout": seed + 2}


# ---------------------------------------------------------------------------------------- Wav2Vec2

# oneDNN's float32 convolutions add up in an order that follows the thread count and the batch: they
# always get this many threads and one clip at a time, so that float32 features repeat themselves.
CONVOLUTION_THREADS = 8


class Backbone:
    """A frozen wav2vec2 or HuBERT encoder: waveforms in, hidden states out.

    weights: the name of a torchaudio bundle; a Hugging Face repository `owner/name[@revision]`; a
    Hugging Face folder; or a file of weights in either spelling, whose architecture is that of the
    config.json beside it or, without one, the base one.
    params: torchaudio's parameters of the architecture. digest: sha256 of the float32 weights,
    whatever file they came from. source: their name, revision and the file's sha256. sample_rate:
    of its waveforms, in Hz. epsilon: of their z-score; None where they are not z-scored.
    Raises UserError for weights that are unreadable, do not fit, or cannot be downloaded.
    """

    def __init__(self, weights):
        found, self.model = load_network(str(weights))
        self.params, self.source = found.params, found.source
        self.sample_rate, self.epsilon = found.sample_rate, found.epsilon
        self.digest = state_digest(self.model.state_dict())

    def top_layers(self, layer):
        """The layers above `layer` and the final norm: all that train and eval need of it. Raises
        UserError for a layer that is not there."""
        self.check(layer)
        return {"params": self.params, "layer": layer, "state": state_above(self.model, layer)}

    def check(self, layer):
        layers = self.params["encoder_num_layers"]
        if not 0 <= layer <= layers:
            raise UserError(f"layer {layer}: {self.source['name']} has {layers} layers")

    def to(self, arithmetic, layer):
        """Ready to compute the states of `layer` in this Arithmetic: that layer and all below it go
        to its device."""
        self.check(layer)
        self.arithmetic, self.layer = arithmetic, layer
        self.graphs = Graphs(arithmetic.most_graphs)
        encoder, transformer = self.model.encoder, self.model.encoder.transformer
        below = nn.ModuleList([self.model.feature_extractor, encoder.feature_projection,
                               transformer.pos_conv_embed, transformer.layer_norm,
                               *transformer.layers[:layer]])
        below.to(arithmetic.device, arithmetic.dtype).requires_grad_(False)
        return self

    @torch.no_grad()
    def hidden_states(self, waveforms):
        """Waveforms float64[B, samples] of kit/audio.py (mono, at the backbone's sample rate, of
        equal length, on the CPU) → [B, T, D] on the device: the states after the encoder layer
        given to `to`; of layer 0 the encoder's input. Never pad a waveform: the first group norm
        runs over time, so padding would change every frame."""
        if self.arithmetic.device.type == "cuda":
            waveforms = waveforms.pin_memory().to(self.arithmetic.device, non_blocking=True)
        if self.epsilon is not None:
            with Exact():  # also for float32: torch's own sum follows the thread count
                waveforms = waveforms - waveforms.mean(1, keepdim=True)
                power = (waveforms * waveforms).mean(1, keepdim=True)
                waveforms = waveforms / (power + self.epsilon).sqrt()
        with self.arithmetic():
            return self.graphs.run(self.encode, waveforms.to(self.arithmetic.dtype))

    def encode(self, waveforms):
        """Waveforms[B, samples] as the network takes them, on the device → [B, T, D]."""
        transformer, threads, states = self.model.encoder.transformer, torch.get_num_threads(), []
        if self.arithmetic.precision != "exact":
            torch.set_num_threads(CONVOLUTION_THREADS)
        for waveform in waveforms.split(1):
            features, _ = self.model.feature_extractor(waveform, None)
            features = self.model.encoder.feature_projection(features)
            states.append(transformer._preprocess(features))  # adds the positional convolution
        torch.set_num_threads(threads)
        states = torch.cat(states)
        # one by one: the transformer's own forward() may skip layers at random
        for layer in transformer.layers[:self.layer]:
            states, _ = layer(states)
        return states


# ----------------------------------------------------------------------------------------- dataset


class DEAMHandler:
    """DEAM in a folder: `annotations` (of read_annotations), `dynamic` {"valence": path, "arousal":
    path} of the annotations over time where they are there; `audio` {song id: path};
    `get_waveform`.

    root: the folder, in any layout (Kaggle's, the original zip files', spaces or underscores): it
    is searched for the static annotations and for audio files named <song id>.mp3 (.wav, …).
    "kaggle" downloads version 1. Raises UserError where there is no DEAM.
    """

    def __init__(self, root):
        self.root, files = find_deam(root)
        self.annotations = static_annotations(files, self.root)
        self.dynamic, self.audio = dynamic_annotations(files), audio_files(files)

    def get_waveform(self, song_id, sample_rate=16000):
        """(waveform float64[samples] at `sample_rate`, mono; sha256 of the decoded float32 PCM),
        for verify.py and one's own programs: extract.py reads clips with kit/audio.py's read_clip,
        which also remarks on them. Raises BadClip."""
        return read_waveform(self.audio[song_id], sample_rate)


class FeatDataset(Dataset):
    """Yields (features[T, D] as stored, label[2] float64: valence, arousal on 1–9).

    reader: of kit.features, which reads a song's file and compares it with the manifest. Raises
    UserError naming a file that is missing, damaged or not [T, D]."""

    def __init__(self, reader, ids, annotations):
        self.reader, self.ids, self.labels = reader, ids, labels_of(annotations, ids)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.reader.read(self.ids[index]), self.labels[index]

    def __getitems__(self, indices):
        """Many at once, in order; the next files are read meanwhile."""
        return prefetch(self.__getitem__, indices)


def collate(batch):
    """Clips stay apart, ([features[T, D], …], labels[B, 2]): padding them would change what the
    encoder sees."""
    clips, labels = zip(*batch)
    return list(clips), torch.stack(labels)


class DEAMFeatHandler:
    """A DEAM_feats folder and its frozen splits: `ids` and `datasets` by split ("train", "val",
    "test"), the label statistics `mean`, `std` (float64[2], population σ over train and val) that
    z-score the targets, `loader`, and `top_layers`, the encoder layers above the features'.

    splits: of read_splits; None takes those in the folder. extract.py copied them there: those of
    its --splits, or the kit's splits.json of 1395, 174 and 175 songs, stratified on valence ≥ 5,
    artists shared between splits. train.py --fold gives those of folds.json.
    labels: "corrected" exchanges valence and arousal for the ranges of ids that the audit found
    swapped. allow_missing: work on the songs that are there; None takes all, and a missing one is
    an error when it is read.
    Raises UserError for a folder that is not one, songs that are missing or a split that names
    unknown songs. A folder without manifest, as the published notebook made them, is taken as
    layer 10 of the backbone that it used.
    """

    def __init__(self, root, splits=None, batch_size=32, seed=0, allow_missing=False,
                 labels="shipped"):
        self.root, self.labels, self.batch_size = Path(root), labels, batch_size
        manifest = self.root / "manifest.json"
        self.manifest = read_manifest(manifest) if manifest.exists() else NOTEBOOK_MANIFEST
        self.settings, self.digest = self.manifest["settings"], self.manifest["digest"]
        self.annotations = read_labels(self.root, self.manifest, labels)
        self.splits = splits or splits_for(self.root)
        self.reader = FeatureReader(self.root, self.manifest["songs"],
                                    self.top_layers["params"]["encoder_embed_dim"])
        self.ids = songs_by_split(self.splits, self.annotations, self.reader, allow_missing)
        self.summary = ", ".join(f"{len(ids)} of {len(self.splits[split])} {split}"
                                 for split, ids in self.ids.items()) + " songs"
        self.datasets = {split: FeatDataset(self.reader, ids, self.annotations)
                         for split, ids in self.ids.items()}
        self.mean, self.std = label_statistics(self.annotations,
                                               self.ids["train"] + self.ids["val"])
        self.shuffle = torch.Generator().manual_seed(seeds(seed)["shuffling"])

    @functools.cached_property
    def top_layers(self):
        if self.digest is None:
            return Backbone(self.manifest["source"]["name"]).top_layers(self.settings["layer"])
        return read_top_layers(self.root, self.manifest)

    def loader(self, split, dataset):
        """A DataLoader over `dataset`: for train shuffled, without the last partial batch."""
        training = split == "train"
        return DataLoader(dataset, self.batch_size, shuffle=training, drop_last=training,
                          collate_fn=collate, generator=self.shuffle if training else None)

    def z_scored(self, labels):
        """labels[N, 2] on the 1–9 scale → the model's targets, float64[N, 2]."""
        return (labels - self.mean) / self.std

    def notes(self):
        return notes_on(self)


# ------------------------------------------------------------------------------------------- heads


class Pooling(nn.Module):
    """states[B, T, D] → pooled[B, D]: the mean over time."""

    def __init__(self, dimension):
        super().__init__()

    def forward(self, states):
        return states.mean(1)


class Head(nn.Sequential):
    """pooled[B, D] → one z-scored value [B, 1]."""

    def __init__(self, dimension):
        super().__init__(nn.Linear(dimension, 512), nn.LeakyReLU(0.01), nn.Dropout(0.3),
                         nn.Linear(512, 128), nn.LeakyReLU(0.01), nn.Dropout(0.3),
                         nn.Linear(128, 1))


def layers_to_train(finetune, layer, layers):
    """How many of the layers above `layer`, of a backbone with `layers`, --finetune trains. Raises
    UserError."""
    if finetune == "frozen":
        return 0
    match = re.fullmatch(r"last([1-9]\d{0,3})", finetune)
    if not match and finetune not in ("all", "lastN"):
        raise UserError(f"--finetune {finetune}: choose frozen, last1, last2, …, lastN or all")
    trained = int(match[1]) if match else max(layers - layer, 1)
    if trained > layers:
        raise UserError(f"--finetune {finetune}: the backbone has {layers} layers")
    if trained > layers - layer:
        raise UserError(f"--finetune {finetune} needs features of layer {layers - trained} or "
                        f"below, these are of layer {layer}: extract with --layer "
                        f"{layers - trained}, or choose frozen")
    return trained


class EmotionModel(nn.Module):
    """The layers above the cached one → the encoder's LayerNorm → pooling → two heads.

    params, layer: of the backbone and the features. finetune names what trains: `frozen` the heads
    and a pooling that has parameters; `last<n>` also the top n layers and the norm. The stages
    before those, layer 11 for `last1` and features of layer 10, are frozen: they stay in eval mode,
    unless frozen_dropout asks for their dropout in training, as the published system has it.
    The pooling and the heads start with the values that their constructors draw under `seed`, in
    exact arithmetic; the layers and the norm get theirs from load_state_dict(assign=True).
    """

    def __init__(self, params, layer, finetune, seed=0, frozen_dropout=False):
        super().__init__()
        layers, dimension = params["encoder_num_layers"], params["encoder_embed_dim"]
        if not 0 <= layer <= layers:
            raise UserError(f"layer {layer} of a backbone with {layers} layers")
        transformer = network(params).encoder.transformer
        self.layers, self.norm = transformer.layers[layer:], transformer.layer_norm
        with Exact(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds(seed)["heads"])
            self.pooling = Pooling(dimension)
            self.valence, self.arousal = Head(dimension), Head(dimension)

        stages = [*self.layers, self.norm, self.pooling]
        trained = layers_to_train(finetune, layer, layers)
        if trained:
            cut = len(self.layers) - trained
        else:  # a pooling that has parameters trains all the same
            cut = len(stages) - any(True for _ in self.pooling.parameters())
        self.frozen_stages, self.trained_stages = stages[:cut], stages[cut:]
        self.params, self.frozen_dropout, self.recompute = params, frozen_dropout, True
        for stage in self.frozen_stages:
            stage.requires_grad_(False)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for stage in self.frozen_stages:
            stage.train(mode and self.frozen_dropout)
        return self

    @torch.no_grad()
    def run_frozen(self, features):
        """features[B, T, D] through the frozen stages → states[B, T, D], or pooled[B, D] where the
        pooling is one of them, on the model's device."""
        if not self.frozen_stages:
            return features.to(self.norm.weight.device)
        return through(self.frozen_stages, features.to(self.norm.weight))

    def pool(self, states):
        """states[B, …] of `run_frozen` → pooled[B, D]."""
        return through(self.trained_stages, states)

    def forward(self, clips, micro_batch=1):
        """[states of `run_frozen`, …], of any lengths → z-scored [B, 2]: valence, arousal."""
        pooled = self.pool_clips(clips, micro_batch)
        return torch.cat([self.valence(pooled), self.arousal(pooled)], 1)

    def pool_clips(self, clips, micro_batch):
        """[states of `run_frozen`, …] → pooled[B, D]; a clip's row does not depend on the others.

        Clips of equal length go through the stages together, up to `micro_batch` at a time. In
        training, unless there is room for the whole batch's, a group's activations are dropped and
        recomputed in the backward pass: the gradient is that of the whole batch, to the same bits.
        """
        weight, pooled = self.norm.weight, [None] * len(clips)
        if not self.trained_stages:
            return torch.stack([clip.to(weight.device) for clip in clips]).to(weight)
        for group in groups_of_equal_length(clips, micro_batch):
            states = torch.stack([clips[place].to(weight.device, non_blocking=True)
                                  for place in group]).to(weight)
            rows = (checkpoint(self.pool, states, use_reentrant=False)
                    if self.training and self.recompute else self.pool(states))
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


def through(stages, states):
    """states through modules one by one; torchaudio's layers give a position bias beside them."""
    for stage in stages:
        states = stage(states)
        states = states[0] if isinstance(states, tuple) else states
    return states


def load_model(content, file):
    """The EmotionModel, in eval mode, that a model.pt holds: content as read_model gives it. Raises
    UserError where the state is not of its architecture."""
    model = EmotionModel(content["params"], content["settings"]["layer"],
                         content["config"]["options"]["finetune"])
    try:
        model.load_state_dict(content["state"], assign=True)
    except RuntimeError:
        raise UserError(f"{file} is not a model that train.py wrote: its state is of another "
                        "architecture") from None
    return model.eval()


# -------------------------------------------------------------------------------------------- loss


def pearson(values):
    """Correlation between the two columns of values[B, 2]; 0 where a column is constant."""
    a, b = (values - values.mean(0)).unbind(1)
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)


def quadrant_weights(labels):
    """float64[4]: a weight for each quadrant, inverse to how many of labels[N, 2] it holds
    (z-scored), scaled so that the mean over the quadrants that hold songs is 1, as the published
    system has it. A quadrant without songs has no weight."""
    counts = torch.bincount(quadrant(labels), minlength=4)
    inverse = torch.where(counts > 0, 1 / counts.double(), 0.0)
    return inverse / inverse.sum() * (counts > 0).sum()


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
