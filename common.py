"""What a method section would say, in the order in which it is used:

    seeding · Wav2Vec2 · dataset · heads · loss

To try another pooling, head or loss, change `Pooling`, `Head` or `emotion_loss`: nothing else in
the kit needs to know. What supports these five parts is in kit/, the arithmetic in exact/.
"""

import functools
import re
from pathlib import Path

import torch
import torchaudio
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from exact import Exact
from kit.audio import RATES, read_waveform
from kit.cli import UserError
from kit.containers import ENDINGS
from kit.deam import (SPLITS, corrected, download_deam, dynamic_annotations, files_below,
                      label_statistics, labels_of, quadrant, read_annotations, songs_of,
                      splits_for, static_annotations)
from kit.features import NOTEBOOK_MANIFEST, FeatureReader, read_manifest
from kit.files import plain_json, prefetch, read_tensors, sha256, shortened, state_digest
from kit.schema import check_schema
from kit.weights import find_weights, fold_weight_norm, misfit

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
    ones), its positional weight norm removed. Raises UserError for impossible params.
    params: torchaudio's, and perhaps `layer_norm_eps`: as in transformers, the epsilon of every
    layer norm behind the convolutions."""
    params = dict(params)
    epsilon = params.pop("layer_norm_eps", 1e-5)
    sizes = [size for layer in params["extractor_conv_layer_config"] for size in layer]
    sizes += [value for name, value in params.items() if name.startswith("encoder_")
              and type(value) is int and "drop" not in name]
    rates = [value for name, value in params.items() if "drop" in name]
    try:  # torchaudio takes a billion layers, and no heads, without a word
        if not all(0 < size <= 100_000 for size in sizes) or params["encoder_num_layers"] > 1000:
            raise ValueError("a size is out of range")
        if not all(0 <= rate <= 1 for rate in rates):
            raise ValueError("a dropout rate is not from 0 to 1")
        if not 0 <= epsilon <= 1:
            raise ValueError("layer_norm_eps is not from 0 to 1")
        with torch.device("meta"):
            model = torchaudio.models.wav2vec2_model(**params)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"there is no network of this architecture: {error}") from None
    parametrize.remove_parametrizations(model.encoder.transformer.pos_conv_embed.conv, "weight")
    for module in model.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = epsilon
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
    Hugging Face folder; or a file of weights in either spelling, whose architecture is that of the
    config.json beside it or, without one, the base one.
    params: torchaudio's parameters of the architecture. digest: sha256 of the float32 weights,
    whatever file they came from. source: their name, revision and the file's sha256.
    Raises UserError for unreadable or unfitting weights, or without network.
    """

    def __init__(self, weights):
        (self.params, state, self.sample_rate, self.epsilon, self.source,
         architecture) = find_weights(str(weights))
        if not RATES[0] <= self.sample_rate <= RATES[1]:
            raise UserError(f"{weights}: its sample rate is {self.sample_rate} Hz, not one from "
                            f"{RATES[0]} to {RATES[1]}")
        self.model = network(self.params)
        state = {name: tensor for name, tensor in fold_weight_norm(state).items()
                 if not name.startswith("aux.")}  # a speech recogniser's output layer
        if problem := misfit(state, self.model.state_dict()):
            raise UserError(f"{weights}: these weights do not fit {architecture} ({problem})")
        state = {name: tensor.float() for name, tensor in state.items()}
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
        root = Path(download_deam() if str(root) == "kaggle" else root)
        if not root.is_dir():
            raise UserError(f"no folder {root}: give DEAM's with --deam PATH, or kaggle to "
                            "download it")
        files = files_below(root)
        self.root, self.annotations, self.audio = root, static_annotations(files, root), {}
        self.dynamic = dynamic_annotations(files)
        for path in sorted(files):
            if path.suffix.lower() in ENDINGS and re.fullmatch("[0-9]{1,9}", path.stem):
                song = int(path.stem)
                if song in self.audio:
                    raise UserError(f"two files for song {song}: {self.audio[song]} and {path}; "
                                    "keep one")
                self.audio[song] = path

    def get_waveform(self, song_id, sample_rate=16000):
        """(waveform float64[samples] at `sample_rate`, mono; sha256 of the decoded float32 PCM).
        Raises BadClip."""
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
    """A DEAM_feats folder and its frozen splits: `ids` and `datasets` by split, the label
    statistics `mean`, `std` (float64[2], population σ over train and val) that z-score the targets,
    loaders, and `top_layers`, the encoder layers above the features'.

    splits: of read_splits; None takes the folder's own. labels: "corrected" exchanges valence and
    arousal for the ranges of ids that the audit found swapped. allow_missing: work on the songs
    that are there; None takes all, and a missing one is an error when it is read.
    Raises UserError for a folder that is not one, songs that are missing or a split that names
    unknown songs. A folder without manifest, as the published notebook made them, is taken as
    layer 10 of the backbone that it used.
    """

    def __init__(self, root, splits=None, batch_size=32, seed=0, allow_missing=False,
                 labels="shipped"):
        self.root, self.labels, self.batch_size = Path(root), labels, batch_size
        if not (self.root / "annotations.csv").is_file():
            raise UserError(f"no features in {root}: run extract.py --features {root} first")
        has_manifest = (self.root / "manifest.json").exists()
        self.manifest = (read_manifest(self.root / "manifest.json") if has_manifest
                         else NOTEBOOK_MANIFEST)
        self.settings, self.digest = self.manifest["settings"], self.manifest["digest"]
        self.annotations = self.read_labels()
        self.splits = splits or splits_for(self.root)
        self.reader = FeatureReader(self.root, self.manifest["songs"],
                                    self.top_layers["params"]["encoder_embed_dim"])
        self.ids = self.available(allow_missing)
        self.datasets = {split: FeatDataset(self.reader, ids, self.annotations)
                         for split, ids in self.ids.items()}
        self.mean, self.std = label_statistics(self.annotations,
                                               self.ids["train"] + self.ids["val"])
        self.shuffle = torch.Generator().manual_seed(seeds(seed)["shuffling"])
        self.train, self.val, self.test = (self.loader(split, dataset)
                                           for split, dataset in self.datasets.items())

    def read_labels(self):
        path, swapped = self.root / "annotations.csv", self.manifest["swapped_labels"]
        if self.digest and sha256(path.read_bytes()) != self.manifest["annotations"]:
            raise UserError(f"{path} is not the file of the manifest; run extract.py again")
        annotations = read_annotations(path)
        if self.labels == "corrected" and swapped is None:
            raise UserError(f"{self.root} does not say which labels are swapped: extract again "
                            "from a DEAM folder with its dynamic annotations")
        return corrected(annotations, swapped) if self.labels == "corrected" else annotations

    def available(self, allow_missing):
        """{split: ids whose features are there}."""
        everything = songs_of(self.splits)
        if unknown := [song for song in everything if song not in self.annotations]:
            raise UserError(f"{len(unknown)} songs of the splits have no labels in "
                            f"{self.root / 'annotations.csv'}: {shortened(unknown)}")
        if allow_missing is None:
            return {split: self.splits[split] for split in SPLITS}
        missing = [song for song in everything if not self.reader.has(song)]
        if missing and not allow_missing or len(missing) == len(everything):
            raise UserError(f"{len(missing)} of {len(everything)} songs have no features in "
                            f"{self.root}: {shortened(missing)}; extract them, or train with "
                            "--allow-missing on those that are there")
        missing = set(missing)
        return {split: [song for song in self.splits[split] if song not in missing]
                for split in SPLITS}

    @functools.cached_property
    def top_layers(self):
        if self.manifest is NOTEBOOK_MANIFEST:
            return Backbone(self.manifest["source"]["name"]).top_layers(self.settings["layer"])
        top = read_tensors(self.root / "top_layers.pt", "the backbone's top layers", TOP_LAYERS)
        if (top["layer"] != self.settings["layer"]
                or plain_json(top["params"]) != self.manifest["params"]
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

    def z_scored(self, labels):
        """labels[N, 2] on the 1–9 scale → the model's targets, float64[N, 2]."""
        return (labels - self.mean) / self.std

    @property
    def summary(self):
        return ", ".join(f"{len(self.ids[split])} of {len(self.splits[split])} {split}"
                         for split in SPLITS) + " songs"

    def notes(self):
        """What a user should know about these features and labels before reading a number."""
        yield f"songs: {self.splits['source']}"
        if self.digest is None:
            yield (f"{self.root} has no manifest: its features cannot be verified; taken as "
                   f"layer {self.settings['layer']} of {self.manifest['source']['name']}")
        if self.manifest["swapped_labels"] and self.labels == "shipped":
            ranges = ", ".join(f"{low}–{high}" for low, high in self.manifest["swapped_labels"])
            yield (f"labels as shipped: for ids {ranges} valence and arousal are swapped (see "
                   "audit.py; --labels corrected)")
        if any(len(self.ids[split]) < len(self.splits[split]) for split in SPLITS):
            yield f"working on {self.summary}"


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


def layers_to_train(finetune, available, layer):
    """How many of the `available` layers above `layer` --finetune trains. Raises UserError."""
    if finetune in ("all", "lastN"):
        if not available:
            raise UserError(f"--finetune {finetune}: there is no layer above layer {layer}, whose "
                            "states these features are; choose frozen")
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
    """The layers above the cached one → the encoder's LayerNorm → pooling → two heads.

    params, layer: of the backbone and the features. finetune names what trains: `frozen` the heads
    and a pooling that has parameters; `last<n>` also the top n layers and the norm. The stages
    before those, layer 11 for `last1` and features of layer 10, are frozen: they stay in eval mode,
    unless frozen_dropout asks for their dropout in training, as the published system has it.
    attention_dropout: of the layers that train; None leaves the backbone's.
    The pooling and the heads start with the values that their constructors draw under `seed`, in
    exact arithmetic; the layers and the norm get theirs from load_state_dict(assign=True).
    """

    def __init__(self, params, layer, finetune, seed=0, attention_dropout=None,
                 frozen_dropout=False):
        super().__init__()
        top, dimension = params["encoder_num_layers"] - layer, params["encoder_embed_dim"]
        if layer < 0 or top < 0:
            raise UserError(f"layer {layer} of a backbone with {layer + top} layers")
        cut = top - layers_to_train(finetune, top, layer)
        transformer = network(params).encoder.transformer
        self.layers, self.norm = transformer.layers[layer:], transformer.layer_norm
        with Exact(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds(seed)["heads"])
            self.pooling = Pooling(dimension)
            self.valence, self.arousal = Head(dimension), Head(dimension)

        # the stages from `cut` on train: without any layer, only a pooling that has parameters
        stages = [*self.layers, self.norm, self.pooling]
        if cut == top:
            cut = len(stages) - any(True for _ in self.pooling.parameters())
        self.frozen_stages, self.trained_stages = stages[:cut], stages[cut:]
        self.params, self.frozen_dropout, self.recompute = params, frozen_dropout, True
        for stage in self.frozen_stages:
            stage.requires_grad_(False)
        for stage in self.trained_stages:
            if attention_dropout is not None and hasattr(stage, "attention"):
                stage.attention.dropout = attention_dropout
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for stage in self.frozen_stages:
            stage.train(mode and self.frozen_dropout)
        return self

    @torch.no_grad()
    def run_frozen(self, features):
        """One clip's features[T, D] through the frozen stages → states[T, D], or pooled[D] where
        the pooling is one of them, on the model's device. One clip at a time: the bits are the same
        whether the result is kept or computed again."""
        if not self.frozen_stages:
            return features.to(self.norm.weight.device)
        return through(self.frozen_stages, features.to(self.norm.weight)[None])[0]

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
        weight, places, pooled = self.norm.weight, {}, [None] * len(clips)
        if not self.trained_stages:
            return torch.stack([clip.to(weight.device) for clip in clips]).to(weight)
        for place, clip in enumerate(clips):
            places.setdefault(len(clip), []).append(place)
        groups = [same[start:start + micro_batch] for same in places.values()
                  for start in range(0, len(same), micro_batch)]
        for group in groups:
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


def start_from(model, top_layers):
    """Give a model the layers and the norm of a backbone's top layers. Raises UserError if they are
    not of its architecture."""
    state = top_layers["state"]
    expected = {name: value.shape for name, value in model.state_dict().items()
                if name.startswith(("layers.", "norm."))}
    if expected != {name: value.shape for name, value in state.items()}:
        raise UserError("the top layers of these features are not those of their architecture; run "
                        "extract.py again")
    model.load_state_dict(state, strict=False, assign=True)


def load_model(content, file):
    """The EmotionModel, in eval mode, of what a model.pt holds. Raises UserError for anything
    else."""
    complaint = f"{file} is not a model that train.py wrote"
    check_schema(content["params"], PARAMS, complaint)
    try:
        model = EmotionModel(content["params"], content["settings"]["layer"],
                             content["config"]["options"]["finetune"])
        model.load_state_dict(content["state"], assign=True)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        raise UserError(complaint) from None
    return model.eval()


# -------------------------------------------------------------------------------------------- loss


def pearson(values):
    """Correlation between the two columns of values[B, 2]; 0 where a column is constant."""
    a, b = (values - values.mean(0)).unbind(1)
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)


def quadrant_weights(labels):
    """float64[4]: a weight for each quadrant, inverse to how many of labels[N, 2] it holds
    (z-scored), scaled so that the mean over the four quadrants is 1, as the published system has
    it. A quadrant without songs has no weight."""
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
