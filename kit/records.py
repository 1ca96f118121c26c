"""What lies on disk, and its readers."""

import torch

from kit.cli import UserError
from kit.files import json_digest, load_tensors, read_json, tensor_digest
from kit.schema import DIGEST, is_plain

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
