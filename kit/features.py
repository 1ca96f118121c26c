"""The features folder: its manifest, its readers, and how it is filled.

    DEAM_feats/  annotations.csv  splits.json  manifest.json  top_layers.pt
                 songs/<id>.pt  a tensor [T, D]      songs/<id>.json  its entry
"""

import time
from pathlib import Path

import torch

from kit.cli import Progress, UserError
from kit.deam import COLUMNS, SPLITS, corrected, read_annotations, songs_of
from kit.files import (differences, json_digest, json_text, load_tensors, lock, plain_json,
                       prefetch, read_json, sha256, shortened, state_digest, table_text,
                       tensor_digest, write_file, write_json, write_tensors)
from kit.network import read_top_layers
from kit.schema import DIGEST, is_plain

SETTINGS = {"weights": DIGEST, "layer": int, "precision": ("exact", "float32"),
            "store": ("float32", "float16"), "sample_rate": int,
            "normalize_epsilon": (None, float)}
ENTRY = {"pcm": DIGEST, "features": DIGEST, "frames": int}
MANIFEST = {"settings": SETTINGS, "annotations": DIGEST, "top_layers": DIGEST,
            "swapped_labels": (None, [[int, int]]), "songs": {int: ENTRY}, "digest": DIGEST,
            "source": {"name": str}, "params": {str: object}}
# A folder of the published notebook has no manifest: its features cannot be verified, and are taken
# as those of the backbone that it used.
NOTEBOOK_MANIFEST = {
    "settings": {"weights": None, "layer": 10, "precision": "float32", "store": "float32",
                 "sample_rate": 16000, "normalize_epsilon": 1e-7},
    "swapped_labels": None, "songs": None, "digest": None, "params": None,
    "source": {"name": "ALM/wav2vec2-base-audioset"}}


def manifest_digest(manifest):
    """One digest over how the features were made, of which backbone and architecture, the labels
    beside them, and every song's PCM and features."""
    inside = ("settings", "source", "params", "annotations", "top_layers", "swapped_labels",
              "songs")
    return json_digest({key: manifest[key] for key in inside})


def read_manifest(path):
    """A manifest.json, whose song ids are texts. Raises UserError if it is none or was edited."""
    manifest = read_json(path, "a manifest", MANIFEST)
    if manifest["digest"] != manifest_digest(manifest):
        raise UserError(f"{path} does not match its own digest: it was edited or damaged; restore "
                        "it, or delete the folder and extract again")
    return manifest


def labels_table(annotations):
    """The text of annotations.csv: the same bytes for the same labels, whatever DEAM's own file."""
    return table_text(COLUMNS, [[song, *labels] for song, labels in annotations.items()])


# ----------------------------------------------------------------------------------------- reading


def read_features(path, digest=None, dimension=None):
    """features[T, D] of a feature file. Raises UserError where it is not a finite tensor [T, D], or
    not the one that a manifest's digest says."""
    features = load_tensors(path, "a feature file")
    if (not is_plain(features) or features.ndim != 2 or not len(features)
            or features.dtype not in (torch.float32, torch.float16)
            or dimension and features.shape[1] != dimension):
        raise UserError(f"{path}: not a tensor [T, {dimension or 'D'}] of float32 or float16, or "
                        "not dense, or NaN or infinity in it; extract this song again")
    if digest and tensor_digest(features) != digest:
        raise UserError(f"{path} is damaged: not the features of the manifest; run extract.py "
                        "again")
    return features


class FeatureReader:
    """Reads feature files of a folder, each compared with its digest.

    songs: of the manifest, or None; dimension: D. Raises UserError naming a file that is missing,
    damaged or not [T, D]."""

    def __init__(self, root, songs, dimension):
        self.root, self.songs, self.dimension = Path(root), songs, dimension

    def path(self, song):
        return self.root / "songs" / f"{song}.pt"

    def has(self, song):
        return (self.songs is None or str(song) in self.songs) and self.path(song).exists()

    def lacking(self, songs):
        """How many of the songs have no file, and how to get them; empty if all have one."""
        missing = [str(song) for song in sorted(set(songs)) if not self.path(song).exists()]
        names = f" with --songs {' '.join(missing)}" if len(missing) < 300 else ""
        return missing and (f"{self.root} lacks features of {len(missing)} songs: run its "
                            f"extract.py command{names}")

    def key(self, song):
        """(a song's file, when it was written, the digest it has to have, or None)."""
        path = self.path(song)
        written = path.stat().st_mtime_ns if path.exists() else None
        if self.songs is not None and str(song) not in self.songs:
            raise UserError(f"{path}: the manifest has no song {song}; run extract.py again")
        return path, written, None if self.songs is None else self.songs[str(song)]["features"]

    def read(self, song):
        """features[T, D] as stored."""
        path, _, digest = self.key(song)
        return read_features(path, digest, self.dimension)


def find_damage(root, entries, store):
    """{song: what is wrong with its feature file, None where nothing is}, given {song: entry}."""

    def damage(song):
        path, entry = root / "songs" / f"{song}.pt", entries[song]
        try:
            features = read_features(path, entry["features"])
        except UserError as error:
            return str(error)
        fine = features.dtype == getattr(torch, store) and len(features) == entry["frames"]
        return None if fine else f"{path}: not the type or the frames that the manifest says"

    bar = Progress(prefetch(damage, entries), total=len(entries), desc="check", unit="song",
                   disable=not entries)
    return dict(zip(entries, list(bar)))


# ----------------------------------------------------------------------------------------- filling


def describe_features(deam, backbone, layer, precision, store):
    """How the features of a DEAMHandler's songs are made by a Backbone: a manifest but for its
    songs and which labels are swapped."""
    settings = {"weights": backbone.digest, "layer": layer, "precision": precision, "store": store,
                "sample_rate": backbone.sample_rate, "normalize_epsilon": backbone.epsilon}
    return {"settings": settings, "params": plain_json(backbone.params),
            "annotations": sha256(labels_table(deam.annotations).encode()),
            "top_layers": state_digest(backbone.top_layers(layer)["state"])}


class FeatureFolder:
    """DEAM_feats/ while it is filled: every song has a file with its entry beside its features, so
    that a kill costs at most the songs in flight and several processes can fill one folder; the
    manifest is all entries together. The entry of a song that failed is {"failed": reason}.

    ids: the songs wanted; manifest: without songs; rank: this process's number, 0 for the one that
    writes what is there once. Raises UserError for a folder whose features were made otherwise."""

    def __init__(self, root, ids, manifest, rank=0):
        self.root, self.ids, self.manifest, self.rank = root, ids, manifest, rank
        path = root / "manifest.json"
        if rank and not path.exists():  # the first process decides whether this folder will do
            print(f"process {rank + 1} waits for the first process to open {root}", flush=True)
        while rank and not path.exists():
            time.sleep(0.2)
        if path.exists():
            self.join(read_manifest(path))
        self.lock = lock(root, f"extract-{rank}", "the features folder")

    def join(self, earlier):
        """Go on with the folder's manifest. Raises UserError where it was made otherwise."""
        then, now = ({**manifest["settings"], **{key: manifest[key] for key in (
            "params", "annotations", "swapped_labels")}} for manifest in (earlier, self.manifest))
        if differing := differences(then, now):
            raise UserError(f"{self.root} holds features made otherwise ({differing}): choose "
                            "another --features")
        self.manifest |= {key: earlier[key] for key in ("songs", "source", "digest", "environment")
                          if key in earlier}

    def begin(self, annotations, splits, top_layers):
        """Write what stands beside the songs, where it is not there yet."""
        if self.rank:
            return
        for name, text in (("annotations.csv", labels_table(annotations)),
                           ("splits.json", json_text(splits))):
            path = self.root / name
            if not path.exists() or path.read_bytes() != text.encode():  # it may be read-only
                write_file(path, text)
        try:
            read_top_layers(self.root, self.manifest)
        except UserError:  # there are none, or they are damaged
            write_tensors(self.root / "top_layers.pt", top_layers)
        self.write_manifest()

    def entry_file(self, song):
        return self.root / "songs" / f"{song}.json"

    def entries(self, ids):
        """{song: its entry, perhaps with a note, {} where nothing is known of it}."""
        return {song: self.entry(song) for song in ids}

    def entry(self, song):
        try:
            return read_json(self.entry_file(song), "a song's entry", (ENTRY, {"failed": str}))
        except UserError:  # none, or damaged
            return self.manifest["songs"].get(str(song), {})

    def missing(self, ids):
        """Those of the ids whose features are not there, or not as their entries say. Songs that
        failed before are tried again."""
        entries = self.entries(ids)
        self.clear_failures(entries)  # of a run that was killed
        entries = {song: entry for song, entry in entries.items() if "features" in entry}
        damages = find_damage(self.root, entries, self.manifest["settings"]["store"])
        return [song for song in ids if song not in entries or damages[song]]

    def write_song(self, song, pcm, features, note=None):
        """Store features[T, D] of a song, on the CPU; pcm: the digest of what was decoded."""
        features = features.to(getattr(torch, self.manifest["settings"]["store"])).clone()
        if not features.isfinite().all():
            return self.fail(song, f"song {song}: NaN or infinity in its features, as "
                                   f"{features.dtype}")
        write_tensors(self.root / "songs" / f"{song}.pt", features)
        write_json(self.entry_file(song), {
            "pcm": pcm, "features": tensor_digest(features), "frames": len(features),
            **({"note": note} if note else {})})

    def fail(self, song, reason):
        write_json(self.entry_file(song), {"failed": reason})

    def clear_failures(self, entries):
        """Remove the entries {song: entry} of songs that failed."""
        for song, entry in entries.items():
            if "failed" in entry:
                self.entry_file(song).unlink(missing_ok=True)

    def write_manifest(self):
        """The manifest of all songs that have features, unless it is there already."""
        entries = self.manifest["songs"] | {str(song): entry for song, entry in
                                            self.entries(self.ids).items()}
        songs = {song: {key: entries[song][key] for key in ENTRY}
                 for song in sorted(entries, key=int) if "features" in entries[song]}
        path = self.root / "manifest.json"
        if songs != self.manifest["songs"] or not path.exists():
            self.manifest["songs"] = songs
            self.manifest["digest"] = manifest_digest(self.manifest)
            write_json(path, self.manifest)

    def finish(self):
        """Complete the manifest. The first process waits until the others have dealt with their
        songs, says what the folder holds, and clears the failures, so that the next run does not
        report them again. Returns whether no song failed, as far as this process knows."""
        if self.rank:
            return True
        while not all(map(self.entry, self.ids)):
            time.sleep(0.5)
        self.write_manifest()
        songs, entries = self.manifest["songs"], self.entries(self.ids)
        print(f"{self.root}: {len(songs)} songs, {sum(each['frames'] for each in songs.values())} "
              f"frames; root digest {self.manifest['digest']}")
        for song, entry in entries.items():
            if "note" in entry:
                print(f"note: song {song}: {entry['note']}")
            if "failed" in entry:
                print(f"failed: {entry['failed']}")
        self.clear_failures(entries)
        return not any("failed" in entry for entry in entries.values())


# ------------------------------------------------------------------------------ songs and labels


def read_labels(root, manifest, labels):
    """The annotations beside features: as shipped, or "corrected", with valence and arousal
    exchanged where the manifest says so. Raises UserError for others than the manifest's."""
    path, swapped = root / "annotations.csv", manifest["swapped_labels"]
    if not path.is_file():
        raise UserError(f"no features in {root}: run extract.py --features {root} first")
    if manifest["digest"] and sha256(path.read_bytes()) != manifest["annotations"]:
        raise UserError(f"{path} is not the file of the manifest; run extract.py again")
    annotations = read_annotations(path)
    if labels == "shipped":
        return annotations
    if swapped is None:
        raise UserError(f"{root} does not say which labels are swapped: extract again from a DEAM "
                        "folder with its dynamic annotations")
    return corrected(annotations, swapped)


def songs_by_split(splits, annotations, reader, allow_missing):
    """{split: ids}: all, or with allow_missing those that have features; None does not look.
    Raises UserError for songs without labels, and for songs without features."""
    everything = songs_of(splits)
    if unknown := [song for song in everything if song not in annotations]:
        raise UserError(f"{len(unknown)} songs of the splits have no labels in "
                        f"{reader.root / 'annotations.csv'}: {shortened(unknown)}")
    missing = [song for song in everything
               if allow_missing is not None and not reader.has(song)]
    if missing and not allow_missing or len(missing) == len(everything):
        raise UserError(f"{len(missing)} of {len(everything)} songs have no features in "
                        f"{reader.root}: {shortened(missing)}; extract them (train.py "
                        "--allow-missing works on those that are there)")
    missing = set(missing)
    return {split: [song for song in splits[split] if song not in missing] for split in SPLITS}


def notes_on(data):
    """What a user should know about the features and labels of a DEAMFeatHandler before reading a
    number."""
    yield f"songs: {data.splits['source']}"
    if data.digest is None:
        yield (f"{data.root} has no manifest: its features cannot be verified; taken as layer "
               f"{data.settings['layer']} of {data.manifest['source']['name']}")
    if data.manifest["swapped_labels"] and data.labels == "shipped":
        ranges = ", ".join(f"{low}–{high}" for low, high in data.manifest["swapped_labels"])
        yield (f"labels as shipped: for ids {ranges} valence and arousal are swapped (see "
               "audit.py; --labels corrected)")
